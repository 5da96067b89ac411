"""Weights that a module computes from other parameters: how to make them come out as another value, and to go back."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from .commit import Undo
from .errors import UnsupportedError
from .keeping import Kept, overwrite

Entry = tuple[dict[str, Any], str, str]
"""A tensor by the table that holds it, its name there, and its key in the state dict of the module."""


class Computed(abc.ABC):
    """The weight `key` of a module, which is no parameter of it."""

    def __init__(self, module: Any, key: str) -> None:
        self.module, self.key = module, key

    @abc.abstractmethod
    def entries(self) -> list[Entry]:
        """Returns the tensors that it is computed from, buffers included."""

    @abc.abstractmethod
    def owners(self) -> list[tuple[int, str]]:
        """Returns the id of its module and the name of every parameter that it is computed from."""

    @abc.abstractmethod
    def read(self) -> Tensor:
        """Returns the weight as it is computed now."""

    @abc.abstractmethod
    def invert(self, value: Tensor) -> Sequence[Tensor]:
        """Returns what the parameters have to be for the weight to be `value`, or as near as they can make it.

        Raises:
            UnsupportedError: there is no way from a value to the parameters.
        """

    def write(self, values: Sequence[Tensor]) -> None:
        """Writes the parameters in place."""
        parameters = [table[name] for table, name, _ in self.entries() if isinstance(table[name], nn.Parameter)]
        for parameter, value in zip(parameters, values, strict=True):
            if parameter.shape != value.shape:
                raise UnsupportedError(f"its parametrization gives {tuple(value.shape)} for {tuple(parameter.shape)}")
            overwrite(parameter, value)


class Parametrized(Computed):
    """By `torch.nn.utils.parametrize`: the weight is f(originals), and each f may have a `right_inverse`."""

    def __init__(self, module: Any, key: str) -> None:
        super().__init__(module, key)
        self.steps = module.parametrizations[key]

    def entries(self) -> list[Entry]:
        return [
            (table, name, ".".join(filter(None, ("parametrizations", self.key, path, name))))
            for path, part in self.steps.named_modules()
            for table in (part._parameters, part._buffers)
            for name in table
            if table[name] is not None and (table is part._buffers or part is self.steps)
        ]

    def owners(self) -> list[tuple[int, str]]:
        return [(id(self.steps), name) for name in self.steps._parameters]

    def read(self) -> Tensor:
        found: Tensor = self.steps()
        return found

    def invert(self, value: Tensor) -> Sequence[Tensor]:
        found: Any = value
        for step in reversed(list(self.steps)):
            if not hasattr(step, "right_inverse"):
                raise UnsupportedError(f"its parametrization {type(step).__name__} has no right_inverse")
            try:
                found = step.right_inverse(found)
            except Exception as error:
                raise UnsupportedError(f"right_inverse of {type(step).__name__} fails: {error}") from error
        return [found] if isinstance(found, Tensor) else list(found)


class Normed(Computed):
    """By the older `torch.nn.utils.weight_norm`: a hook sets W = g * v / |v| before each forward."""

    def __init__(self, module: Any, key: str, hook: Any) -> None:
        super().__init__(module, key)
        self.hook = hook

    def entries(self) -> list[Entry]:
        table = self.module._parameters
        return [(table, f"{self.key}{end}", f"{self.key}{end}") for end in ("_g", "_v")]

    def owners(self) -> list[tuple[int, str]]:
        return [(id(self.module), name) for _, name, _ in self.entries()]

    def read(self) -> Tensor:
        found: Tensor = self.hook.compute_weight(self.module)
        return found

    def invert(self, value: Tensor) -> Sequence[Tensor]:
        return [torch.norm_except_dim(value, 2, self.hook.dim), value]

    def write(self, values: Sequence[Tensor]) -> None:
        super().write(values)
        self.module.__dict__[self.key] = self.read()


def computed_weight(module: Any, key: str) -> Computed | None:
    """Returns how the module computes the weight, or None where it is unknown how."""
    steps = module._modules.get("parametrizations")
    if steps is not None and key in steps:
        return Parametrized(module, key)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == key:
            return Normed(module, key, hook)
    return None


class Rewritten(Kept):
    """Copies of all that the weight is computed from, and of the weight that came out."""

    def __init__(self, weight: Computed) -> None:
        self.weight = weight
        # Copies first: spectral_norm, while training, goes on with its buffers whenever the weight is read.
        self.copies = [table[name].detach().clone() for table, name, _ in weight.entries()]
        self.value = weight.read().detach().clone()
        self.plain = weight.module.__dict__.get(weight.key)

    def original(self, host: Any, key: str) -> Any:
        return self.value

    def restore(self, host: Any, key: str, undo: Undo) -> None:
        for (table, name, _), saved in zip(self.weight.entries(), self.copies, strict=True):
            undo(partial(overwrite, table[name], table[name].detach().clone()))
            overwrite(table[name], saved)
        if self.plain is not None:
            undo(partial(host.__dict__.__setitem__, key, host.__dict__[key]))
            host.__dict__[key] = self.plain

    def entries(self, key: str) -> list[str]:
        return [name for _, _, name in self.weight.entries()]

    @property
    def size(self) -> int:
        return sum(copy.nbytes for copy in (self.value, *self.copies))

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.value, self.copies = fn(self.value), [fn(copy) for copy in self.copies]
        if self.plain is not None:
            self.plain = fn(self.plain)
