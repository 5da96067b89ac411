"""How the tensors of a site are read as matrices and written as tensors again, whatever kind of adapter it has."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Layout
from ..adapter_file import SiteRecord
from ..checkpoint.names import StandIn
from ..config import dtype_name
from ..errors import FormatError, LoraInjectError, UnsupportedError, did_you_mean
from ..formats.bundle import Shaped
from ..registry import by_kind
from .lowrank import LowRank

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Form(abc.ABC):
    """The shapes of one site.

    Attributes:
        weight: shape of the adapted weight.
        layout: names and shapes of the factors and biases at the site's rank; of the dense update where the kind has
            no factors.
    """

    weight: tuple[int, ...]
    layout: Layout

    whole = False
    """Whether the update is always stored as a full tensor."""

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of the biases in the order in which the input meets them, or ()."""
        return tuple(name for name in self.layout if name.endswith("_bias"))

    @property
    @abc.abstractmethod
    def outline(self) -> tuple[object, ...]:
        """What two sites have to share for their updates to add up: all shapes but the rank."""

    @abc.abstractmethod
    def fold(self, a: Tensor, b: Tensor) -> LowRank:
        """Returns stored factors as matrices."""

    @abc.abstractmethod
    def unfold(self, low: LowRank) -> tuple[Tensor, Tensor]:
        """Returns matrices of any rank as the tensors `lora_A` and `lora_B`."""

    @abc.abstractmethod
    def fold_dense(self, dense: Tensor) -> Tensor:
        """Returns the weight, or a dense update, as the matrix that B A is."""

    @abc.abstractmethod
    def unfold_dense(self, matrix: Tensor) -> Tensor:
        """Returns a matrix in the shape of the weight."""

    def total_bias(self, low: LowRank, first: Tensor, last: Tensor) -> Tensor:
        """Returns what the first bias adds to the output, through the factor that follows it, plus the last bias."""
        a, b = self.unfold(low)
        follows = b.flatten(2).sum(2) if b.dim() > 2 else b
        if self.biases[0] == "lora_B_bias":
            follows = a.flatten(1).mT
        through = follows @ first
        # Every group of a transposed convolution gets the same.
        return through.repeat(len(last) // len(through)) + last


@dataclass(frozen=True, eq=False)
class ModuleForm(Form):
    """A weight of a module: its first axis and `split` kernel axes belong to B, the others to A."""

    @property
    def split(self) -> int:
        """How many kernel axes belong to B; axes of size one may count on either side."""
        return max((axis + 1 for axis, size in enumerate(self.layout["lora_B"][2:]) if size > 1), default=0)

    @property
    def outline(self) -> tuple[object, ...]:
        a, b = self.layout["lora_A"], self.layout["lora_B"]
        return (self.weight, a[1:], (b[0], *b[2:]))

    def fold(self, a: Tensor, b: Tensor) -> LowRank:
        return LowRank(b.movedim(1, -1).reshape(-1, b.shape[1]), a.reshape(a.shape[0], -1))

    def unfold(self, low: LowRank) -> tuple[Tensor, Tensor]:
        rows, _, *axes = self.layout["lora_B"]
        b = low.b.reshape(rows, *axes, low.rank).movedim(-1, 1)
        return low.a.reshape(low.rank, *self.layout["lora_A"][1:]), b

    def fold_dense(self, dense: Tensor) -> Tensor:
        columns = math.prod(self.layout["lora_A"][1:])
        return dense.movedim(1, 1 + self.split).reshape(-1, columns)

    def unfold_dense(self, matrix: Tensor) -> Tensor:
        rows, columns, *kernel = self.weight
        moved = matrix.reshape(rows, *kernel[: self.split], columns, *kernel[self.split :])
        return moved.movedim(1 + self.split, 1)


@dataclass(frozen=True, eq=False)
class ParameterForm(Form):
    """A parameter that is a matrix, or a stack of matrices."""

    @property
    def outline(self) -> tuple[object, ...]:
        return (self.weight,)

    def fold(self, a: Tensor, b: Tensor) -> LowRank:
        return LowRank(b, a)

    def unfold(self, low: LowRank) -> tuple[Tensor, Tensor]:
        return low.a, low.b

    def fold_dense(self, dense: Tensor) -> Tensor:
        return dense

    def unfold_dense(self, matrix: Tensor) -> Tensor:
        return matrix


@dataclass(frozen=True, eq=False)
class WholeForm(Form):
    """A tensor of any shape that is stored whole; as a matrix, its first axis counts as rows."""

    whole = True

    @property
    def outline(self) -> tuple[object, ...]:
        return (self.weight,)

    def fold(self, a: Tensor, b: Tensor) -> LowRank:
        raise AssertionError("a whole update has no factors")

    def unfold(self, low: LowRank) -> tuple[Tensor, Tensor]:
        raise AssertionError("a whole update has no factors")

    def fold_dense(self, dense: Tensor) -> Tensor:
        return dense.reshape(math.prod(self.weight[:1]), -1)

    def unfold_dense(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.weight)


def make_form(kind: type[Adapter], record: SiteRecord, weight: tuple[int, ...], outputs: int | None) -> Form:
    """Returns the form of a site.

    Args:
        kind: the class of its adapter.
        record: its path, options and the rest.
        weight: shape of the adapted weight, () for a whole block.
        outputs: size of `lora_A_bias`, where there is one.

    Raises:
        LoraInjectError: shapes or options that contradict each other, or a kind whose updates do not add up.
    """
    if not kind.stacks:
        raise UnsupportedError(
            f"adapters of kind {record.kind!r} do not say that their updates add up by stacking factors: leave the "
            "site out, or set `stacks = True` in the class if they do"
        )
    layout = _layout(kind, record, weight, outputs, dense=False)
    if "lora_dense" in layout:
        return WholeForm(weight, layout)
    make = ParameterForm if "parameter" in record.extras else ModuleForm
    return make(weight or (layout["lora_B"][0], layout["lora_A"][1]), layout)


def _layout(
    kind: type[Adapter], record: SiteRecord, weight: tuple[int, ...], outputs: int | None, *, dense: bool
) -> Layout:
    """Returns what the class says of a stand-in for the module that has the shapes in the file."""
    host: Any = StandIn()
    # A file does not say how many groups a transposed convolution has: the size of its bias does.
    host.out_channels = outputs
    try:
        for name in kind.touches(record.extras)[:1]:
            host._parameters[name] = nn.Parameter(torch.empty(weight, device="meta"), requires_grad=False)
        return kind.layout(host, replace(record.config, dense=dense), record.extras)
    except LoraInjectError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise FormatError(f"kind {record.kind!r} cannot have a weight of shape {weight}: {error}") from error


def read_form(record: SiteRecord, entries: Mapping[str, Shaped]) -> Form:
    """Returns the form of a site of a file, every tensor of which it accounts for.

    Raises:
        LoraInjectError: shapes, dtypes or options that contradict each other; a kind whose updates do not add up.
    """
    kind, shape = by_kind(record.kind), record.base["shape"]
    _check_extras(kind, record)
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise FormatError(f"the shape of its weight, {str(shape)[:80]}, is no list of sizes")
    weight = tuple(shape)
    bias = entries.get("lora_A_bias")
    outputs = bias.shape[0] if bias is not None and bias.shape else None
    form = make_form(kind, record, weight, outputs)
    dense = record.config.dense and not form.whole
    _check_entries(record, _layout(kind, record, weight, outputs, dense=dense), entries)
    last = form.layout[form.biases[-1]][0] if form.biases else 0
    inner = form.layout["lora_A"][1] if form.biases and form.biases[0] == "lora_B_bias" else last
    if last % max(1, inner):
        raise FormatError(f"{form.biases[-1]} has {last} numbers, which {inner} columns of A do not divide")
    return form


def _check_extras(kind: type[Adapter], record: SiteRecord) -> None:
    odd = [name for name in record.extras if name not in kind.extras]
    if odd:
        raise FormatError(f"kind {record.kind!r} has no option {odd[0]!r}: {did_you_mean(odd[0], kind.extras)}")
    if not isinstance(record.extras.get("parameter", ""), str):
        raise FormatError(f"its parameter, {str(record.extras['parameter'])[:80]}, is no name")


def _check_entries(record: SiteRecord, layout: Layout, entries: Mapping[str, Shaped]) -> None:
    lines = [f"{name} is missing" for name in layout if name not in entries]
    for name, entry in entries.items():
        wanted = layout.get(name)
        if wanted is None:
            lines.append(f"{name} is unexpected")
        elif entry.shape != tuple(wanted):
            lines.append(f"{name} has shape {entry.shape}, its metadata ask for {tuple(wanted)}")
        elif entry.dtype != record.config.dtype:
            told = "none" if record.config.dtype is None else dtype_name(record.config.dtype)
            lines.append(f"{name} has dtype {dtype_name(entry.dtype)}, its metadata say {told}")
    if lines:
        raise FormatError("; ".join(lines))
