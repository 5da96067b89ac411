"""Adapter for a whole block: a low-rank path from the input of any module to its output."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, Layout
from ..config import SiteConfig
from ..errors import ConfigError, UnsupportedError
from ..registry import register
from ..tree import INNER


@register
class BlockAdapter(Adapter):
    """y = block(x) + scaling * ((x A^T + a) B^T + b): A (rank, in_features), B (out_features, rank).

    For any module that maps one tensor to one tensor with the same leading axes. There is no weight that the update
    could be merged into: a nonlinear block plus a linear path is not a block of that kind.
    """

    kind = "block"
    extras = ("in_features", "out_features", "example")
    on_request = True
    mergeable = False
    readable = False
    stacks = True
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """Any module, where a target asks for it."""
        return True

    @classmethod
    def knows_forward(cls, module: nn.Module) -> bool:
        """True: the block's own forward runs as it is."""
        return True

    @classmethod
    def shape(cls, module: nn.Module, extras: Mapping[str, Any]) -> tuple[int, ...]:
        """A block has no single weight."""
        return ()

    @classmethod
    def layout(cls, module: nn.Module, config: SiteConfig, extras: Mapping[str, Any]) -> Layout:
        """Returns the shapes of the factors from the given sizes, or from a run of a copy on the example input.

        Raises:
            UnsupportedError: no sizes and no example, or an example that the block does not map to a tensor.
        """
        if "example" in extras:
            columns, rows = _measure(module, extras["example"])
        elif "in_features" in extras and "out_features" in extras:
            columns, rows = (_size(name, extras[name]) for name in ("in_features", "out_features"))
        else:
            raise UnsupportedError("a block needs its sizes: give in_features and out_features, or example=a tensor")
        shapes: Layout = {"lora_A": (config.rank, columns), "lora_B": (rows, config.rank)}
        return shapes | ({"lora_A_bias": (config.rank,), "lora_B_bias": (rows,)} if config.bias else {})

    @classmethod
    def members(cls, base: type) -> dict[str, Any]:
        """For torch's containers, whose forward may walk what they contain: their ways to do so, adapters left out."""
        kind = next((known for known in _WALKS if issubclass(base, known)), None)
        walks = {} if kind is None else _WALKS[kind]
        return {name: walk for name, walk in walks.items() if getattr(base, name) is getattr(kind, name)}

    @staticmethod
    def base_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward."""
        return host.lora_base.forward(host, *args, **kwargs)

    def update(self, host: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Adds scaling times the low-rank path, computed in the input's dtype.

        Raises:
            UnsupportedError: the block gave something else than a tensor of the path's shape.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        if self.config.dropout:
            x = F.dropout(x, self.config.dropout, self.training)
        first, second = self._parameters.get("lora_A_bias"), self._parameters.get("lora_B_bias")
        inner = F.linear(x, self.lora_A.to(x.dtype), None if first is None else first.to(x.dtype))
        path = F.linear(inner, self.lora_B.to(x.dtype), None if second is None else second.to(x.dtype))
        if not isinstance(output, Tensor) or not (output.is_nested or output.shape == path.shape):
            raise _unfit(host, output, path)
        return output + path.to(output.dtype) * (self.scaling * self.factor)

    def describe(self) -> dict[str, Any]:
        """Returns the sizes of the block's input and output."""
        return {"in_features": self.lora_A.shape[1], "out_features": self.lora_B.shape[0]}

    def delta(self, host: Any) -> dict[str, Tensor]:
        """Returns {}: no parameter of the block is updated."""
        return {}


def _unfit(host: Any, output: Any, path: Tensor) -> UnsupportedError:
    """Returns the error of an output to which the path cannot be added: torch would broadcast where it can."""
    found = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    return UnsupportedError(
        f"{host.lora_base.__name__} returned {found}, and its low-rank path one of shape {tuple(path.shape)}: a block "
        "adapter serves blocks that map one tensor to one with the same leading axes; adapt the modules inside it"
    )


def _size(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1")
    return value


def _contents(host: Any) -> dict[str, nn.Module]:
    return {name: child for name, child in host._modules.items() if name != INNER}


def _steps(host: Any) -> Iterator[nn.Module]:
    return iter(_contents(host).values())


def _count(host: Any) -> int:
    return len(host._modules) - 1


def _item(host: Any, index: Any) -> Any:
    if isinstance(index, slice):
        # A slice of the host itself would be a host without adapters.
        if isinstance(host, nn.Sequential):
            return nn.Sequential(OrderedDict(_contents(host)))[index]
        return nn.ModuleList(_contents(host).values())[index]
    return list(_contents(host).values())[index]


_LIST = {"__iter__": _steps, "__len__": _count, "__getitem__": _item}
_WALKS: dict[type, dict[str, Any]] = {
    nn.Sequential: _LIST,
    nn.ModuleList: _LIST,
    nn.ModuleDict: {
        "__iter__": lambda host: iter(_contents(host)),
        "__len__": _count,
        "keys": lambda host: _contents(host).keys(),
        "items": lambda host: _contents(host).items(),
        "values": lambda host: _contents(host).values(),
    },
}


@torch.no_grad()
def _measure(module: nn.Module, example: Any) -> tuple[int, int]:
    with torch.random.fork_rng():
        try:
            output = copy.deepcopy(module).eval()(example)
        except Exception as error:
            raise UnsupportedError(f"the block fails on the example input: {error}") from error
    if not isinstance(output, Tensor) or output.shape[:-1] != example.shape[:-1]:
        found = f"{tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedError(
            f"the block maps {tuple(example.shape)} to {found}: only tensor to tensor with equal leading axes will do"
        )
    return example.shape[-1], output.shape[-1]
