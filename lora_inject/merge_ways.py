"""The ways to write W + delta: in place, with a copy, as a new Parameter, requantized, or through an inverse."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .commit import Undo
from .computed import Computed, Rewritten
from .errors import UnsupportedError
from .host import base_tensor, beside
from .keeping import Copy, Kept, Nothing, Replaced, Requantized, overwrite
from .merge_job import ENOUGH, Job, Tally
from .quantized import Stored, stored_weight
from .residual import InPlace, Residual
from .rows import row_blocks, total_rows, wide

_UNMERGED = "remove the parametrization first, or keep the adapter unmerged"
ROOM = 8
"""How many roundings of its largest element a weight that is computed from others may be away from the sum."""


def merge_parameter(job: Job, undo: Undo) -> Kept:
    """Merges one parameter the way that its state and the options ask for."""
    if job.computed is not None:
        return _rewrite(job, job.computed, undo)
    current, options = job.host._parameters[job.key], job.options
    if job.stored is not None:
        return _requantize(job, job.stored, undo)
    if current is None or job.unties:
        like = base_tensor(job.host, beside(job.host, job.key)) if current is None else current
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
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
        job.tally = Tally()
        kept = _replace(job, current, options.dtype, undo)
    return kept


def _replace(job: Job, current: nn.Parameter | None, dtype: torch.dtype, undo: Undo) -> Kept:
    """Gives the host a Parameter of its own that holds the sum."""
    if current is None:
        value, _ = job.value(None, slice(None), dtype)
        trains = job.host._parameters[beside(job.host, job.key)].requires_grad
    else:
        value = _summed(job, current.detach(), dtype)
        trains = current.requires_grad
    kept = Replaced(current)
    _keep(job, kept, undo)
    kept_before = partial(job.host._parameters.__setitem__, job.key, current)
    undo(kept_before)
    job.host._parameters[job.key] = nn.Parameter(value, requires_grad=trains)
    return kept


def _summed(job: Job, original: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the merged weight in new memory."""
    flat, value = original.flatten(0, job.axes - 1), torch.empty(original.shape, dtype=dtype, device=original.device)
    into = value.flatten(0, job.axes - 1)
    for rows in row_blocks(original.shape, job.axes):
        into[rows] = job.value(flat[rows], rows, dtype)[0]
    return value


def _requantize(job: Job, stored: Stored, undo: Undo) -> Kept:
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


def _rewrite(job: Job, weight: Computed, undo: Undo) -> Kept:
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


def _copy(job: Job, current: nn.Parameter, undo: Undo) -> Kept:
    """Writes the sum in place and keeps a copy of the original."""
    kept = Copy(current.detach().clone())
    value = _summed(job, kept.tensor, current.dtype)
    _keep(job, kept, undo)
    undo(partial(overwrite, current, kept.tensor))
    overwrite(current, value)
    return kept


def _residual(job: Job, current: nn.Parameter, flat: Tensor, undo: Undo) -> Kept:
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


def _keep(job: Job, kept: Kept, undo: Undo) -> None:
    undo(partial(job.host.adapters.kept.pop, job.key, None))
    job.host.adapters.kept[job.key] = kept
