"""The arithmetic of B A in factored form: norms, inner products and the best cut, without forming the product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Svd:
    """B A = U diag(s) V^T: u (..., rows, n), s (..., n) in descending order, v (..., columns, n)."""

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """The matrix B A, or a stack of such matrices, by its factors in float64.

    Attributes:
        b: B, (..., rows, rank).
        a: A, (..., rank, columns), with the same leading axes.
    """

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """The inner size, which no singular value need fill."""
        return self.b.shape[-1]

    @property
    def limit(self) -> int:
        """The largest rank that the product can have."""
        return min(self.rank, self.b.shape[-2], self.a.shape[-1])

    def values(self) -> Tensor:
        """Returns the singular values (..., n), descending: those of the small core R S^T for B = Q R, A^T = P S."""
        left = torch.linalg.qr(self.b, mode="r").R
        right = torch.linalg.qr(self.a.mT, mode="r").R
        found: Tensor = torch.linalg.svdvals(left @ right.mT)
        return found

    def norm(self) -> float:
        """Returns the Frobenius norm, that of a whole stack seen as one vector."""
        return float(self.values().norm())

    def svd(self) -> Svd:
        """Returns the thin singular value decomposition, from that of the core."""
        left, core_left = torch.linalg.qr(self.b)
        right, core_right = torch.linalg.qr(self.a.mT)
        u, s, vh = torch.linalg.svd(core_left @ core_right.mT, full_matrices=False)
        return Svd(left @ u, s, right @ vh.mT)

    def cut(self, svd: Svd, rank: int) -> LowRank:
        """Returns the nearest matrix of that rank (Eckart & Young 1936), its singular values shared by both factors.

        Rows of B and columns of A that are zero stay exactly so: padding rows of embeddings are such rows.
        """
        root = svd.s[..., :rank].sqrt()
        b = svd.u[..., :rank] * root.unsqueeze(-2) * (self.b != 0).any(-1, keepdim=True)
        a = svd.v[..., :rank].mT * root.unsqueeze(-1) * (self.a != 0).any(-2, keepdim=True)
        return LowRank(b, a)

    def inner(self, other: LowRank) -> float:
        """Returns the Frobenius inner product, the trace of (A' A^T) (B^T B')."""
        return float(((self.b.mT @ other.b) * (self.a @ other.a.mT)).sum())

    def scaled(self, factor: float) -> LowRank:
        """Returns the matrix times a number."""
        return LowRank(self.b * factor, self.a)

    def product(self) -> Tensor:
        """Returns B A; only for what is stored as a full matrix anyway."""
        return self.b @ self.a


def stack(parts: Sequence[LowRank]) -> LowRank:
    """Returns the sum of several matrices: factors side by side, rank the sum of the ranks."""
    return LowRank(torch.cat([part.b for part in parts], -1), torch.cat([part.a for part in parts], -2))


def difference(one: LowRank, other: LowRank) -> LowRank:
    """Returns one - other; where both have the same rank, so that equal factors give exact zeros."""
    if one.rank != other.rank:
        return stack([one, other.scaled(-1.0)])
    return stack([LowRank(one.b - other.b, one.a), LowRank(other.b, one.a - other.a)])


def of_dense(matrix: Tensor) -> LowRank:
    """Returns a full matrix (..., rows, columns) as the product of itself and the identity."""
    rows, columns = matrix.shape[-2:]
    one = torch.eye(min(rows, columns), dtype=matrix.dtype).expand(*matrix.shape[:-2], -1, -1)
    return LowRank(matrix, one) if columns <= rows else LowRank(one, matrix)
