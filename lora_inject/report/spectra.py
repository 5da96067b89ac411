"""Singular values of an update from its factors, and the numbers that sum a spectrum up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ENERGIES = (0.9, 0.99)
"""Shares of the squared norm for which a spectrum says how many singular values hold them."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one site's update, scaling included, biases left out.

    Where a site is a stack of matrices (packed experts), each has a spectrum of its own and this sums them up.

    Attributes:
        matrices: how many matrices the update consists of.
        values: singular values, largest first, as many as the factors allow: min(rows, columns, rank). Of a stack the
            root mean square over the matrices at each position, so that matrices * sum(values^2) = |dW|^2.
        effective_rank: exp of the entropy of the singular values divided by their sum (Roy & Vetterli 2007, "The
            effective rank: a measure of effective dimensionality"); of a stack the mean over the matrices. 0 for an
            update that is zero.
        effective_rank_range: smallest and largest effective rank in the stack.
        stable_rank: |dW|^2 / sigma_1^2 (Rudelson & Vershynin 2007, "Sampling from large matrices"); mean and zero as
            above.
        rank_90: how many singular values per matrix hold 90 % of |dW|^2.
        rank_99: the same for 99 %.
    """

    matrices: int
    values: tuple[float, ...]
    effective_rank: float
    effective_rank_range: tuple[float, float]
    stable_rank: float
    rank_90: int
    rank_99: int


def core(a: Tensor, b: Tensor) -> Tensor:
    """Returns a matrix that has the norm and the singular values of B A, without forming the product.

    With B = Q R and A^T = P S it is R S^T, which is at most (rank, rank). The Gram matrices B^T B and A A^T would give
    them too, but square the factors' condition: where B A nearly cancels, half of the digits are lost.

    Args:
        a: A, (..., rank, columns), in float64.
        b: B, (..., rows, rank), in float64, with the same leading axes.
    """
    left = torch.linalg.qr(b, mode="r").R
    right = torch.linalg.qr(a.mT, mode="r").R
    product: Tensor = left @ right.mT
    return product


def spectrum_of(matrix: Tensor, scaling: float) -> Spectrum | None:
    """Returns the spectrum of scaling * matrix, or None where float64 cannot hold it.

    Args:
        matrix: an update before scaling, or the `core` of its factors, in float64: (rows, columns), or a stack of
            such.
        scaling: factor before it.
    """
    whole = matrix if matrix.numel() else matrix.new_zeros(1, 1)
    scaled = whole.reshape(-1, *whole.shape[-2:]) * scaling
    if not torch.isfinite(scaled).all():
        return None
    values = torch.linalg.svdvals(scaled)
    ranks = effective_ranks(values)
    energies = values.square().mean(0)
    kept = [energy_rank(energies, share) for share in ENERGIES]
    return Spectrum(
        matrices=len(values),
        values=tuple(energies.sqrt().tolist()),
        effective_rank=float(ranks.mean()),
        effective_rank_range=(float(ranks.min()), float(ranks.max())),
        stable_rank=float(stable_ranks(values).mean()),
        rank_90=kept[0],
        rank_99=kept[1],
    )


def effective_ranks(values: Tensor) -> Tensor:
    """Returns exp(-sum p log p) with p = sigma / sum(sigma) for each row of singular values (n, k); 0 for zeros."""
    total = values.sum(-1, keepdim=True)
    shares = values / total.where(total > 0, 1.0)
    ranks = torch.special.entr(shares).sum(-1).exp()
    found: Tensor = ranks.where(total[:, 0] > 0, 0.0)
    return found


def stable_ranks(values: Tensor) -> Tensor:
    """Returns sum(sigma^2) / sigma_1^2 for each row of singular values (n, k), largest first; 0 for zeros."""
    largest = values[:, :1]
    # Divided before they are squared: the squares of tiny numbers would be zero.
    return (values / largest.where(largest > 0, 1.0)).square().sum(-1)


def energy_rank(energies: Tensor, share: float) -> int:
    """Returns how many of the leading energies (k,) hold the share of their sum; 0 where the sum is zero."""
    held = energies.cumsum(0)
    return int((held < share * held[-1]).sum()) + 1 if held[-1] > 0 else 0


def thinned(values: Sequence[float], count: int) -> list[tuple[int, float]]:
    """Returns at most `count` (position from 1, value) pairs, evenly spread, the first and the last among them."""
    if len(values) <= count:
        return list(enumerate(values, 1))
    places = sorted({round(i * (len(values) - 1) / (count - 1)) for i in range(count)})
    return [(place + 1, values[place]) for place in places]
