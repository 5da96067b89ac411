"""Which base tensors change: the parameters that updates reach, their rows in the checkpoint, and what is untied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..config import dtype_name
from ..errors import MismatchError, UnsupportedError
from .base import Base, Place
from .model_names import ModelNames
from .names import Names, Piece
from .updates import Update

STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes in which a weight can be merged."""
TIE = "tie_word_embeddings"


@dataclass(frozen=True, eq=False)
class Change:
    """One parameter of the model that updates reach.

    Attributes:
        path: its dotted path in the model.
        name: its name in its module.
        shape: its shape.
        axes: how many leading axes count as rows.
        updates: what is added to it, in order.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    axes: int
    updates: tuple[Update, ...]

    @property
    def columns(self) -> int:
        """How many elements a row has."""
        return math.prod(self.shape[self.axes :])


@dataclass(frozen=True, eq=False)
class Target:
    """One tensor of the output that is not a copy of the base's tensor of that name.

    Attributes:
        key: its name.
        place: the base tensor that it starts from; None for a new bias, which starts from zero.
        dtype: the dtype in which it is written.
        shape: its shape.
        parts: the changes that reach it and the rows that each of them covers.
        untied: whether it shared the numbers of another tensor before.
        shard: number of the base's shard that it goes to.
    """

    key: str
    place: Place | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[Change, Piece], ...]
    untied: bool
    shard: int


class _Collector:
    def __init__(self, base: Base, names: Names, dtype: torch.dtype | None, changes: Sequence[Change]) -> None:
        self.base, self.names, self.dtype = base, names, dtype
        self.changes = {change.path: change.updates for change in changes}
        self.parts: dict[str, list[tuple[Change, Piece]]] = {}
        self.new: dict[str, Target] = {}
        self.numbers = {id(header): number for number, header in enumerate(base.shards)}
        self.untied: set[str] = set()

    def add(self, change: Change) -> None:
        """Finds the tensors of one change."""
        group = self.names.shared(change.path)
        if len(group) > 1 and not self._together(change, group):
            self._untie(change, group)
            return
        pieces = self.names.pieces(change.path, change.axes)
        if not pieces and any(self.names.pieces(name, change.axes) for name in group):
            return
        if not pieces:
            self._create(change)
        for piece in pieces:
            self.parts.setdefault(piece.key, []).append((change, piece))

    def _together(self, change: Change, group: tuple[str, ...]) -> bool:
        """Says whether all parameters of a tied group get the same updates, those of adapters that they share."""
        wanted = [(update.input, update.record) for update in change.updates]
        return all([(update.input, update.record) for update in self.changes.get(name, ())] == wanted for name in group)

    def _untie(self, change: Change, group: tuple[str, ...]) -> None:
        """Gives every parameter of a tied group a tensor of its own."""
        held = {name: self.names.pieces(name, change.axes) for name in group}
        holder = next((name for name in group if held[name]), None)
        if holder is None or len(held[holder]) != 1:
            raise MismatchError(f"{change.path}: the base holds no tensor for it, nor for {', '.join(group)}")
        if isinstance(self.names, ModelNames) and self.names.stays_tied(change.path):
            raise UnsupportedError(
                f"{change.path}: the model ties it to {', '.join(n for n in group if n != change.path)} whatever its "
                "config says, so one of them cannot change alone: leave that site out of the adapter"
            )
        place = self.base.tensors[held[holder][0].key]
        self.untied |= set(group)
        for name in group:
            own = held[name]
            if not own and name not in self.new:
                self._append(name, place, (), True)
            if name == change.path:
                key = own[0].key if own else name
                piece = Piece(key, 0, 0, held[holder][0].stop)
                self.parts.setdefault(key, []).append((change, piece))

    def _append(self, key: str, place: Place, parts: tuple[tuple[Change, Piece], ...], untied: bool) -> None:
        shard = self.numbers[id(place.header)]
        self.new[key] = Target(key, place, place.entry.dtype, place.entry.shape, parts, untied, shard)

    def _create(self, change: Change) -> None:
        """Adds a bias that the base does not have, beside its weight."""
        weight = f"{change.path.removesuffix(change.name)}{change.updates[0].weight_name}"
        pieces = self.names.pieces(weight, 1)
        if not pieces or change.name == change.updates[0].weight_name:
            raise MismatchError(f"{change.path}: the base holds no tensor for it that its rows could be added to")
        if self.base.config is not None:
            raise UnsupportedError(
                f"{change.path}: the adapter has biases and the base has none there, which from_pretrained would drop "
                "without a word: merge in memory, or train the adapter with bias=False"
            )
        place = self.base.tensors[pieces[0].key]
        key = f"{pieces[0].key.removesuffix(change.updates[0].weight_name)}{change.name}"
        shard, dtype = self.numbers[id(place.header)], self.dtype or place.entry.dtype
        self.parts[key] = [(change, Piece(key, 0, 0, change.shape[0]))]
        self.new[key] = Target(key, None, dtype, change.shape, (), False, shard)

    def targets(self) -> list[Target]:
        """Returns the tensors that differ from the base's, new ones last."""
        found = []
        for key, parts in self.parts.items():
            if key not in self.new:
                place = self.base.tensors[key]
                shard, untied = self.numbers[id(place.header)], bool({c.path for c, _ in parts} & self.untied)
                dtype = self.dtype or place.entry.dtype
                found.append(Target(key, place, dtype, place.entry.shape, tuple(parts), untied, shard))
        for key, target in self.new.items():
            parts = self.parts.get(key, [])
            dtype = (self.dtype or target.dtype) if parts else target.dtype
            new = Target(key, target.place, dtype, target.shape, tuple(parts), target.untied, target.shard)
            found.append(new)
        for target in found:
            _check_dtype(target)
        return [self._kept(target) for target in found]

    def _kept(self, target: Target) -> Target:
        """Returns the target in the base's dtype where only some of its rows change."""
        if not target.parts or target.place is None or not uncovered(target):
            return target
        return replace(target, dtype=target.place.entry.dtype)


def uncovered(target: Target) -> list[tuple[int, int]]:
    """Returns the runs of rows (first, behind last) of a changed tensor that no change reaches."""
    rows = math.prod(target.shape) // max(1, target.parts[0][0].columns)
    taken = sorted((piece.row, piece.row + piece.stop - piece.start) for _, piece in target.parts)
    gaps, position = [], 0
    for start, stop in taken:
        if start > position:
            gaps.append((position, start))
        position = max(position, stop)
    return [*gaps, (position, rows)] if position < rows else gaps


def _check_dtype(target: Target) -> None:
    stored = None if target.place is None else target.place.entry.dtype
    if target.parts and stored is not None and stored not in STORED:
        raise UnsupportedError(
            f"{target.key}: is stored as {dtype_name(stored)}, in which nothing can be merged: use the base that "
            "it was quantized from, or keep the adapter unmerged"
        )


def find_targets(
    base: Base, names: Names, updates: Sequence[Update], dtype: torch.dtype | None
) -> tuple[list[Target], list[str]]:
    """Returns the tensors of the output that differ from the base's, and the parameters that are untied.

    Args:
        base: the checkpoint.
        names: how its tensors are called in the model.
        updates: all updates in order.
        dtype: the dtype in which adapted tensors are written; None keeps the base's.

    Raises:
        MismatchError: a parameter that the base holds no tensor for.
        UnsupportedError: quantized tensors, biases that from_pretrained would drop, ties that cannot be undone, or
            tensors that are packed in another way than by rows.
    """
    reached: dict[tuple[str, str], list[Update]] = {}
    for update in updates:
        for name in update.names:
            reached.setdefault((update.path, name), []).append(update)
    changes = [_change(path, name, group) for (path, name), group in reached.items()]
    collector = _Collector(base, names, dtype, changes)
    for change in changes:
        collector.add(change)
    return collector.targets(), sorted(collector.untied)


def _change(path: str, name: str, group: list[Update]) -> Change:
    first = group[0]
    known = first.host._parameters.get(name)
    shape = tuple(known.shape) if known is not None else (first.outputs,)
    axes = max(update.row_axes if name == update.weight_name else 1 for update in group)
    return Change(f"{path}.{name}" if path else name, name, shape, axes, tuple(group))
