"""What a merge keeps of the original weight, so that unmerge can give its bits back."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .commit import Undo
from .errors import StateError
from .quantized import Stored

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRIME = 0x9E3779B97F4A7C15 >> 2
"""A number whose multiples spread over all bits (from the golden ratio's fraction)."""


def bits(tensor: Tensor) -> Tensor:
    """Returns the tensor's elements as integers of the same size, so that equal means bit-identical."""
    return tensor.view(_BITS[tensor.element_size()])


def checksum(blocks: Iterable[Tensor]) -> int:
    """Returns a 64-bit sum over elements and positions of a tensor's blocks, in any dtype, on any device."""
    total, position = 0, 0
    for block in blocks:
        flat = bits(block.contiguous()).reshape(-1).to(torch.int64)
        place = torch.arange(position, position + flat.numel(), dtype=torch.int64, device=flat.device)
        # The factor is odd, so that modulo 2^64 no single change of an element can vanish.
        total += int((flat * (place * (2 * _PRIME) + 1)).sum())
        position += flat.numel()
    return total % 2**64


def overlaps(tensor: Tensor) -> bool:
    """Says whether elements may lie at the same place in memory, as those of an expanded tensor do."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


class Kept(abc.ABC):
    """The way back from one merged parameter of a host."""

    @abc.abstractmethod
    def original(self, host: Any, key: str) -> Any:
        """Returns the original tensor, or None where the host had none; changes nothing.

        Raises:
            StateError: it cannot be had, or not be proven.
        """

    @abc.abstractmethod
    def restore(self, host: Any, key: str, undo: Undo) -> None:
        """Gives the parameter its original bits; `undo` takes the way back to the merged ones."""

    def entries(self, key: str) -> list[str]:
        """Returns the keys in the module's state dict that must not be loaded while the original waits here."""
        return [key]

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """How many bytes are held beside the weights and the factors."""

    def secured(self, host: Any, key: str) -> Kept:
        """Returns a way back that survives a cast or a move of the host to another device."""
        return self

    @abc.abstractmethod
    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Takes what is held along when the host is cast or moved."""


class Replaced(Kept):
    """The host has another Parameter while merged: it was shared, or is stored wider, or there was none at all."""

    def __init__(self, parameter: nn.Parameter | None) -> None:
        self.parameter = parameter

    def original(self, host: Any, key: str) -> Any:
        return self.parameter

    def restore(self, host: Any, key: str, undo: Undo) -> None:
        undo(partial(host._parameters.__setitem__, key, host._parameters[key]))
        host._parameters[key] = self.parameter

    @property
    def size(self) -> int:
        return 0 if self.parameter is None else self.parameter.nbytes

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.parameter is not None:
            self.parameter.data = fn(self.parameter.data)


class Requantized(Replaced):
    """The host has another quantized weight while merged; the original waits as it was, all that describes it too."""

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored.weight)
        self.stored = stored
        self.beside = [(holder, name, getattr(holder, name, None)) for holder, name in stored.beside()]

    def original(self, host: Any, key: str) -> Any:
        return self.stored.dequantized()

    def restore(self, host: Any, key: str, undo: Undo) -> None:
        super().restore(host, key, undo)
        for holder, name, value in self.beside:
            undo(partial(setattr, holder, name, getattr(holder, name, None)))
            setattr(holder, name, value)

    @property
    def size(self) -> int:
        return self.stored.size

    def secured(self, host: Any, key: str) -> Kept:
        raise StateError(
            "an update is merged into a quantized weight, which cannot be cast or moved along with its original: "
            "call lora_inject.unmerge(model) first"
        )


class Through(Kept):
    """The parameter is another host's too, which has merged the same update into it and goes back for both."""

    def __init__(self, leader: Any, key: str) -> None:
        self.leader, self.key = leader, key

    def original(self, host: Any, key: str) -> Any:
        return self._way.original(self.leader, self.key)

    def restore(self, host: Any, key: str, undo: Undo) -> None:
        return

    @property
    def size(self) -> int:
        return 0

    def secured(self, host: Any, key: str) -> Kept:
        self.leader.adapters.kept[self.key] = self._way.secured(self.leader, self.key)
        return self

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        return

    @property
    def _way(self) -> Kept:
        found: Kept = self.leader.adapters.kept[self.key]
        return found


class Copy(Kept):
    """A copy of the original."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def original(self, host: Any, key: str) -> Any:
        return self.tensor

    def restore(self, host: Any, key: str, undo: Undo) -> None:
        current = host._parameters[key]
        undo(partial(overwrite, current, current.detach().clone()))
        overwrite(current, self.tensor)

    @property
    def size(self) -> int:
        return self.tensor.nbytes

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.tensor = fn(self.tensor)


class Nothing(Kept):
    """No way back: the merge was asked to keep nothing."""

    def original(self, host: Any, key: str) -> Any:
        raise StateError('merged with keep="nothing", so the original weights are gone: load the base anew')

    def restore(self, host: Any, key: str, undo: Undo) -> None:
        self.original(host, key)

    @property
    def size(self) -> int:
        return 0

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        return


@torch.no_grad()
def overwrite(target: Tensor, value: Tensor) -> None:
    """Copies a value into a tensor in place."""
    target.copy_(value)
