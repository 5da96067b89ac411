"""One scale and one rank for all sites, for files that have room for no more; Delta W stays the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .factors import Factors, alpha_for


def common(values: Sequence[float]) -> float:
    """Returns the one of the numbers that the most of them are a power of two away from: those are rewritten exactly.

    Of several such numbers it is the most frequent one, then the first.
    """
    counts = Counter(values)
    mantissas = Counter({math.frexp(value)[0]: 0 for value in counts})
    for value, count in counts.items():
        mantissas[math.frexp(value)[0]] += count
    return max(counts, key=lambda value: (mantissas[math.frexp(value)[0]], counts[value]))


def rescaled(one: Factors, scaling: float) -> Factors:
    """Returns the same update with another scaling: B times old / new.

    Exact in B's dtype where the ratio is a power of two; else B becomes float32 at least, with one rounding.
    """
    if one.scaling == scaling:
        return one
    ratio = one.scaling / scaling
    bias = None if one.bias is None else _times(one.bias, ratio)
    return replace(one, b=_times(one.b, ratio), bias=bias, alpha=alpha_for(scaling, one.rank), rslora=False)


def _times(tensor: Tensor, factor: float) -> Tensor:
    product = tensor.double() * factor
    same = product.to(tensor.dtype)
    if torch.equal(same.double(), product):
        return same
    return product.to(torch.promote_types(tensor.dtype, torch.float32))


def padded(one: Factors, rank: int) -> Factors:
    """Returns the same update with rows of A and columns of B added that are zero."""
    missing = rank - one.rank
    if not missing:
        return one
    rows = one.a.new_zeros(*one.a.shape[:-2], missing, one.a.shape[-1])
    columns = one.b.new_zeros(*one.b.shape[:-1], missing)
    a, b = torch.cat([one.a, rows], -2), torch.cat([one.b, columns], -1)
    return replace(one, a=a, b=b, alpha=alpha_for(one.scaling, rank), rslora=False)


def uniform(factors: Sequence[Factors]) -> tuple[float, int, list[Factors]]:
    """Returns a scaling, a rank, and the same updates of matrices with that scaling and that rank."""
    scaling, rank = common([one.scaling for one in factors]), max(one.rank for one in factors)
    return scaling, rank, [padded(rescaled(one, scaling), rank) for one in factors]
