"""Row blocks: merging works through a weight in these, in memory and on disk alike.

A product of matrices may come out with other last bits when it is computed for fewer rows, because the library picks
other kernels. Both merges therefore cut a weight at the same rows, which depend on its shape and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import Rows, wide

BLOCK = 2**19
"""How many elements a block holds at most, unless one row has more."""


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


def total_rows(updates: Sequence[Rows], rows: slice) -> Tensor:
    """Returns the sum of several updates in some rows, in float32 or wider, added in the given order."""
    total = updates[0](rows)
    for update in updates[1:]:
        total = total + update(rows)
    return total


def add_rows(original: Tensor | None, total: Tensor, out: Tensor) -> Tensor:
    """Writes original + total into `out`, formed in float32 or wider and rounded once; a missing original is zero.

    Args:
        original: rows of the weight, of the shape of `out`; may be `out` itself.
        total: the sum of the updates, of the same shape.
        out: what takes the result, of any floating dtype.

    Returns:
        The sum before it was rounded; `out` itself where nothing was.
    """
    if original is None:
        out.copy_(total)
        return total
    if original.dtype == total.dtype == out.dtype:
        return torch.add(original, total, out=out)
    # `wide` copies a half-precision original, and that copy takes the sum.
    fresh = original.dtype.itemsize < 4 and total.dtype == torch.float32
    summed = wide(original).add_(total) if fresh else wide(original) + total
    out.copy_(summed)
    return summed
