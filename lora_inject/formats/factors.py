"""One low-rank update as most programs store it: in the order in which the input meets its factors."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import FormatError


@dataclass(frozen=True, eq=False, kw_only=True)
class Factors:
    """y += scaling * (B (A x) + b) for the module at `path`, whichever way round that stores its weight.

    A parameter without a module of its own is not called, so nothing says which of its axes the input meets: there
    Delta W = scaling * B A, with the parameter's rows in B and its columns in A.

    Attributes:
        path: path of the module, as the file spells it until it is resolved.
        a: (rank, in), a convolution (rank, in / groups, *kernel), a stack of matrices (n, rank, columns).
        b: (out, rank), a convolution (out, rank, 1, ...), a stack (n, rows, rank).
        bias: b (out), or None.
        alpha: numerator of the scaling; any finite number.
        rslora: scaling = alpha / sqrt(rank) instead of alpha / rank.
        dropout: dropout on the input while training.
        kind: kind of the adapter class that serves the module, as far as the file tells.
        parameter: name of the parameter in the module, where the update belongs to one alone.
    """

    path: str
    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    kind: str = "linear"
    parameter: str | None = None

    @property
    def stacked(self) -> bool:
        """Whether the factors have a leading axis for a stack of matrices."""
        return self.parameter is not None and self.a.dim() == 3

    @property
    def rank(self) -> int:
        """Inner size of the factors."""
        return int(self.a.shape[1 if self.stacked else 0])

    @property
    def scaling(self) -> float:
        """The factor before B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def site(self) -> str:
        """The path of the module, or of the parameter."""
        return self.path if self.parameter is None else f"{self.path}.{self.parameter}".lstrip(".")

    def checked(self, where: object) -> Factors:
        """Returns the factors in one dtype and with a positive alpha, after checking that they belong together.

        Raises:
            FormatError: A and B do not share a rank, are no floating-point tensors, or alpha is not finite.
        """
        axis = 2 if self.stacked else 1
        if not all(tensor.is_floating_point() for tensor in self._tensors()):
            raise FormatError(f"{where}: {self.site}: the factors must be floating-point tensors")
        if min(self.a.dim(), self.b.dim()) <= axis or self.rank < 1 or self.b.shape[axis] != self.rank:
            raise FormatError(
                f"{where}: {self.site}: A {tuple(self.a.shape)} and B {tuple(self.b.shape)} do not share a rank"
            )
        if not math.isfinite(self.alpha):
            raise FormatError(f"{where}: {self.site}: alpha {self.alpha} is not finite")
        return self._one_dtype()._positive()

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.a, self.b, self.bias) if tensor is not None]

    def _one_dtype(self) -> Factors:
        dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in self._tensors()])
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, a=self.a.to(dtype), b=self.b.to(dtype), bias=bias)

    def _positive(self) -> Factors:
        """Returns the same update with alpha above 0: its sign, or the zero that it makes of all, goes into B."""
        if self.alpha > 0:
            return self
        sign = -1 if self.alpha else 0
        bias = None if self.bias is None else self.bias * sign
        return replace(self, b=self.b * sign, bias=bias, alpha=-self.alpha or float(self.rank))


def alpha_for(scaling: float, rank: int, rslora: bool = False) -> float:
    """Returns the alpha whose alpha / rank (alpha / sqrt(rank) with rslora) is that scaling, to the last bit.

    The product scaling * rank is rounded, and dividing it again may miss by one unit in the last place; then one of
    its neighbours hits, but for scalings that no alpha gives.
    """
    root = math.sqrt(rank) if rslora else rank
    near = scaling * root
    for alpha in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if alpha / root == scaling:
            return alpha
    return near
