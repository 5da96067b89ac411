"""Packed experts of transformers, and the stacks of gate, up and down matrices that other programs split them into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import MismatchError, UnsupportedError
from .factors import Factors
from .pieces import cut, joined

FUSED = "gate_up_proj"
PIECES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Experts:
    """How a module of packed experts stores its matrices.

    Attributes:
        path: path of the module.
        shapes: shape (E, rows, columns) of each packed parameter.
        transposed: whether they are stored as (E, in, out).
        interleaved: whether gate and up take turns in `gate_up_proj`, instead of one half each.
    """

    path: str
    shapes: Mapping[str, tuple[int, ...]]
    transposed: bool
    interleaved: bool

    def split(self, one: Factors) -> dict[str, Factors]:
        """Returns the updates of the stacks that a packed parameter holds, by "gate_proj", "up_proj", "down_proj".

        Each has A (E, rank, in) and B (E, out, rank), and the path of its stack below that of the module.
        """
        upright = self._turned(one)
        if one.parameter != FUSED:
            return {str(one.parameter): upright}
        rows = upright.b.shape[-2]
        if self.interleaved:
            upright = replace(upright, b=torch.cat([upright.b[..., ::2, :], upright.b[..., 1::2, :]], -2))
        gate, up = cut(upright, [rows // 2, rows // 2])
        return {"gate_proj": gate, "up_proj": up}

    def join(self, stacks: Mapping[str, Factors], where: object) -> list[Factors]:
        """Returns the updates of the packed parameters from those of the stacks.

        Raises:
            MismatchError: a stack that the module does not hold, or one of another size.
        """
        left = dict(stacks)
        found: list[tuple[str, Factors]] = []
        if FUSED in self.shapes and ("gate_proj" in left or "up_proj" in left):
            found.append((FUSED, self._fused(left.pop("gate_proj", None), left.pop("up_proj", None), where)))
        found += [(name, self._checked(left.pop(name), name, where)) for name in list(left) if name in self.shapes]
        if left:
            raise MismatchError(
                f"{where}: {self.path}: the model's experts have no {', '.join(left)}: they hold "
                f"{', '.join(self.shapes)}"
            )
        return [self._turned(replace(one, path=self.path, parameter=name, kind="parameter")) for name, one in found]

    def _fused(self, gate: Factors | None, up: Factors | None, where: object) -> Factors:
        count, rows = self._upright(FUSED)[:2]
        halves = [None if one is None else self._checked(one, FUSED, where, 2) for one in (gate, up)]
        whole = joined(halves, [rows // 2, rows // 2])
        if not self.interleaved:
            return whole
        turns = whole.b.reshape(count, 2, rows // 2, -1).transpose(1, 2)
        return replace(whole, b=turns.reshape(count, rows, whole.b.shape[-1]))

    def _checked(self, one: Factors, name: str, where: object, parts: int = 1) -> Factors:
        count, rows, columns = self._upright(name)
        wanted = (count, rows // parts, columns)
        shape = (*one.b.shape[:-1], one.a.shape[-1])
        if shape != wanted or one.a.shape[0] != count:
            raise MismatchError(
                f"{where}: {self.path}: an update of experts of shape {shape} for {name}, where the model wants "
                f"{wanted}"
            )
        return one

    def _upright(self, name: str) -> tuple[int, ...]:
        count, rows, columns = self.shapes[name]
        return (count, columns, rows) if self.transposed else (count, rows, columns)

    def _turned(self, one: Factors) -> Factors:
        """Returns the update of the transposed matrices, where the module stores those."""
        return replace(one, a=one.b.mT, b=one.a.mT) if self.transposed else one


def experts_of(module: nn.Module, path: str) -> Experts:
    """Returns how a module packs its experts, as transformers says it.

    Raises:
        UnsupportedError: a module that does not say so, or packs them in another way.
    """
    said = [getattr(module, name, None) for name in ("is_transposed", "is_concatenated")]
    packed = {name: tuple(tensor.shape) for name, tensor in _tensors(module).items() if tensor.dim() == 3}
    if not all(isinstance(value, bool) for value in said) or not packed.keys() <= {FUSED, *PIECES}:
        raise UnsupportedError(
            f"{path}: {type(module).__name__} does not say how it packs its experts, so that they cannot be split into "
            "the matrices of the other program: leave these sites out, or keep the adapter in lora_inject's or PEFT's "
            "format"
        )
    return Experts(path, packed, bool(said[0]), not said[1])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False))
