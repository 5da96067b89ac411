"""Which weights an update can be added to: parameters that hold numbers, here and now."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .adapter import Adapter
from .config import DTYPES, dtype_name
from .errors import UnsupportedError
from .host import base_class, base_tensor
from .quantized import quantized_format
from .tree import Node

FLOATS = frozenset(DTYPES.values())
"""Dtypes of weights that an update can be added to."""


def weight_of(node: Node, adapter_class: type[Adapter], names: tuple[str, ...]) -> tuple[torch.dtype, torch.device]:
    """Returns dtype and device of the adapted weight; where the module runs, if it is offloaded.

    Args:
        node: the module.
        adapter_class: the class that is to serve it.
        names: the parameters that it updates, the weight first; none for a block.

    Raises:
        UnsupportedError: no update can be added to the weight; says why and what to do.
    """
    module = node.module
    tensor: Any = base_tensor(module, names[0]) if names else _sample(module)
    if tensor is None and not names:
        return torch.get_default_dtype(), torch.get_default_device()
    if tensor is None:
        raise UnsupportedError(f"{base_class(module).__name__} has no parameter {names[0]!r}")
    dtype = adapter_class.weight_dtype(tensor)
    if not names and dtype not in FLOATS:
        dtype = torch.get_default_dtype()
    why = why_not(tensor, dtype, adapter_class.readable)
    if why:
        raise UnsupportedError(why)
    away = node.away.device if node.away is not None and tensor.is_meta else None
    return dtype, away or tensor.device


def _sample(block: nn.Module) -> Any:
    """Returns the parameter of a block that dtype and device are taken from, best one that cannot be served at all."""
    found = list(block.parameters())
    special = [one for one in found if is_lazy(one) or hasattr(one, "device_mesh")]
    return next(iter([*special, *(one for one in found if one.dtype in FLOATS), *found]), None)


def why_not(tensor: Any, dtype: torch.dtype, readable: bool = True) -> str:
    """Says why no update can be added to a parameter, and what to do, or returns an empty string.

    Args:
        tensor: the parameter.
        dtype: that of the numbers that it stands for.
        readable: whether who reads the parameter must get W + delta.
    """
    if type(tensor) is not nn.Parameter:
        if is_lazy(tensor):
            return "its weight has no shape yet: run the model once on real input, then inject"
        if hasattr(tensor, "device_mesh"):
            return (
                "its weight is a DTensor (sharded already): inject first, then call fully_shard or parallelize_module"
            )
        name = quantized_format(tensor) if readable else None
        if name is not None:
            return (
                f"its weight is quantized ({name}), which has no room for an update of its own: select the linear "
                "layer itself, without adapter=, for a low-rank pair beside it; dequantize any other; or exclude it"
            )
    if dtype not in FLOATS:
        return (
            f"its weight has dtype {dtype_name(dtype)}: only floating-point weights of 16 bits or more can be adapted, "
            "since others are codes of numbers: dequantize it, or exclude it"
        )
    return ""
