"""Merging goes through a weight in blocks of rows, in memory and on disk alike, and adds the rows of updates to them.

A product of matrices may come out with other last bits when it is computed for fewer rows, because the library picks
other kernels. Both merges therefore cut a weight at the same rows, which depend on its shape and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK = 2**19
"""How many elements a block holds at most, unless one row has more."""
WIDE = (torch.float32, torch.float64)


def wide(tensor: Tensor) -> Tensor:
    """Returns the tensor in float32, or in its own dtype where that is wider."""
    return tensor if tensor.dtype in WIDE else tensor.float()


class Rows:
    """Gives the rows of one update that a slice selects, in float32 or wider."""

    def __init__(self, give: Callable[[slice], Tensor]) -> None:
        self.give = give

    def __call__(self, rows: slice) -> Tensor:
        return self.give(rows)

    def write(self, original: Tensor, rows: slice, out: Tensor) -> Tensor:
        """Writes original + these rows, formed in float32 or wider and rounded once.

        Args:
            original: the same rows of the weight, of any floating dtype; may be `out` itself.
            rows: which rows of the update.
            out: what takes the result, of the original's shape and of any floating dtype.

        Returns:
            The sum before it was rounded; `out` itself where nothing was.
        """
        return write_sum(original, self(rows).reshape(original.shape), out)


def write_sum(original: Tensor, total: Tensor, out: Tensor) -> Tensor:
    """Does what `Rows.write` does with rows that are at hand."""
    if original.dtype == total.dtype == out.dtype:
        return torch.add(original, total, out=out)
    # `wide` copies a half-precision original, and that copy takes the sum.
    fresh = original.dtype.itemsize < 4 and total.dtype == torch.float32
    summed = wide(original).add_(total) if fresh else wide(original) + total
    out.copy_(summed)
    return summed


def total_rows(updates: Sequence[Rows], rows: slice) -> Tensor:
    """Returns the sum of several updates in some rows, in float32 or wider, added in the given order."""
    total = updates[0](rows)
    for update in updates[1:]:
        total = total + update(rows)
    return total


def add_rows(original: Tensor | None, updates: Sequence[Rows], rows: slice, out: Tensor) -> Tensor:
    """Writes original + the sum of all updates in some rows, rounded once; a missing original is zero.

    Args:
        original: rows of the weight, of the shape of `out`; may be `out` itself.
        updates: at least one.
        rows: which rows.
        out: what takes the result, of any floating dtype.

    Returns:
        The sum before it was rounded; `out` itself where nothing was.
    """
    if original is not None and len(updates) == 1:
        return updates[0].write(original, rows, out)
    total = total_rows(updates, rows).reshape(out.shape)
    if original is not None:
        return write_sum(original, total, out)
    out.copy_(total)
    return total


def row_blocks(shape: Sequence[int], axes: int = 1) -> list[slice]:
    """Returns the blocks of a weight in order.

    Args:
        shape: the weight's shape, at least one axis.
        axes: how many leading axes count as rows, seen as one; no block crosses an index of all but the last of them.
    """
    rows, columns = shape[axes - 1], math.prod(shape[axes:])
    step = max(1, BLOCK // max(1, columns))
    return [
        slice(outer * rows + start, outer * rows + min(start + step, rows))
        for outer in range(math.prod(shape[: axes - 1]))
        for start in range(0, rows, step)
    ]
