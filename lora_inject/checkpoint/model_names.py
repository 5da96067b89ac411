"""Names and weights as transformers would rename, split and fuse them while loading the checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..models import build_on_meta
from ..tree import walk
from .base import Base
from .names import Names, Piece

SOURCE = 40
"""Probes hold row numbers, and above this bit the number of the tensor that the row is from."""


@dataclass(frozen=True, slots=True)
class _Group:
    """The checkpoint tensors that one conversion of transformers joins, with the source pattern that each matched."""

    name: str
    converter: Any
    members: tuple[tuple[str, str], ...]

    def targets(self) -> list[str]:
        """Returns the names of all parameters that the conversion makes."""
        first, *rest = self.converter.target_patterns
        return [self.name, *(self.name.replace(first, other) for other in rest)]


class ModelNames(Names):
    """Names of the model that config.json describes, built on the meta device."""

    note = "names were found with the model that config.json describes"

    def __init__(self, base: Base) -> None:
        self.base = base
        self.model: Any = build_on_meta(str(base.folder))
        self.modules = {path: node.module for node in walk(self.model) for path in node.paths}
        self.shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}

    def module(self, path: str) -> nn.Module | None:
        return self.modules.get(self.own(path))

    def own(self, path: str) -> str:
        # As from_pretrained does: the model may be the body alone of the one that the adapter is for, or hold it.
        prefix = f"{self.model.base_model_prefix}."
        places = (path, path.removeprefix(prefix), prefix + path)
        return next((place for place in places if place in self.modules), path)

    def paths(self) -> list[str]:
        return list(self.modules)

    def shared(self, parameter: str) -> tuple[str, ...]:
        ties: dict[str, str] = self.model.all_tied_weights_keys
        source = ties.get(parameter, parameter)
        return (source, *(target for target, other in ties.items() if other == source))

    def stays_tied(self, parameter: str) -> bool:
        """Says whether the model ties the parameter even where its config says tie_word_embeddings = false."""
        config = self.model.config
        before, config.tie_word_embeddings = config.tie_word_embeddings, False
        try:
            ties = self.model.get_expanded_tied_weights_keys(all_submodels=True)
        finally:
            config.tie_word_embeddings = before
        return parameter in ties or parameter in ties.values()

    def pieces(self, parameter: str, axes: int) -> tuple[Piece, ...]:
        if parameter in self._renamed:
            key = self._renamed[parameter]
            found = self.base.tensors[key].entry.shape
            if found != self.shapes[parameter]:
                return ()
            return (Piece(key, 0, 0, math.prod(found[:axes])),)
        group = self._made.get(parameter)
        return () if group is None else _probe(group, parameter, axes, self)

    @cached_property
    def _groups(self) -> tuple[dict[str, str], list[_Group]]:
        return _sort_keys(self.base, self.model)

    @property
    def _renamed(self) -> dict[str, str]:
        return self._groups[0]

    @cached_property
    def _made(self) -> dict[str, _Group]:
        return {target: group for group in self._groups[1] for target in group.targets()}


def _sort_keys(base: Base, model: Any) -> tuple[dict[str, str], list[_Group]]:
    """Returns the checkpoint key of every parameter that is only renamed, and the groups that are converted."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    renamed: dict[str, str] = {}
    joined: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(base.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if pattern is None:
            renamed[name] = key
        else:
            joined.setdefault(name, []).append((key, pattern))
    groups = [_Group(name, by_pattern[members[0][1]], tuple(members)) for name, members in joined.items()]
    return renamed, groups


def _probe(group: _Group, parameter: str, axes: int, names: ModelNames) -> tuple[Piece, ...]:
    """Runs the model's own conversion on row numbers in place of weights, and reads off where each row came from."""
    converter, shape = copy.deepcopy(group.converter), names.shapes[parameter]
    for number, (key, pattern) in enumerate(group.members):
        rows = names.base.tensors[key].entry.shape[:-1]
        probe = torch.arange(math.prod(rows)).reshape(*rows, 1) + (number << SOURCE)
        converter.add_tensor(group.name, key, pattern, probe)
    try:
        made = converter.convert(group.name, model=names.model, config=names.model.config)
    except Exception as error:
        raise _refused(group, parameter, f"{type(error).__name__}: {error}") from error
    found = made.get(parameter)
    found = found[0] if isinstance(found, list) else found
    columns = {names.base.tensors[key].entry.shape[-1] for key, _ in group.members}
    if found is None or tuple(found.shape) != (*shape[:-1], 1) or columns != {shape[-1]} or axes != len(shape) - 1:
        raise _refused(group, parameter, "its rows are not rows of these tensors")
    return tuple(_runs(found.flatten(), [key for key, _ in group.members]))


def _runs(ids: Tensor, keys: list[str]) -> Iterator[Piece]:
    """Returns a piece for every run of consecutive rows of one tensor."""
    cuts = (torch.nonzero(ids[1:] != ids[:-1] + 1).flatten() + 1).tolist()
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        number, row = int(ids[start]) >> SOURCE, int(ids[start]) & ((1 << SOURCE) - 1)
        yield Piece(keys[number], row, start, stop)


def _refused(group: _Group, parameter: str, why: str) -> UnsupportedError:
    operations = ", ".join(type(step).__name__ for step in group.converter.operations)
    members = [key for key, _ in group.members]
    return UnsupportedError(
        f"{parameter}: transformers makes it from {members[0]} and {len(members) - 1} other tensors by {operations}, "
        f"which cannot be followed row by row ({why}): merge with via_model=True (--via-model)"
    )
