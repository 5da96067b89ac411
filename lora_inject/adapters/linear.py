"""Adapters for linear layers: `nn.Linear` with every subclass, and the `Conv1D` of transformers."""

from __future__ import annotations

import abc
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Layout
from ..config import SiteConfig
from ..factored import FactoredAdapter
from ..fused import can_fuse, fused_linear
from ..host import base_class
from ..quantized import stored_weight
from ..registry import register
from ..rows import wide


class MatrixAdapter(FactoredAdapter, abc.ABC):
    """A factored update of a two-dimensional weight that multiplies the last axis of the input."""

    is_product = True

    @abc.abstractmethod
    def stages(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Returns weight (rank, in), bias (rank), weight (out, rank), bias (out) in the order the input meets them."""

    @abc.abstractmethod
    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Returns the dense update as (out, in), and its bias (out)."""

    @classmethod
    def needs_host(cls, config: SiteConfig) -> bool:
        """False: the update is B A, or its transpose's factors as they are."""
        return False

    @classmethod
    def host_forward(cls, host: Any, live: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the output by one fused function where that computes the same, else by the parts."""
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        weight, bias = host._parameters["weight"], host._parameters["bias"]
        if not live or not can_fuse(x, weight, bias):
            return super().host_forward(host, live, *args, **kwargs)
        factors: list[Tensor] = []
        for adapter in live:
            if not adapter.fuses(len(live)):
                return super().host_forward(host, live, *args, **kwargs)
            factors += adapter.met()
        scales = tuple([adapter.strength for adapter in live])
        dropout = live[0].config.dropout if live[0].training else 0.0
        return fused_linear(x, weight, bias, scales, factors, transposed=cls.transposed, dropout=dropout)

    def fuses(self, count: int) -> bool:
        """Says whether the fused function covers this adapter's options, beside `count` - 1 others."""
        dropped = self.config.dropout > 0 and self.training
        return not self.config.bias and not self.is_dense and (count == 1 or not dropped)

    def met(self) -> tuple[Tensor, Tensor]:
        """Returns the stored factors in the order in which the input meets them."""
        # Past nn.Module's __getattr__, which takes longer than a small product.
        a, b = self._parameters["lora_A"], self._parameters["lora_B"]
        return (b, a) if self.transposed else (a, b)  # type: ignore[return-value]

    def update(self, host: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Adds scaling times the low-rank path, computed in the input's dtype."""
        x = args[0] if args else next(iter(kwargs.values()))
        return output + self.path(self.drop(x)).to(output.dtype)

    def path(self, x: Tensor) -> Tensor:
        """Returns the low-rank path's output (..., out), scale included, for an input (..., in)."""
        if self.is_dense:
            weight, bias = self.dense()
            return F.linear(x, weight.to(x.dtype), _cast(bias, x)) * self.strength
        first, first_bias, second, second_bias = self.stages()
        inner = F.linear(x, first.to(x.dtype), _cast(first_bias, x))
        if second_bias is None:
            # Scaling the small product saves a pass over the large one.
            return F.linear(inner * self.strength, second.to(x.dtype))
        return F.linear(inner, second.to(x.dtype), _cast(second_bias, x)) * self.strength

    def bias_delta(self, host: Any) -> Tensor | None:
        """W2 b1 + b2."""
        if not self.config.bias:
            return None
        if self.is_dense:
            bias = self.dense()[1]
            return None if bias is None else wide(bias)
        _, first_bias, second, second_bias = self.stages()
        assert first_bias is not None and second_bias is not None
        return wide(second) @ wide(first_bias) + wide(second_bias)


def _cast(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


@register
class LinearAdapter(MatrixAdapter):
    """y = x W^T + b + scaling * ((x A^T + a) B^T + b'): A (rank, in_features), B (out_features, rank).

    Hu et al. 2021, arXiv:2106.09685, equation 3. Biases: `lora_A_bias` (rank), `lora_B_bias` (out_features).
    """

    kind = "linear"

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """Every `nn.Linear` and subclass whose weight is no quantized one."""
        return isinstance(module, nn.Linear) and stored_weight(module) is None

    @classmethod
    def knows_forward(cls, module: nn.Module) -> bool:
        """True where neither the forward nor the access to the weight is a subclass's own."""
        plain = {"weight", "bias"} <= module._parameters.keys()
        return plain and base_class(module).forward is nn.Linear.forward  # type: ignore[attr-defined]

    @classmethod
    def factors(cls, config: SiteConfig, weight: tuple[int, ...]) -> Layout:
        """A (rank, in_features), B (out_features, rank)."""
        rows, columns = weight
        return {
            "lora_A": (config.rank, columns),
            "lora_B": (rows, config.rank),
            "lora_A_bias": (config.rank,),
            "lora_B_bias": (rows,),
        }

    @staticmethod
    def base_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        """X W^T + b."""
        return _linear(host, *args, **kwargs)

    def stages(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """A, its bias, B, its bias."""
        biases = self._parameters
        return self.lora_A, biases.get("lora_A_bias"), self.lora_B, biases.get("lora_B_bias")

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The update as it is stored."""
        return self.lora_dense, self._parameters.get("lora_B_bias")


def _linear(host: Any, input: Tensor) -> Tensor:
    return F.linear(input, host._parameters["weight"], host._parameters["bias"])


@register
class Conv1DAdapter(MatrixAdapter):
    """y = x W + b + scaling * x B A for the transposed linear of GPT-2: B (in_features, rank), A (rank, out_features).

    Biases: `lora_B_bias` (rank) follows B, which the input meets first; `lora_A_bias` (out_features) follows A.
    """

    kind = "transposed_linear"
    transposed = True

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """Transformers' `Conv1D` and subclasses, known by where it is defined: transformers need not be imported."""
        return _conv1d_class(base_class(module)) is not None

    @classmethod
    def knows_forward(cls, module: nn.Module) -> bool:
        """True where neither the forward nor the access to the weight is a subclass's own."""
        base = base_class(module)
        plain = {"weight", "bias"} <= module._parameters.keys()
        return plain and base.forward is _conv1d_class(base).forward  # type: ignore[attr-defined, union-attr]

    @classmethod
    def factors(cls, config: SiteConfig, weight: tuple[int, ...]) -> Layout:
        """A (rank, out_features), B (in_features, rank)."""
        rows, columns = weight
        return {
            "lora_A": (config.rank, columns),
            "lora_B": (rows, config.rank),
            "lora_B_bias": (config.rank,),
            "lora_A_bias": (columns,),
        }

    @staticmethod
    def base_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        """X W + b."""
        return _transposed_linear(host, *args, **kwargs)

    def stages(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """B^T, its bias, A^T, its bias."""
        biases = self._parameters
        return self.lora_B.t(), biases.get("lora_B_bias"), self.lora_A.t(), biases.get("lora_A_bias")

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The stored update, transposed."""
        return self.lora_dense.t(), self._parameters.get("lora_A_bias")


def _conv1d_class(base: type) -> type | None:
    # Where nothing has imported its file, there is no such class yet.
    known = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return known if known is not None and issubclass(base, known) else None


def _transposed_linear(host: Any, x: Tensor) -> Tensor:
    weight, bias = host._parameters["weight"], host._parameters["bias"]
    flat = x.view(-1, x.size(-1))
    return torch.addmm(bias, flat, weight).view(*x.shape[:-1], weight.shape[1])
