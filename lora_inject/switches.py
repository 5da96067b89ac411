"""Switching adapters on and off, and scaling them, for a while or until further notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn

from .adapter import Adapter
from .commit import all_or_nothing, deferred_interrupt
from .config import check_option
from .errors import StateError
from .host import Host
from .merge import merged_hosts
from .merging import merge_again, unmerge_host
from .refs import adapters, held_adapters, named, pick
from .ties import Ties, find_ties


def disabled(model: nn.Module, *names: str) -> AbstractContextManager[None]:
    """Returns a context that runs its block without the adapters of these names.

    On a merged model the base is there inside, and the merged weights are there again afterwards.

    Args:
        model: a model with adapters.
        *names: the adapters to leave out; none means all.

    Raises:
        StateError: no adapter has one of the names.
    """
    return _disabled(model, pick(model, names))


@contextmanager
def _disabled(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    covered = named(model, names)
    hosts = merged_hosts(model) if any(adapter.merged for adapter in covered) else {}
    before = {path: host.adapters.merged_names() for path, host in hosts.items()}
    merged = {path: host for path, host in hosts.items() if not set(names).isdisjoint(before[path])}
    muted = [adapter.__dict__ for adapter in covered]
    begun: list[bool] = []
    try:
        with all_or_nothing() as undo:
            undo(begun.clear)
            begun.append(True)
            for host in merged.values():
                unmerge_host(host, undo)
            undo(partial(_mute, muted, -1))
            _mute(muted, 1)
        yield
    finally:
        if begun:
            with deferred_interrupt():
                _mute(muted, -1)
                _come_back(model, merged, before)


def _come_back(model: nn.Module, merged: dict[str, Any], before: dict[str, list[str]]) -> None:
    """Merges again what was merged, as far as it is still there."""
    held = [
        (host, path, [name for name in before[path] if isinstance(host, Host) and host.adapters.of([name])])
        for path, host in merged.items()
    ]
    ties = find_ties(model) if held else Ties()
    with all_or_nothing() as undo:
        merge_again([entry for entry in held if entry[2]], ties, undo)


def _mute(adapters: list[dict[str, Any]], change: int) -> None:
    """Counts one more, or one fewer, open context in the attributes of adapters, past nn.Module's slow setter."""
    for state in adapters:
        state["muted"] = state.get("muted", 0) + change


def scaled(model: nn.Module, factor: float, *names: str) -> AbstractContextManager[None]:
    """Returns a context that runs its block with the updates of these names times a factor; nested ones multiply.

    Args:
        model: a model with adapters, those of the names not merged.
        factor: any finite number.
        *names: the adapters to scale; none means all.

    Raises:
        ConfigError: the factor is not a finite number.
        StateError: unknown name, or a merged adapter, whose update is in the weights already.
    """
    check_option("factor", factor)
    return _scaled(model, factor, pick(model, names))


@contextmanager
def _scaled(model: nn.Module, factor: float, names: tuple[str, ...]) -> Iterator[None]:
    covered = named(model, names)
    for adapter in covered:
        if adapter.merged:
            raise StateError(f"{_label(model, adapter)} is merged and cannot be scaled: unmerge(model) first")
    before = [(adapter, adapter.factor) for adapter in covered]
    for adapter, old in before:
        adapter.factor = old * factor
        adapter.scalings += 1
    try:
        yield
    finally:
        for adapter, old in before:
            adapter.factor = old
            adapter.scalings -= 1


def _label(model: nn.Module, adapter: Adapter) -> str:
    ref = next(ref for ref in adapters(model) if ref.adapter is adapter)
    return f"{ref.path}: adapter {ref.name!r}"


class activate:
    """Switches on the adapters of these names and off all others, at once; `with` switches back afterwards.

    Args:
        model: a model with adapters.
        *names: the adapters that act from now on; none means that all are off.

    Raises:
        StateError: unknown name, or a merged adapter that would have to change.
    """

    def __init__(self, model: nn.Module, *names: str) -> None:
        pick(model, names)
        held = list(held_adapters(model))
        for name, adapter in held:
            if adapter.merged and adapter.enabled != (name in names):
                raise StateError(f"{_label(model, adapter)} is merged: unmerge(model) before you switch it")
        self.before = [(adapter, adapter.enabled) for _, adapter in held]
        for name, adapter in held:
            adapter.enabled = name in names

    def __enter__(self) -> activate:
        return self

    def __exit__(self, *error: Any) -> None:
        for adapter, enabled in self.before:
            adapter.enabled = enabled
