"""Adapter for `nn.Bilinear`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Layout
from ..config import SiteConfig
from ..factored import FactoredAdapter
from ..host import base_class
from ..registry import register
from ..rows import wide


@register
class BilinearAdapter(FactoredAdapter):
    """y = x1^T W x2 + b + scaling * (B (x1^T A x2 + a) + b'): A (rank, in1_features, in2_features), B (out, rank)."""

    kind = "bilinear"
    portable = False

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """`nn.Bilinear` and subclasses."""
        return isinstance(module, nn.Bilinear)

    @classmethod
    def knows_forward(cls, module: nn.Module) -> bool:
        """True where neither the forward nor the access to the weight is a subclass's own."""
        plain = {"weight", "bias"} <= module._parameters.keys()
        return plain and base_class(module).forward is nn.Bilinear.forward  # type: ignore[attr-defined]

    @classmethod
    def factors(cls, config: SiteConfig, weight: tuple[int, ...]) -> Layout:
        """A (rank, in1_features, in2_features), B (out_features, rank)."""
        rows, *columns = weight
        return {
            "lora_A": (config.rank, *columns),
            "lora_B": (rows, config.rank),
            "lora_A_bias": (config.rank,),
            "lora_B_bias": (rows,),
        }

    @classmethod
    def needs_host(cls, config: SiteConfig) -> bool:
        """False: the update is B A."""
        return False

    @staticmethod
    def base_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        """x1^T W x2 + b."""
        return _bilinear(host, *args, **kwargs)

    def update(self, host: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Adds scaling times the low-rank path, computed in the inputs' dtype."""
        x1, x2 = (*args, *kwargs.values())
        x1 = self.drop(x1)
        last = self.cast("lora_B_bias", x1)
        if self.is_dense:
            rows = F.bilinear(x1, x2, self.lora_dense.to(x1.dtype), last)
        else:
            inner = F.bilinear(x1, x2, self.lora_A.to(x1.dtype), self.cast("lora_A_bias", x1))
            rows = F.linear(inner, self.lora_B.to(x1.dtype), last)
        return output + rows.to(output.dtype) * self.strength

    def bias_delta(self, host: Any) -> Tensor | None:
        """B a + b'."""
        last: Any = self._parameters.get("lora_B_bias")
        if last is None:
            return None
        first: Any = self._parameters.get("lora_A_bias")
        return wide(last) if first is None else wide(self.lora_B) @ wide(first) + wide(last)


def _bilinear(host: Any, input1: Tensor, input2: Tensor) -> Tensor:
    return F.bilinear(input1, input2, host._parameters["weight"], host._parameters["bias"])
