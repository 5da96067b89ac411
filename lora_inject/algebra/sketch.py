"""The leading singular vectors of large matrices that are only read row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cut import Cut, energy_rank
from .lowrank import LowRank, Svd
from .weights import Delta, Scan

OVERSAMPLE = 16
"""How many more random directions are taken than singular vectors are wanted."""
POWER = 3
"""How often the matrix and its transpose are applied to sharpen the subspace."""
FIRST = 48
"""How many directions a search for an energy begins with; they double until they hold it."""
SMALL = 384
"""Matrices with a side up to this are decomposed exactly."""


def decompose(deltas: Sequence[Delta], scans: Sequence[Scan], cut: Cut) -> tuple[LowRank, bool]:
    """Returns the factors of a matrix, or of a stack of equal shapes, cut where asked for.

    Args:
        deltas: the matrices.
        scans: what a pass over each has found.
        cut: the rank, or the energy of all of them together, to keep.

    Returns:
        B (stack, rows, rank) and A (stack, rank, columns), float64, and whether they are exact, not randomized.
    """
    limit = min(deltas[0].shape)
    size = FIRST if cut.rank is None else cut.rank + OVERSAMPLE
    total = sum(scan.energy for scan in scans)
    while limit > SMALL and size < limit // 2:
        svds = [_randomized(delta, size) for delta in deltas]
        values = torch.stack([svd.s for svd in svds])
        rank = cut.keeps(values) if cut.energy is None else energy_rank(values, cut.energy, total)
        if rank <= size:
            return _factors(svds, scans, rank), False
        size *= 2
    svds = [_exact(delta) for delta in deltas]
    return _factors(svds, scans, cut.keeps(torch.stack([svd.s for svd in svds]))), True


def _exact(delta: Delta) -> Svd:
    u, s, vh = torch.linalg.svd(delta.whole(), full_matrices=False)
    return Svd(u, s, vh.mT)


def _randomized(delta: Delta, size: int) -> Svd:
    """Returns the leading singular vectors by subspace iteration (Halko, Martinsson & Tropp 2011, 4.4 and 5.1)."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(delta.shape[1], size, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(delta.times(basis)).Q
    for _ in range(POWER):
        basis = torch.linalg.qr(delta.transposed_times(basis)).Q
        basis = torch.linalg.qr(delta.times(basis)).Q
    v, s, uh = torch.linalg.svd(delta.transposed_times(basis), full_matrices=False)
    return Svd(basis @ uh.mT, s, v)


def _factors(svds: Sequence[Svd], scans: Sequence[Scan], rank: int) -> LowRank:
    """Returns the factors of that rank; rows and columns that did not change stay exactly zero."""
    pairs = [_pair(svd, scan, rank) for svd, scan in zip(svds, scans, strict=True)]
    return LowRank(torch.stack([b for b, _ in pairs]), torch.stack([a for _, a in pairs]))


def _pair(svd: Svd, scan: Scan, rank: int) -> tuple[Tensor, Tensor]:
    root = svd.s[:rank].sqrt()
    return svd.u[:, :rank] * root * scan.rows, (svd.v[:, :rank] * root).mT * scan.columns
