"""Adapter that trains one parameter as a whole: a norm's weight, a bias, a new head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter, Layout
from ..config import SiteConfig
from ..errors import UnsupportedError
from ..host import base_tensor
from ..quantized import quantized_format
from ..registry import register
from ..rows import wide


@register
class FullAdapter(Adapter):
    """W + scaling * D for one parameter W of any shape: `lora_dense` D has the shape of W and starts as zero.

    What PEFT calls modules_to_save, as an update: it can be merged, scaled, switched off and taken out like any
    other. Rank, dropout and bias mean nothing to it; the rank only enters scaling = alpha / rank, 1 by default.
    """

    kind = "full"
    on_request = True
    extras = ("parameter",)
    stacks = True

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """No module as a whole."""
        return False

    @classmethod
    def can_adapt_parameter(cls, module: nn.Module, name: str) -> bool:
        """Every floating-point parameter that is not quantized."""
        tensor = base_tensor(module, name)
        return isinstance(tensor, Tensor) and tensor.is_floating_point() and quantized_format(tensor) is None

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[str, ...]:
        """All parameters of the module itself, its children's left out."""
        return tuple(module._parameters)

    @classmethod
    def touches(cls, extras: Mapping[str, Any]) -> tuple[str, ...]:
        """The parameter alone."""
        return (extras["parameter"],)

    @classmethod
    def shape(cls, module: nn.Module, extras: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of the parameter."""
        return tuple(base_tensor(module, extras["parameter"]).shape)

    @classmethod
    def layout(cls, module: nn.Module, config: SiteConfig, extras: Mapping[str, Any]) -> Layout:
        """Returns the shape of the parameter.

        Raises:
            UnsupportedError: a single number, which has no rows to merge.
        """
        shape = cls.shape(module, extras)
        if not shape:
            raise UnsupportedError(f"{extras['parameter']} is a single number: train it without an adapter")
        return {"lora_dense": shape}

    @classmethod
    def needs_host(cls, config: SiteConfig) -> bool:
        """False: the update is D."""
        return False

    def delta(self, host: Any) -> dict[str, Tensor]:
        """Returns {parameter: scaling * D}."""
        return {self.updates[0]: wide(self._parameters["lora_dense"]) * self.scaling}  # type: ignore[arg-type]

    def delta_names(self, host: Any) -> tuple[str, ...]:
        """The parameter."""
        return self.updates

    def describe(self) -> dict[str, Any]:
        """Returns the name of the parameter."""
        return {"parameter": self.parameter}
