"""Weights that one program stores as one matrix and another as several: fused q, k, v, or packed gate and up."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from .factors import Factors, alpha_for
from .uniform import common, rescaled


def cut(one: Factors, sizes: Sequence[int]) -> list[Factors]:
    """Returns the updates of consecutive rows; all share A.

    Args:
        one: the update of the whole, B (..., sum of sizes, rank).
        sizes: rows of each piece.
    """
    return [replace(one, b=rows) for rows in torch.split(one.b, list(sizes), dim=-2)]


def joined(pieces: Sequence[Factors | None], sizes: Sequence[int]) -> Factors:
    """Returns the update of the whole from updates of consecutive rows; rows without one stay as they are.

    Pieces that share A, as `cut` makes them, give one pair of the same rank. Others are set side by side: A below A,
    and B in blocks, whose rank is the sum of the ranks.

    Args:
        pieces: the updates, None where there is none; at least one is there.
        sizes: rows of each piece.
    """
    there = [one for one in pieces if one is not None]
    if _alike(there):
        blocks = [_empty(there[0], size) if one is None else one.b for one, size in zip(pieces, sizes, strict=True)]
        return replace(there[0], b=torch.cat(blocks, -2))
    scaling = common([one.scaling for one in there])
    ready = [None if one is None else rescaled(one, scaling) for one in pieces]
    a = torch.cat([one.a for one in ready if one is not None], -2)
    b = _blocks([None if one is None else one.b for one in ready], sizes)
    return replace(there[0], a=a, b=b, alpha=alpha_for(scaling, a.shape[-2]), rslora=False)


def _blocks(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """Returns a block-diagonal matrix, or a stack of them, with no columns for a part that is missing."""
    there = [part for part in parts if part is not None]
    dtype = functools.reduce(torch.promote_types, [part.dtype for part in there])
    columns = sum(part.shape[-1] for part in there)
    whole = torch.zeros(*there[0].shape[:-2], sum(sizes), columns, dtype=dtype)
    column = 0
    for part, row in zip(parts, accumulate(sizes, initial=0), strict=False):
        if part is not None:
            whole[..., row : row + part.shape[-2], column : column + part.shape[-1]] = part
            column += part.shape[-1]
    return whole


def _alike(pieces: Sequence[Factors]) -> bool:
    first = pieces[0]
    return all(
        one.scaling == first.scaling and one.a.dtype == first.a.dtype and torch.equal(one.a, first.a) for one in pieces
    )


def _empty(one: Factors, rows: int) -> Tensor:
    return one.b.new_zeros(*one.b.shape[:-2], rows, one.rank)
