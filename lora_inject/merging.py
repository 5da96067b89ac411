"""Writing updates into the weights and taking them back, host by host, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Rows, wide
from .blocks import add_rows, row_blocks, total_rows
from .commit import Undo
from .computed import Computed, Rewritten, computed_weight
from .errors import StateError, UnsupportedError
from .host import Adapters, base_tensor
from .keeping import Copy, Kept, Nothing, Replaced, Requantized, Through, overwrite
from .quantized import Stored, stored_weight
from .residual import InPlace, Residual
from .ties import Ties

_UNMERGED = "remove the parametrization first, or keep the adapter unmerged"
ROOM = 8
"""How many roundings of its largest element a weight that is computed from others may be away from the sum."""
ENOUGH = 0.9
"""Share of an update that must survive rounding for a merge to go without a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """How a merge works; `li.merge` documents each."""

    keep: str = "residual"
    dtype: torch.dtype | None = None
    accumulate: torch.dtype = torch.float32
    ties: Ties = field(default_factory=Ties)
    """Shared parameters get memory of their own, unless all that hold one merge the same update into it."""
    requantize: bool = False
    holding: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """By id of a host, the adapters that it holds merged when all is done."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did to one parameter.

    Attributes:
        path: dotted path of the parameter.
        adapters: names of the adapters that it holds now.
        relative: Frobenius norm of the update over that of the weight; None where the host had no such parameter.
        survives: how much of the update is left after rounding to the stored dtype: the projection of the change that
            was stored on the update, over the update's own, at most 1.
        error: largest distance of an element from the unrounded sum.
        untied: whether the parameter was shared and got memory of its own.
        created: whether the host had no such parameter before.
        widened: whether it is stored in a wider dtype than before.
        requantized: whether it was dequantized, and the sum stored in the quantized format; `error` and `survives`
            then tell what that took.
        kept: bytes held for `unmerge`.
    """

    path: str
    adapters: tuple[str, ...]
    relative: float | None
    survives: float
    error: float
    untied: bool
    created: bool
    widened: bool
    requantized: bool
    kept: int


@dataclass(slots=True)
class _Tally:
    """Adds up over blocks what the report says of a parameter."""

    energy: float = 0.0
    stored: float = 0.0
    norm: float = 0.0
    error: float = 0.0

    def add(self, before: Tensor | None, total: Tensor, value: Tensor) -> None:
        base = torch.zeros_like(total) if before is None else wide(before)
        change = wide(value) - base
        self.energy += float(total.double().square().sum())
        self.stored += float((change.double() * total.double()).sum())
        self.norm += float(base.double().square().sum())
        self.error = max(self.error, float((change - total).abs().max()) if total.numel() else 0.0)

    @property
    def survives(self) -> float:
        return min(1.0, self.stored / self.energy) if self.energy else 1.0


@dataclass(slots=True)
class _Job:
    """One parameter of one host to merge into."""

    host: Any
    key: str
    where: str
    updates: list[Rows]
    sources: list[Any]
    axes: int
    options: MergeOptions
    unties: bool
    stored: Stored | None
    computed: Computed | None
    tally: _Tally = field(default_factory=_Tally)

    def value(self, before: Tensor | None, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns merged rows, rounded once, and the update that is in them."""
        total = total_rows(self.updates, rows)
        value = torch.empty(total.shape, dtype=dtype, device=total.device)
        add_rows(before, total, value)
        self.check(before, value)
        self.tally.add(before, total, value)
        return value, total

    def check(self, before: Tensor | None, value: Tensor) -> None:
        """Refuses a sum that is not finite where the original is."""
        bad = ~torch.isfinite(value) if before is None else ~torch.isfinite(value) & torch.isfinite(before)
        if bad.any():
            raise StateError(
                f"{self.where}: {int(bad.sum())} merged elements or more are not finite in {value.dtype}: the adapter "
                "holds NaN or infinity, or the sum overflows; nothing was merged. Check the adapter's parameters, or "
                "cast the base to a wider dtype"
            )


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
        kept = _merge_parameter(job, undo)
        rows.append(_row(job, names, kept))
    for adapter in members:
        undo(partial(setattr, adapter, "merged", adapter.merged))
        adapter.merged = True
    return rows


def _widen(adapter: Any, options: MergeOptions) -> bool:
    return options.accumulate == torch.float64 and next(adapter.parameters()).dtype != torch.float64


def _job(host: Any, key: str, where: str, sources: list[Any], options: MergeOptions, alone: bool) -> _Job:
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
    axes = using[0].row_axes if key == using[0].updates[0] else 1
    stored = stored_weight(host) if key == "weight" else None
    if stored is not None and not options.requantize:
        raise UnsupportedError(
            f"{where} is quantized ({stored.format}), and the sum would have to be rounded to that format anew, which "
            "can take much of the update: merge with requantize=True and look at the error in the report, merge into "
            "the base that was quantized, or keep the adapter unmerged"
        )
    unties = alone and (id(host), key) in options.ties.shared
    updates = [source.delta_rows(host, key) for source in using]
    return _Job(host, key, where, updates, using, axes, options, unties, stored, computed)


def _follow(host: Any, key: str, leader: tuple[Any, str], undo: Undo) -> None:
    """Takes over a tied parameter into which its first holder has merged the same update."""
    first, name = leader
    inner, current = host.adapters, host._parameters[key]
    undo(partial(inner.kept.pop, key, None))
    undo(partial(host._parameters.__setitem__, key, current))
    moved = first._parameters[name] is not current
    inner.kept[key] = Replaced(current) if moved else Through(first, name)
    host._parameters[key] = first._parameters[name]


def _merge_parameter(job: _Job, undo: Undo) -> Kept:
    """Merges one parameter the way that its state and the options ask for."""
    if job.computed is not None:
        return _rewrite(job, job.computed, undo)
    current, options = job.host._parameters[job.key], job.options
    if job.stored is not None:
        return _requantize(job, job.stored, undo)
    if current is None or job.unties:
        weight = base_tensor(job.host, job.host.lora_names[0])
        dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
        return _replace(job, current, dtype, undo)
    flat = current.detach().flatten(0, job.axes - 1)
    in_place = flat.data_ptr() == current.data_ptr()
    if options.keep == "copy" or current.dim() < 2 or not in_place:
        kept: Kept = _copy(job, current, undo)
    else:
        kept = _residual(job, current, flat, undo)
    if options.dtype is not None and job.tally.survives < ENOUGH and options.dtype.itemsize > current.element_size():
        kept.restore(job.host, job.key, undo)
        job.host.adapters.kept.pop(job.key)
        job.tally = _Tally()
        kept = _replace(job, current, options.dtype, undo)
    return kept


def _replace(job: _Job, current: nn.Parameter | None, dtype: torch.dtype, undo: Undo) -> Kept:
    """Gives the host a Parameter of its own that holds the sum."""
    if current is None:
        value, _ = job.value(None, slice(None), dtype)
        trains = job.host._parameters[job.host.lora_names[0]].requires_grad
    else:
        flat = current.detach().flatten(0, job.axes - 1)
        blocks = row_blocks(current.shape, job.axes)
        value = torch.cat([job.value(flat[rows], rows, dtype)[0] for rows in blocks]).reshape(current.shape)
        trains = current.requires_grad
    kept = Replaced(current)
    _keep(job, kept, undo)
    kept_before = partial(job.host._parameters.__setitem__, job.key, current)
    undo(kept_before)
    job.host._parameters[job.key] = nn.Parameter(value, requires_grad=trains)
    return kept


def _requantize(job: _Job, stored: Stored, undo: Undo) -> Kept:
    """Gives the host another weight in the stored format; the report tells what the rounding to it took."""
    before, total = stored.dequantized(), total_rows(job.updates, slice(None))
    value = before + total
    job.check(before, value)
    kept = Requantized(stored)
    _keep(job, kept, undo)
    # The way back first: what makes the new weight may set what lies beside it.
    undo(partial(kept.restore, job.host, job.key, lambda step: None))
    try:
        job.host._parameters[job.key] = stored.requantized(value)
    except UnsupportedError as problem:
        raise UnsupportedError(f"{job.where}: {problem}: keep the adapter unmerged") from None
    made = stored_weight(job.host)
    assert made is not None
    job.tally.add(before, total, made.dequantized())
    found: Kept = Nothing() if job.options.keep == "nothing" else kept
    job.host.adapters.kept[job.key] = found
    return found


def _rewrite(job: _Job, weight: Computed, undo: Undo) -> Kept:
    """Sets the parameters that the weight is computed from so that W + delta comes out; refuses if it does not."""
    if any(owner in job.options.ties.shared for owner in weight.owners()):
        raise UnsupportedError(
            f"{job.where} is computed from parameters that other modules hold too, which would change with it: "
            f"{_UNMERGED}"
        )
    kept = Rewritten(weight)
    # The way back first: a parametrization may write to its buffers when it is asked.
    undo(partial(kept.restore, job.host, job.key, lambda step: None))
    before = kept.value
    total = total_rows(job.updates, slice(None)).reshape(before.shape)
    wanted = wide(before) + total
    job.check(before, wanted.to(before.dtype))
    try:
        weight.write(weight.invert(wanted.to(before.dtype)))
    except UnsupportedError as problem:
        raise UnsupportedError(f"{job.where} is computed from other parameters, and {problem}: {_UNMERGED}") from None
    job.tally.add(before, total, weight.read())
    room = ROOM * torch.finfo(before.dtype).eps * float(wanted.abs().max())
    if not job.tally.error <= room:
        raise UnsupportedError(
            f"{job.where} is computed from other parameters, which cannot make it W + delta: the nearest that they can "
            f"be set to is {job.tally.error:.3g} away: {_UNMERGED}"
        )
    way: Kept = Nothing() if job.options.keep == "nothing" else kept
    _keep(job, way, undo)
    return way


def _copy(job: _Job, current: nn.Parameter, undo: Undo) -> Kept:
    """Writes the sum in place and keeps a copy of the original."""
    kept = Copy(current.detach().clone())
    flat = kept.tensor.flatten(0, job.axes - 1)
    blocks = row_blocks(current.shape, job.axes)
    value = torch.cat([job.value(flat[rows], rows, current.dtype)[0] for rows in blocks]).reshape(current.shape)
    _keep(job, kept, undo)
    undo(partial(overwrite, current, kept.tensor))
    overwrite(current, value)
    return kept


def _residual(job: _Job, current: nn.Parameter, flat: Tensor, undo: Undo) -> Kept:
    """Writes the sum in place, block by block, and keeps what subtraction would not give back."""
    kept = Residual(job.sources, current.shape, job.axes)
    writer = InPlace(flat, kept.blocks)
    kept.prove(flat)
    undo(lambda: writer.back(lambda position: kept.recover(flat, job.updates, position)))
    for position, rows in enumerate(kept.blocks):
        before = flat[rows].clone()
        value, total = job.value(before, rows, current.dtype)
        kept.note(before, value, total)
        writer.write(position, value)
    found: Kept = Nothing() if job.options.keep == "nothing" else kept
    _keep(job, found, undo)
    return found


def _keep(job: _Job, kept: Kept, undo: Undo) -> None:
    undo(partial(job.host.adapters.kept.pop, job.key, None))
    job.host.adapters.kept[job.key] = kept


def _row(job: _Job, names: Sequence[str], kept: Kept) -> Merged:
    tally, after = job.tally, job.host._parameters.get(job.key)
    before = kept.parameter if isinstance(kept, Replaced) else after
    widened = before is not None and before.dtype != after.dtype
    return Merged(
        path=job.where,
        adapters=tuple(names),
        relative=(tally.energy / tally.norm) ** 0.5 if tally.norm else None,
        survives=tally.survives,
        error=tally.error,
        untied=before is not None and job.unties,
        created=before is None and job.computed is None,
        widened=widened,
        requantized=job.stored is not None,
        kept=kept.size,
    )


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
