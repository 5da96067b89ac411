"""Writing updates into the weights and taking them back, host by host, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .commit import Undo
from .computed import computed_weight
from .errors import UnsupportedError
from .keeping import Kept, Replaced, Through, overlaps
from .merge_job import Job, Merged, MergeOptions, report_row
from .merge_ways import merge_parameter
from .quantized import stored_weight
from .slots import Adapters
from .ties import Ties

Work = tuple[Any, str, Sequence[str]]
"""A host, its path, and the adapters that it holds merged when all is done."""


@torch.no_grad()
def merge_host(host: Any, path: str, names: Sequence[str], options: MergeOptions, undo: Undo) -> list[Merged]:
    """Writes original + sum of updates, rounded once, into the host's parameters, and marks the adapters merged.

    Args:
        host: the module with the adapters.
        path: its path, for errors and the report.
        names: all adapters that its parameters hold afterwards, those merged before included.
        options: what to keep, and how to round.
        undo: takes what gives the former values back.

    Raises:
        UnsupportedError: a parameter that is computed, not stored.
        StateError: the sum is not finite in the stored dtype.
    """
    inner: Adapters = host.adapters
    if inner.kept:
        unmerge_host(host, undo)
    members = inner.of(names)
    sources = [
        copy.deepcopy(adapter).to(options.accumulate) if _widen(adapter, options) else copy.deepcopy(adapter)
        for adapter in members
    ]
    rows = []
    for key in dict.fromkeys(key for source in sources for key in source.delta_names(host)):
        leader = options.ties.leader(host, key, options.holding)
        if leader is not None and leader[0] is not host:
            _follow(host, key, leader, undo)
            continue
        job = _job(host, key, f"{path}.{key}" if path else key, sources, options, leader is None)
        kept = merge_parameter(job, undo)
        rows.append(report_row(job, names, kept))
    undo(partial(inner.__dict__.__setitem__, "merged_by", inner.merged_by))
    # Without the ties, which hold modules of the whole model.
    inner.__dict__["merged_by"] = replace(options, ties=Ties(), holding={})
    for adapter in members:
        undo(partial(setattr, adapter, "merged", adapter.merged))
        adapter.merged = True
    return rows


def merge_again(hosts: Iterable[Work], ties: Ties, undo: Undo) -> None:
    """Merges adapters into hosts that were unmerged for a while, each by the options of its last merge."""
    hosts = list(hosts)
    holding = {id(host): names for host, _, names in hosts}
    for host, path, names in hosts:
        merge_host(host, path, names, replace(host.adapters.merged_by, ties=ties, holding=holding), undo)


def _widen(adapter: Any, options: MergeOptions) -> bool:
    return options.accumulate == torch.float64 and next(adapter.parameters()).dtype != torch.float64


def _job(host: Any, key: str, where: str, sources: list[Any], options: MergeOptions, alone: bool) -> Job:
    computed = None if key in host._parameters else computed_weight(host, key)
    if key not in host._parameters and computed is None:
        raise UnsupportedError(
            f"{where} is computed in a way that is unknown here, so nothing can be merged into it: keep the adapter "
            "unmerged"
        )
    current = host._parameters.get(key)
    if current is not None and current.is_meta:
        raise UnsupportedError(
            f"{where} is on the meta device (offloaded, or not loaded yet), so there are no numbers to merge into: "
            "load the weights first, or merge the checkpoint by the command `lora-inject merge`"
        )
    using = [source for source in sources if key in source.delta_names(host)]
    axes = max(source.axes_of(key) for source in using)
    stored = stored_weight(host) if key == "weight" else None
    if stored is not None and not options.requantize:
        raise UnsupportedError(
            f"{where} is quantized ({stored.format}), and the sum would have to be rounded to that format anew, which "
            "can take much of the update: merge with requantize=True and look at the error in the report, merge into "
            "the base that was quantized, or keep the adapter unmerged"
        )
    unties = alone and (id(host), key) in options.ties.shared
    unties = unties or (current is not None and stored is None and overlaps(current))
    updates = [source.rows_by(host, key, axes) for source in using]
    return Job(host, key, where, updates, using, axes, options, unties, stored, computed)


def _follow(host: Any, key: str, leader: tuple[Any, str], undo: Undo) -> None:
    """Takes over a tied parameter into which its first holder has merged the same update."""
    first, name = leader
    inner, current = host.adapters, host._parameters[key]
    undo(partial(inner.kept.pop, key, None))
    undo(partial(host._parameters.__setitem__, key, current))
    moved = first._parameters[name] is not current
    inner.kept[key] = Replaced(current) if moved else Through(first, name)
    host._parameters[key] = first._parameters[name]


@torch.no_grad()
def unmerge_host(host: Any, undo: Undo) -> None:
    """Gives every parameter that a merge wrote its original bits back, and marks the adapters unmerged.

    Raises:
        StateError: the original is gone or cannot be proven.
    """
    inner: Adapters = host.adapters
    for key, kept in inner.kept.items():
        kept.restore(host, key, undo)
    merged = [adapter for _, adapter in inner.named() if adapter.merged]
    undo(partial(_mark, inner, dict(inner.kept), merged))
    inner.kept.clear()
    for adapter in merged:
        adapter.merged = False


def _mark(inner: Adapters, kept: dict[str, Kept], merged: Sequence[Any]) -> None:
    inner.kept.update(kept)
    for adapter in merged:
        adapter.merged = True


def bake_host(host: Any, undo: Undo) -> list[str]:
    """Makes what is merged the base: the ways back are let go. Returns the parameters that the merge created."""
    kept = dict(host.adapters.kept)
    undo(partial(host.adapters.kept.update, kept))
    host.adapters.kept.clear()
    return [key for key, way in kept.items() if isinstance(way, Replaced) and way.parameter is None]
