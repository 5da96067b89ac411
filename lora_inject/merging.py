"""Writing updates into the weights and taking them back, host by host, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import wide
from .commit import Undo
from .errors import StateError, UnsupportedError
from .host import Adapters, base_tensor


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did to one parameter.

    Attributes:
        path: dotted path of the parameter.
        adapters: names of the adapters that it holds now.
        relative: Frobenius norm of the update over that of the weight; None where the host had no such parameter.
        survives: share of the update's energy that is left after rounding to the stored dtype, at most 1.
        error: largest distance of an element from the unrounded sum.
        untied: whether the parameter was shared and got memory of its own.
        created: whether the host had no such parameter before.
    """

    path: str
    adapters: tuple[str, ...]
    relative: float | None
    survives: float
    error: float
    untied: bool
    created: bool


@torch.no_grad()
def merge_host(host: Any, path: str, names: Sequence[str], shared: set[tuple[int, str]], undo: Undo) -> list[Merged]:
    """Writes original + sum of updates, rounded once, into the host's parameters, and marks the adapters merged.

    Args:
        host: the module with the adapters.
        path: its path, for errors and the report.
        names: all adapters that its parameters hold afterwards, those merged before included.
        shared: parameters that share memory with others, from `tree.tied`; they get memory of their own.
        undo: takes what gives the former values back.

    Raises:
        UnsupportedError: a parameter that is computed, not stored.
        StateError: the sum is not finite in the stored dtype.
    """
    inner: Adapters = host.adapters
    totals: dict[str, Tensor] = {}
    held = inner.of(names)
    for adapter in held:
        for key, update in adapter.delta(host).items():
            totals[key] = totals[key] + update if key in totals else update
    rows = []
    for key, total in totals.items():
        original = inner.kept[key] if key in inner.kept else base_tensor(host, key)
        where = f"{path}.{key}" if path else key
        if key not in host._parameters:
            raise UnsupportedError(
                f"{where} is computed from other parameters (weight_norm, parametrize), so nothing can be merged into "
                "it: remove the parametrization first, or keep the adapter unmerged"
            )
        dtype = base_tensor(host, host.lora_names[0]).dtype
        value = (total if original is None else wide(original) + total).to(dtype)
        _check_finite(where, value, original)
        rows.append(_row(where, names, value, original, total, (id(host), key) in shared))
        _write(host, key, value, rows[-1].untied, undo)
    for adapter in held:
        undo(partial(setattr, adapter, "merged", adapter.merged))
        adapter.merged = True
    return rows


def _check_finite(where: str, value: Tensor, original: Tensor | None) -> None:
    bad = ~torch.isfinite(value)
    if original is not None:
        bad &= torch.isfinite(original)
    if bad.any():
        raise StateError(
            f"{where}: {int(bad.sum())} merged elements are not finite in {value.dtype}: the adapter holds NaN or "
            "infinity, or the sum overflows; nothing was merged. Check the adapter's parameters, or cast the base to "
            "a wider dtype"
        )


def _row(
    where: str, names: Sequence[str], value: Tensor, original: Tensor | None, total: Tensor, shared: bool
) -> Merged:
    before = torch.zeros_like(total) if original is None else wide(original)
    miss = (wide(value) - before) - total
    energy = float(total.double().square().sum())
    norm = float(before.double().square().sum()) ** 0.5
    return Merged(
        path=where,
        adapters=tuple(names),
        relative=energy**0.5 / norm if norm else None,
        survives=1 - float(miss.double().square().sum()) / energy if energy else 1.0,
        error=float(miss.abs().max()) if miss.numel() else 0.0,
        untied=shared and original is not None,
        created=original is None,
    )


def _write(host: Any, key: str, value: Tensor, untie: bool, undo: Undo) -> None:
    kept, current = host.adapters.kept, host._parameters[key]
    if key in kept:
        undo(partial(_copy, current, current.detach().clone()))
        current.copy_(value)
        return
    undo(partial(_put_back, host, key, current))
    if current is None or untie:
        trains = host._parameters[host.lora_names[0]].requires_grad if current is None else current.requires_grad
        kept[key] = current
        host._parameters[key] = nn.Parameter(value, requires_grad=trains)
    else:
        kept[key] = current.detach().clone()
        current.copy_(value)


@torch.no_grad()
def _copy(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


def _put_back(host: Any, key: str, before: nn.Parameter | None) -> None:
    """Undoes `_write`: nothing if it never came to keep the original."""
    if key in host.adapters.kept:
        original = host.adapters.kept.pop(key)
        if host._parameters[key] is before and original is not None:
            _copy(host._parameters[key], original)
        host._parameters[key] = before


@torch.no_grad()
def unmerge_host(host: Any, undo: Undo) -> None:
    """Gives every parameter that a merge wrote its original bits back, and marks the adapters unmerged."""
    inner: Adapters = host.adapters
    for key in inner.kept:
        done: list[str] = []
        undo(partial(_swap_back, host, key, done))
        _swap(host, key)
        done.append(key)
    kept, merged = dict(inner.kept), [adapter for adapter in inner.values() if adapter.merged]
    undo(partial(_mark, inner, kept, merged))
    inner.kept.clear()
    for adapter in merged:
        adapter.merged = False  # type: ignore[assignment]


def _swap(host: Any, key: str) -> None:
    """Exchanges what a parameter holds with what was kept of it; twice is nothing."""
    kept, current = host.adapters.kept, host._parameters[key]
    if kept[key] is None or isinstance(kept[key], nn.Parameter):
        host._parameters[key], kept[key] = kept[key], current
    else:
        written = current.detach().clone()
        current.copy_(kept[key])
        kept[key].copy_(written)


@torch.no_grad()
def _swap_back(host: Any, key: str, done: list[str]) -> None:
    if done:
        _swap(host, key)


def _mark(inner: Adapters, kept: dict[str, Tensor | None], merged: Sequence[nn.Module]) -> None:
    inner.kept.update(kept)
    for adapter in merged:
        adapter.merged = True  # type: ignore[assignment]


def bake_host(host: Any, undo: Undo) -> None:
    """Makes what is merged the base: the originals are let go."""
    kept = dict(host.adapters.kept)
    undo(partial(host.adapters.kept.update, kept))
    host.adapters.kept.clear()
