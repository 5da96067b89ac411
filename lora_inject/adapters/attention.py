"""Adapters for `nn.MultiheadAttention`, whose weights are read and never called."""

from __future__ import annotations

from torch import nn

from ..registry import register
from .parameter import ParameterAdapter

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@register
class AttentionAdapter(ParameterAdapter):
    """One adapter for the packed input projection, or one each for q, k and v; `out_proj` is selected along with it.

    `out_proj` is an `nn.Linear` and has the adapter of one: the attention reads its weight, W + delta, once.
    """

    kind = "attention"

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """`nn.MultiheadAttention` and subclasses."""
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[str, ...]:
        """The packed projection, or the three separate ones."""
        return tuple(name for name in _PROJECTIONS if module._parameters.get(name) is not None)

    @classmethod
    def also(cls, module: nn.Module) -> tuple[str, ...]:
        """The output projection."""
        return ("out_proj",)

    @classmethod
    def can_adapt_parameter(cls, module: nn.Module, name: str) -> bool:
        """The input projections; bias_k and bias_v are no matrices."""
        return cls.can_adapt(module) and name in cls.parts(module)
