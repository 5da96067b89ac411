"""Rows of query and key projections in the two orders that programs keep the rotary elements of a head in."""

from __future__ import annotations

from torch import Tensor

from ..errors import MismatchError


def to_pairs(rows: Tensor, heads: int, where: str) -> Tensor:
    """Returns rows of a query or key projection with the two halves of every rotary head in turns.

    transformers rotates element i of a head with element i + head_dim / 2; Meta's code, and torchtune and llama.cpp
    after it, with its neighbour.

    Args:
        rows: (heads * head_dim, ...).
        heads: number of heads.
        where: the site, for messages.

    Raises:
        MismatchError: the rows are not that many heads of an even size.
    """
    return _swapped(rows, (heads, 2, _half(rows, heads, where)))


def to_halves(rows: Tensor, heads: int, where: str) -> Tensor:
    """Returns what `to_pairs` was given.

    Raises:
        MismatchError: the rows are not that many heads of an even size.
    """
    return _swapped(rows, (heads, _half(rows, heads, where), 2))


def _swapped(rows: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return rows.reshape(*grid, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()


def _half(rows: Tensor, heads: int, where: str) -> int:
    if rows.shape[0] % (2 * heads):
        raise MismatchError(f"{where}: B has {rows.shape[0]} rows, which are not {heads} rotary heads of an even size")
    return int(rows.shape[0]) // (2 * heads)
