"""Packed experts as PEFT stores them: the expert axis inside the rank, and which axis of the weight comes first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError, MismatchError, UnsupportedError
from ..host import base_tensor
from .factors import Factors

FLIPPED_IN = (0, 19)
"""The PEFT from which A meets the last axis of a parameter (E, out, in); before, always the second."""


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
    path: str, name: str, pair: tuple[Tensor, Tensor], module: nn.Module, version: tuple[int, int] | None, where: object
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
        UnsupportedError: a single expert in a layout in which PEFT adds the update untransposed.
    """
    shape = tuple(base_tensor(module, name).shape)
    a, b = pair
    site, sizes = f"{path}.{name}", (b.shape[0], a.shape[-1])
    if len(shape) == 2 and sizes == shape:
        return a, b
    count, *matrix = shape if len(shape) == 3 else (1, *shape)
    straight, turned = sizes == tuple(matrix), sizes == tuple(matrix[::-1])
    fits = turned if in_first(module) else straight or turned
    if len(shape) != 3 or not fits or a.shape[0] % count:
        raise MismatchError(f"{where}: {site}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit {shape}")
    flipped = _flipped(site, module, straight and turned, turned, version, where)
    stack = unpack(a, b, count)
    if not flipped:
        return stack
    _check_single(site, count)
    return stack[1].mT, stack[0].mT


def _flipped(
    site: str, module: nn.Module, square: bool, turned: bool, version: tuple[int, int] | None, where: object
) -> bool:
    """Says whether the pair makes the update of (E, in, out)."""
    if in_first(module) or not square:
        return turned
    if version is None:
        raise FormatError(
            f"{where}: {site}: its matrices are square, PEFT {FLIPPED_IN[0]}.{FLIPPED_IN[1]} turned the order of their "
            "axes, and the config has no peft_version: add the version of PEFT that trained the adapter"
        )
    return version < FLIPPED_IN


def _check_single(site: str, count: int) -> None:
    if count == 1:
        raise UnsupportedError(
            f"{site}: a single expert stored as (1, in, out): PEFT adds the update of such a parameter untransposed"
        )
