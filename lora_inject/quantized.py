"""Weights that are stored quantized by torchao or bitsandbytes: what they stand for, and how to store others so.

Neither library is imported: a weight of its classes is there only where the library is.
"""

from __future__ import annotations

import abc
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedError

Away = Callable[[str], Tensor]
"""Gives the tensors of a module that is offloaded, by their names in it."""


class Stored(abc.ABC):
    """The quantized weight of a linear layer as it is now: W (out_features, in_features) and how it is held."""

    def __init__(self, module: Any, away: Away | None = None) -> None:
        self.module = module
        self.weight: Any = module._parameters["weight"] if away is None else away("weight")

    @property
    def format(self) -> str:
        """What the library calls it."""
        return type(self.weight).__name__

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of W."""
        return self.module.out_features, self.module.in_features

    @abc.abstractmethod
    def dequantized(self) -> Tensor:
        """Returns W in float32."""

    @abc.abstractmethod
    def requantized(self, weight: Tensor) -> nn.Parameter:
        """Returns a Parameter that stores another W, (out_features, in_features) in float32, in the same format.

        Raises:
            UnsupportedError: the format's options cannot be read off the stored weight.
        """

    @abc.abstractmethod
    def parts(self) -> Iterator[Tensor]:
        """Yields the tensors that hold it."""

    def beside(self) -> list[tuple[Any, str]]:
        """Returns the attributes outside the Parameter that describe it too, each by its object and name."""
        return []

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return sum(part.nbytes for part in self.parts())


class TorchAO(Stored):
    """A tensor subclass of torchao in a plain `nn.Linear`."""

    def dequantized(self) -> Tensor:
        return self.weight.dequantize().float()  # type: ignore[no-any-return]

    def requantized(self, weight: Tensor) -> nn.Parameter:
        old, kind, wanted = self.weight, self.format, weight.to(self.weight.dtype)
        block = tuple(old.block_size) if hasattr(old, "block_size") else ()
        if kind == "Int8Tensor" and old.act_quant_kwargs is None and block in ((1, self.shape[1]), self.shape):
            ways = sys.modules["torchao.quantization.granularity"]
            whole = block == self.shape
            made = type(old).from_hp(wanted, ways.PerTensor() if whole else ways.PerRow(dim=-1))
        elif kind == "IntxUnpackedToInt8Tensor" and old.activation_quantization is None:
            mappings = sys.modules["torchao.quantization.quant_primitives"].MappingType
            mapping = mappings.ASYMMETRIC if old.zero_point.any() else mappings.SYMMETRIC
            made = type(old).from_hp(wanted, block, old.target_dtype, mapping_type=mapping)
        else:
            raise UnsupportedError(f"its format {kind} cannot be written anew with the options that it has")
        return nn.Parameter(made, requires_grad=False)

    def parts(self) -> Iterator[Tensor]:
        for name in self.weight.__tensor_flatten__()[0]:
            yield getattr(self.weight, name)


class Int8(Stored):
    """`Linear8bitLt` of bitsandbytes: W = CB * SCB / 127, a scale per row. Its first forward moves both elsewhere."""

    def __init__(self, module: Any, away: Away | None = None) -> None:
        super().__init__(module, away)
        if away is not None:
            self.scale = away("SCB")
        else:
            self.scale = self.weight.SCB if self.weight.SCB is not None else module.state.SCB

    def dequantized(self) -> Tensor:
        return self.weight.data.float() * (self.scale.float()[:, None] / 127)  # type: ignore[no-any-return]

    def requantized(self, weight: Tensor) -> nn.Parameter:
        made = type(self.weight)(weight, requires_grad=False, has_fp16_weights=False)
        return made.to(self.weight.device)  # type: ignore[no-any-return]

    def parts(self) -> Iterator[Tensor]:
        yield from (self.weight.data, self.scale)

    def beside(self) -> list[tuple[Any, str]]:
        return [(holder, name) for holder in (self.module.state, self.weight) for name in ("CB", "SCB")]


class Int4(Stored):
    """`Linear4bit` of bitsandbytes: packed, with a table of values and scales per block in `quant_state`."""

    def __init__(self, module: Any, away: Away | None = None) -> None:
        super().__init__(module, away)
        if away is not None:
            raise UnsupportedError(
                "its weight was quantized to 4 bits by bitsandbytes and offloaded by accelerate, which does not bring "
                "the scales back: keep this layer on a device"
            )
        self.state = self.weight.quant_state

    def dequantized(self) -> Tensor:
        packed, state = self.weight.data, self.state
        library = sys.modules["bitsandbytes.functional"]
        if _repacked(self.weight):
            # The library's way back changes the state that it is given, and leaves the scales as its kernel wants them.
            scales = state.absmax.T.reshape(-1).float()
            state = copy.copy(state)
            state.original_nested = False
            packed, state = library._convert_weight_packed_for_cpu_inverse(packed, state)
            state.absmax = scales
        return library.dequantize_4bit(packed, state).float()  # type: ignore[no-any-return]

    def requantized(self, weight: Tensor) -> nn.Parameter:
        old = self.weight
        options = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type")}
        wanted = weight.to(self.state.original_dtype if _repacked(old) else self.state.dtype)
        made = type(old)(wanted, requires_grad=False, quant_storage=old.quant_storage, module=old.module, **options)
        return made.to(old.device)  # type: ignore[no-any-return]

    def parts(self) -> Iterator[Tensor]:
        yield self.weight.data
        yield from self.state.as_dict(packed=True).values()

    def beside(self) -> list[tuple[Any, str]]:
        return [(self.module, "quant_state")]


_BITSANDBYTES: dict[str, type[Stored]] = {"Int8Params": Int8, "Params4bit": Int4}


def stored_weight(module: nn.Module, away: Away | None = None) -> Stored | None:
    """Returns how the weight of a linear layer is quantized, or None where it is not.

    Args:
        module: any module.
        away: gives its tensors where it is offloaded and its own are on the meta device.

    Raises:
        UnsupportedError: it is offloaded in a way that loses what its numbers are made from.
    """
    name = quantized_format(module._parameters.get("weight")) if isinstance(module, nn.Linear) else None
    return None if name is None else _BITSANDBYTES.get(name, TorchAO)(module, away)


def quantized_format(weight: Any) -> str | None:
    """Returns the class of a tensor that torchao or bitsandbytes has quantized, or None for any other."""
    if type(weight) in (nn.Parameter, torch.Tensor, type(None)):
        return None
    library, name = type(weight).__module__.partition(".")[0], type(weight).__name__
    if library == "torchao" and hasattr(weight, "dequantize"):
        return name
    codes = (torch.int8, weight.__dict__.get("quant_storage"), torch.uint8 if _repacked(weight) else None)
    is_packed = library == "bitsandbytes" and weight.dtype in codes
    return name if is_packed and name in _BITSANDBYTES else None


def _repacked(weight: Any) -> bool:
    """Says whether bitsandbytes has packed a 4-bit weight anew, in bytes whatever it was stored in.

    On some processors the first forward in eval() does so, for a kernel in bfloat16.
    """
    return getattr(weight.__dict__.get("quant_state"), "packing_format_for_cpu", False)
