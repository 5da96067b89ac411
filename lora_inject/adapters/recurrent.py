"""Adapters for `nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..host import base_tensor
from ..registry import register
from .parameter import ParameterAdapter


def _read(host: Any) -> list[Tensor | None]:
    return [getattr(host, name, None) for name in host._flat_weights_names]


def _write(host: Any, value: object) -> None:
    # torch rebuilds this list from the attributes, which are sums while adapters act: keep the parameters.
    host.__dict__["_flat_weights"] = [base_tensor(host, name) for name in host._flat_weights_names]


_FLAT = property(_read, _write)


@register
class RecurrentAdapter(ParameterAdapter):
    """One adapter for each weight matrix: input-hidden, hidden-hidden and projection, per layer and direction.

    The recurrent kernels take a list of weights that torch keeps beside the parameters; on a host it is a view.
    """

    kind = "recurrent"

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """Every recurrent network."""
        return isinstance(module, nn.RNNBase)

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[str, ...]:
        """All weight matrices."""
        return tuple(name for name, p in module._parameters.items() if p is not None and p.dim() == 2)

    @classmethod
    def can_adapt_parameter(cls, module: nn.Module, name: str) -> bool:
        """The weight matrices."""
        return cls.can_adapt(module) and name in cls.parts(module)

    @classmethod
    def members(cls, base: type) -> dict[str, Any]:
        """For recurrent networks: the list of weights as a view."""
        return {"_flat_weights": _FLAT} if issubclass(base, nn.RNNBase) else {}

    @classmethod
    def settle(cls, module: nn.Module) -> None:
        """Fills the list with the parameters that the module has now."""
        _write(module, None)


@register
class CellAdapter(ParameterAdapter):
    """One adapter each for the input-hidden and the hidden-hidden weight of a cell."""

    kind = "recurrent_cell"

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """Every recurrent cell."""
        return isinstance(module, nn.RNNCellBase)

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[str, ...]:
        """weight_ih and weight_hh."""
        return ("weight_ih", "weight_hh")

    @classmethod
    def can_adapt_parameter(cls, module: nn.Module, name: str) -> bool:
        """weight_ih and weight_hh."""
        return cls.can_adapt(module) and name in cls.parts(module)
