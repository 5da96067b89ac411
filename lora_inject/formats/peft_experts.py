"""Packed experts as PEFT stores them: the expert axis inside the rank, and which axis of the weight comes first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError, MismatchError, UnsupportedError
from ..host import base_tensor
from .factors import Factors

Version = tuple[int, int, int]
ODD = (0, 19, 0)
"""The one PEFT that took `is_transposed` the wrong way round: before it, A always met the second axis of a parameter
(E, ., .), after it the last one, but for modules that say `is_transposed`."""


def pack(factors: Factors) -> tuple[Tensor, Tensor]:
    """Returns A (E * rank, in) and B (out, rank * E) of a stack A (E, rank, in), B (E, out, rank)."""
    if not factors.stacked:
        return factors.a, factors.b
    return factors.a.flatten(0, 1), factors.b.permute(1, 2, 0).flatten(1)


def unpack(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns what `pack` made A and B from, for a count of experts."""
    return a.reshape(count, -1, a.shape[-1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1)


def mirrored(factors: Factors) -> Factors:
    """Returns the update of the transposed matrices."""
    return replace(factors, a=factors.b.mT, b=factors.a.mT)


def in_first(module: nn.Module) -> bool:
    """Says whether a module stores its matrices as (E, in, out), the way in which PEFT asks for it."""
    return bool(getattr(module, "is_transposed", False))


def order(module: nn.Module, names: Mapping[str, Any] | list[str]) -> list[str]:
    """Returns those names in the order of PEFT's wrappers, the outermost first: the last parameter of the module."""
    return [name for name in reversed(module._parameters) if name in names]


def to_peft(factors: Factors, module: nn.Module) -> Factors:
    """Returns the update of a parameter as PEFT orients it in a module.

    Raises:
        UnsupportedError: a single expert in a layout in which PEFT adds the update untransposed.
    """
    if not factors.stacked or not in_first(module):
        return factors
    _check_single(factors.site, factors.a.shape[0])
    return mirrored(factors)


def from_peft(
    path: str, name: str, pair: tuple[Tensor, Tensor], module: nn.Module, version: Version | None, where: object
) -> tuple[Tensor, Tensor]:
    """Returns A and B by rows and columns of the stored parameter.

    Args:
        path: path of the module.
        name: name of the parameter.
        pair: A (E * rank, in) and B (out, rank * E).
        module: the module that has the parameter.
        version: the PEFT that wrote the pair, where it is known.
        where: the file, for messages.

    Raises:
        MismatchError: the pair does not fit the parameter.
        FormatError: a square parameter, and nothing says which axis comes first.
    """
    shape = tuple(base_tensor(module, name).shape)
    a, b = pair
    count, *matrix = shape if len(shape) == 3 else (1, *shape)
    sizes = [b.shape[0], a.shape[-1]]
    # A single matrix gets B A as it is, in every PEFT.
    straight, turned = sizes == matrix, sizes == matrix[::-1] and count > 1
    if len(shape) not in (2, 3) or not (straight or turned) or a.shape[0] % count:
        raise MismatchError(f"{where}: {path}.{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit {shape}")
    if len(shape) == 2:
        return a, b
    stack = unpack(a, b, count)
    flipped = _flipped(f"{path}.{name}", module, version, where) if straight and turned else turned
    return (stack[1].mT, stack[0].mT) if flipped else stack


def _flipped(site: str, module: nn.Module, version: Version | None, where: object) -> bool:
    """Says whether the pair of square matrices makes the update of (E, in, out)."""
    if version is not None:
        return version < ODD or in_first(module) == (version > ODD)
    if in_first(module):
        return True
    raise FormatError(
        f"{where}: {site}: its matrices are square, PEFT turned the order of their axes after {_text(ODD)}, and the "
        "config has no peft_version: add the version of PEFT that trained the adapter"
    )


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def _check_single(site: str, count: int) -> None:
    if count == 1:
        raise UnsupportedError(
            f"{site}: a single expert stored as (1, in, out): PEFT adds the update of such a parameter untransposed"
        )
