"""Adapter for linear layers whose weight is quantized, by torchao or bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..factored import ALL
from ..quantized import stored_weight
from ..registry import register
from .linear import LinearAdapter


@register
class QuantizedLinearAdapter(LinearAdapter):
    """y = base(x) + scaling * ((x A^T + a) B^T + b'): the module's own forward, and the low-rank path (QLoRA).

    Dettmers et al. 2023, arXiv:2305.14314, equation 5. The quantized weight has no room for an update, so that who
    reads it gets W; in files it is a `linear` adapter, and loads into the layer that the weight was quantized from.
    """

    kind = "quantized_linear"
    stored_as = "linear"
    readable = False

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """An `nn.Linear` or subclass whose weight is quantized already."""
        return stored_weight(module) is not None

    @classmethod
    def knows_forward(cls, module: nn.Module) -> bool:
        """True: the base's own forward runs, and reads the base."""
        return True

    @classmethod
    def shape(cls, module: nn.Module, extras: Mapping[str, Any]) -> tuple[int, ...]:
        """(out_features, in_features), however the weight is packed."""
        stored = stored_weight(module)
        assert stored is not None
        return stored.shape

    @classmethod
    def weight_dtype(cls, tensor: Tensor) -> torch.dtype:
        """The dtype that a weight of torchao stands for, else float32."""
        return tensor.dtype if tensor.is_floating_point() else torch.float32

    @staticmethod
    def base_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return host.lora_base.forward(host, *args, **kwargs)

    @classmethod
    def host_forward(cls, host: Any, live: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the base's output with every path added; nothing here can be fused."""
        return Adapter.host_forward.__func__(cls, host, live, *args, **kwargs)  # type: ignore[attr-defined]

    def unfold(self, host: Any, matrix: Tensor, rows: slice = ALL) -> Tensor:
        """Returns the product as it is."""
        return matrix

    def reading(self, host: Any, name: str) -> Tensor | None:
        """Returns None: the base's forward is among the readers."""
        return None
