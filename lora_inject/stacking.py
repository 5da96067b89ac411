"""The factors of one or more adapters of a linear layer as one pair, and the pair's gradients as theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = Sequence[Tensor]
"""A and B of each adapter, one after the other: A (rank, in), B (out, rank) for nn.Linear.

In a transposed layer B (in, rank) and A (rank, out), in that order: the one that the input meets comes first.
"""


def stacked(
    factors: Factors, scales: tuple[float, ...], dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor, float]:
    """Returns (summed rank, in), (out, summed rank), and the scale by which their product is still to be multiplied.

    One scale comes for free with a product, several go into the second factors.
    """
    ordered = [factor.t() for factor in factors] if transposed else factors
    if len(scales) == 1:
        return cast(ordered[0], dtype), cast(ordered[1], dtype), scales[0]
    seconds = [cast(second * scale, dtype) for second, scale in zip(ordered[1::2], scales, strict=True)]
    return torch.cat([cast(first, dtype) for first in ordered[0::2]]), torch.cat(seconds, dim=1), 1.0


def unstacked(
    first: Tensor | None, second: Tensor, factors: Factors, scales: tuple[float, ...], transposed: bool
) -> list[Tensor | None]:
    """Returns the gradients of the stacked factors as each adapter's own, in its dtype; None where there is none.

    Args:
        first: gradient of the stacked first factors (summed rank, in), or None.
        second: gradient of the stacked second factors (out, summed rank), without several scales.
        factors: A and B of each adapter.
        scales: one for each adapter.
        transposed: whether the layer is a transposed one.
    """
    gradients: list[Tensor | None] = [first, second]
    if len(scales) > 1:
        ranks = [factor.shape[1 if transposed else 0] for factor in factors[0::2]]
        firsts = [None] * len(ranks) if first is None else torch.split(first, ranks)
        seconds = [part * scale for part, scale in zip(torch.split(second, ranks, dim=1), scales, strict=True)]
        gradients = [one for pair in zip(firsts, seconds, strict=True) for one in pair]
    return [
        None if gradient is None else _as_factor(gradient.t() if transposed else gradient, factor.dtype)
        for gradient, factor in zip(gradients, factors, strict=True)
    ]


def _as_factor(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a gradient in its factor's dtype and strides, or autograd would copy it once more."""
    return gradient.to(dtype, memory_format=torch.contiguous_format)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the tensor in the dtype; asking first is much cheaper than a call that has nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
