"""Adapters of single parameters: packed experts, attention projections, recurrent weights, any matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..adapter import Layout
from ..config import SiteConfig
from ..errors import UnsupportedError
from ..factored import ALL, FactoredAdapter
from ..host import base_tensor
from ..quantized import quantized_format
from ..registry import register
from ..rows import wide


@register
class ParameterAdapter(FactoredAdapter):
    """W + scaling * B A for one parameter W, whoever reads it: W (rows, columns), A (rank, columns), B (rows, rank).

    A parameter of three axes is a stack of matrices, as packed experts are: W (E, rows, columns) has A (E, rank,
    columns) and B (E, rows, rank), a low-rank pair per expert. It works in weight space, since such a parameter is
    read, not called.
    """

    kind = "parameter"
    extras = ("parameter",)

    def __init__(
        self,
        config: SiteConfig,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        extras: Mapping[str, Any],
    ) -> None:
        super().__init__(config, layout, dtype, device, extras)
        self.row_axes = len(next(iter(layout.values()))) - 1

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """No module as a whole."""
        return False

    @classmethod
    def can_adapt_parameter(cls, module: nn.Module, name: str) -> bool:
        """Every floating-point parameter of two or three axes that is not quantized.

        One that has no shape yet may become one: planning refuses it and says how.
        """
        tensor = base_tensor(module, name)
        if is_lazy(tensor):
            return True
        return tensor.dim() in (2, 3) and tensor.is_floating_point() and quantized_format(tensor) is None

    @classmethod
    def touches(cls, extras: Mapping[str, Any]) -> tuple[str, ...]:
        """The parameter alone."""
        return (extras["parameter"],)

    @classmethod
    def layout(cls, module: nn.Module, config: SiteConfig, extras: Mapping[str, Any]) -> Layout:
        """Returns the shapes of the factors.

        Raises:
            UnsupportedError: `bias=True`, since nothing says which bias belongs to the parameter.
        """
        if config.bias:
            raise UnsupportedError(
                "bias=True needs a bias that belongs to the weight, and nothing says which that is: use "
                f"Target({extras['parameter']!r} with its path, bias=False)"
            )
        return super().layout(module, config, extras)

    @classmethod
    def factors(cls, config: SiteConfig, weight: tuple[int, ...]) -> Layout:
        """A (..., rank, columns), B (..., rows, rank)."""
        *stack, rows, columns = weight
        return {"lora_A": (*stack, config.rank, columns), "lora_B": (*stack, rows, config.rank)}

    @classmethod
    def needs_host(cls, config: SiteConfig) -> bool:
        """False: the update is B A."""
        return False

    def matrix(self, rows: slice = ALL) -> Tensor:
        """Returns scaling * B A for every matrix of the stack, or the dense update; or the given rows of one matrix."""
        if self.is_dense:
            return wide(self.lora_dense if rows == ALL else self.lora_dense.flatten(0, -2)[rows]) * self.scaling
        if rows == ALL:
            return (wide(self.lora_B) * self.scaling) @ wide(self.lora_A)
        a = self.lora_A.flatten(0, -3)[rows.start // self.lora_B.shape[-2]] if self.lora_A.dim() > 2 else self.lora_A
        return (wide(self.lora_B.flatten(0, -2)[rows]) * self.scaling) @ wide(a)

    def unfold(self, host: Any, matrix: Tensor, rows: slice = ALL) -> Tensor:
        """Returns the matrices as they are."""
        return matrix

    def describe(self) -> dict[str, Any]:
        """Returns the name of the parameter."""
        return {"parameter": self.parameter}
