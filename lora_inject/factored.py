"""Adapters whose update is one low-rank product: Delta W = scaling * B A, rows of W in B, columns in A."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Adapter, Layout
from .config import SiteConfig
from .host import base_tensor
from .rows import Rows, wide

ALL = slice(None)


class FactoredAdapter(Adapter, abc.ABC):
    """One factored update of the parameter `weight` (Hu et al. 2021, arXiv:2106.09685, equation 3).

    Delta W = scaling * B A, where W is seen as a matrix (rows, columns), `lora_B` as (rows, rank) and `lora_A` as
    (rank, columns). With `bias=True` the first factor that the input meets has a bias and the second too. With
    `dense=True` and a rank that would need as many numbers as W, `lora_dense` holds Delta W / scaling itself.
    """

    updates: tuple[str, ...] = ("weight", "bias")
    transposed: ClassVar[bool] = False
    """Whether the weight is stored as (in, out), so that the input meets B before A."""
    portable: ClassVar[bool] = True
    """Whether other programs know low-rank pairs for what this class serves."""
    is_product: ClassVar[bool] = False
    """Whether the weight is a matrix and its update `matrix` itself, so that one call can multiply and add."""
    stacks = True
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_dense: nn.Parameter

    @classmethod
    @abc.abstractmethod
    def factors(cls, config: SiteConfig, weight: tuple[int, ...]) -> Layout:
        """Returns the shapes of `lora_A`, `lora_B`, and of the biases in the order in which the input meets them."""

    @classmethod
    def shape(cls, module: nn.Module, extras: Mapping[str, Any]) -> tuple[int, ...]:
        """Returns the shape of the weight as it is stored."""
        return tuple(base_tensor(module, cls.touches(extras)[0]).shape)

    @classmethod
    def layout(cls, module: nn.Module, config: SiteConfig, extras: Mapping[str, Any]) -> Layout:
        """Returns the shapes of the factors, or of the dense update that takes their place."""
        weight = cls.shape(module, extras)
        shapes = cls.factors(config, weight)
        if not config.bias:
            shapes = {"lora_A": shapes["lora_A"], "lora_B": shapes["lora_B"]}
        if config.dense and math.prod(shapes["lora_A"]) + math.prod(shapes["lora_B"]) >= math.prod(weight):
            last = list(shapes)[-1]
            shapes = {"lora_dense": weight} | ({last: shapes[last]} if config.bias else {})
        return shapes

    def matrix(self, rows: slice = ALL) -> Tensor:
        """Returns scaling * B A as (rows, columns), or the dense update, in float32 or wider; of the given rows only.

        B takes the scaling, having fewer numbers than the product.
        """
        if self.is_dense:
            return wide(self.lora_dense[rows]) * self.scaling
        b, a = self.product(rows)
        return b @ a

    def product(self, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """Returns what `matrix` multiplies: scaling * B, of the given rows, and A as (rank, columns)."""
        a, b = wide(self.lora_A), wide(self.lora_B[rows]) * self.scaling
        return b, a if a.dim() == 2 else a.flatten(1)

    def unfold(self, host: Any, matrix: Tensor, rows: slice = ALL) -> Tensor:
        """Returns the product, or the dense update, in the shape of the weight, or of the given rows of it."""
        shape = base_tensor(host, self.updates[0]).shape
        return matrix if len(shape) == 2 else matrix.reshape(matrix.shape[0], *shape[1:])

    def bias_delta(self, host: Any) -> Tensor | None:
        """Returns the update of the host's bias before scaling, or None without `bias=True`."""
        return None

    @property
    def is_dense(self) -> bool:
        """Whether one full-size update takes the place of the factors."""
        return "lora_dense" in self._parameters

    def delta(self, host: Any) -> dict[str, Tensor]:
        """Returns {"weight": scaling * B A} and, with `bias=True`, the update of "bias"."""
        return {name: self.delta_rows(host, name)(ALL) for name in self.delta_names(host)}

    def delta_names(self, host: Any) -> tuple[str, ...]:
        """Returns the weight's name and, with `bias=True` where the host can have one, the bias's."""
        return self.updates if self.config.bias else self.updates[:1]

    def delta_rows(self, host: Any, name: str) -> Rows:
        """Returns what gives the rows of one update from the rows of B alone."""
        if self.is_product and name == self.updates[0] and not self.is_dense:
            return _Product(self)
        device = next(self.parameters()).device.type

        def give(rows: slice) -> Tensor:
            with _as_they_are(device):
                if name == self.updates[0]:
                    return self.unfold(host, self.matrix(rows), rows)
                bias = self.bias_delta(host)
                assert bias is not None
                return bias[rows] * self.scaling

        return Rows(give)

    def bound(self, name: str) -> float:
        """Of the weight's update, by the inequality of Cauchy and Schwarz: its elements are inner products.

        Each is a sum of products of elements of B with elements of A, so that no one exceeds the product of the norms.
        """
        if name != self.updates[0]:
            return math.inf
        factors = [self.lora_dense] if self.is_dense else [self.lora_A, self.lora_B]
        return abs(self.scaling) * math.prod(
            float(torch.linalg.vector_norm(wide(factor.detach()))) for factor in factors
        )

    def reading(self, host: Any, name: str) -> Tensor | None:
        """Returns the update of one parameter; while training with dropout, with whole columns of A dropped."""
        update = self.delta(host).get(name)
        if update is None or name != self.updates[0] or not (self.training and self.config.dropout):
            return update
        # One mask for all tokens: the reader has the weight alone, not the input that dropout would meet.
        return update * F.dropout(torch.ones_like(update[:1]), self.config.dropout)

    def drop(self, x: Tensor) -> Tensor:
        """Returns the input of the low-rank path after dropout."""
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def cast(self, name: str, x: Tensor) -> Tensor | None:
        """Returns one of the biases in the dtype of the input, or None where there is none."""
        bias = self._parameters.get(name)
        return None if bias is None else bias.to(x.dtype)

    @property
    def strength(self) -> float:
        """The scaling, times the factor of the open `scaled` contexts."""
        return self.scaling * self.factor


def added(output: Tensor, update: Tensor) -> Tensor:
    """Returns output + update, in the strides of the output.

    A sum gives axes of size 1 the strides of a contiguous tensor, a convolution in channels-last does not. What reads
    the output next picks its kernel by the strides, so that even an update of zero would change bits.
    """
    found = output + update
    sizes = zip(output.shape, output.stride(), found.stride(), strict=True)
    moved = [size for size, wanted, got in sizes if wanted != got]
    return found.as_strided(output.shape, output.stride()) if moved and max(moved) == 1 else found


class _Product(Rows):
    """Rows of scaling * B A."""

    def __init__(self, adapter: FactoredAdapter) -> None:
        self.adapter, self.device = adapter, next(adapter.parameters()).device.type
        super().__init__(adapter.matrix)

    def __call__(self, rows: slice) -> Tensor:
        with _as_they_are(self.device):
            return super().__call__(rows)

    def write(self, original: Tensor, rows: slice, out: Tensor) -> Tensor:
        """Multiplies and adds in one pass over a half-precision weight.

        A wider one takes the finished product, since the library may add its terms to the weight one by one: each
        addition rounds, in float32 far below what the half keeps, but to a wider weight it would be another rounding.
        """
        b, a = self.adapter.product(rows)
        if original.dtype.itemsize > 2 or out.dtype.itemsize > 2 or a.dtype != torch.float32:
            return super().write(original, rows, out)
        with _as_they_are(self.device):
            summed = original.float().contiguous().addmm_(b, a)
        out.copy_(summed)
        return summed


def _as_they_are(device: str) -> AbstractContextManager[None]:
    """Under autocast the product would be rounded to half precision before it is added."""
    # Entering it costs more than small products do, and merging asks for thousands of them.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
