"""From the module paths of adapters to the tensors of a checkpoint."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .base import Base
from .inputs import Input


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a base tensor that hold rows of a parameter; both have the same columns.

    Attributes:
        key: the tensor's name in the checkpoint.
        row: the tensor's first row.
        start: first row of the parameter.
        stop: row of the parameter behind the last.
    """

    key: str
    row: int
    start: int
    stop: int


class Names(abc.ABC):
    """What a checkpoint's tensors are called in the model that it belongs to."""

    note = ""
    """A line for the report on how names were found, empty for names that are equal."""

    @abc.abstractmethod
    def module(self, path: str) -> nn.Module | None:
        """Returns the module at a path, on the meta device, or None."""

    @abc.abstractmethod
    def own(self, path: str) -> str:
        """Returns the path that the model has for a module, where an adapter's differs by a prefix."""

    @abc.abstractmethod
    def paths(self) -> list[str]:
        """Returns the paths of all modules, for messages."""

    @abc.abstractmethod
    def pieces(self, parameter: str, axes: int) -> tuple[Piece, ...]:
        """Returns the tensors that hold the parameter, in the order of its rows; empty where none does.

        Args:
            parameter: its dotted path, that of its module as `own` gives it.
            axes: how many of its leading axes count as rows.

        Raises:
            UnsupportedError: the checkpoint holds it in a way that rows cannot describe.
        """

    @abc.abstractmethod
    def shared(self, parameter: str) -> tuple[str, ...]:
        """Returns all parameters that share their numbers with this one, the one that the file holds first."""


class StandIn(nn.Module):
    """What a header tells of a module: the shapes and dtypes of its parameters, on the meta device."""

    padding_idx = None
    max_norm = None


class HeaderNames(Names):
    """Names that are those of the headers, but for one prefix that all of them have more, or less."""

    def __init__(self, base: Base, add: str = "", drop: str = "") -> None:
        self.base, self.add, self.drop = base, add, drop
        if add or drop:
            self.note = f"module paths were found with the prefix {add!r}" if add else f"without the prefix {drop!r}"
        self.owners: dict[str, list[str]] = {}
        self.made: dict[str, StandIn] = {}
        for key in base.tensors:
            owner, _, name = key.rpartition(".")
            self.owners.setdefault(owner, []).append(name)

    def own(self, path: str) -> str:
        """Returns the path as the headers write it.

        What lies above the part of the model that the prefix is of, as a head does, has no prefix.
        """
        moved = self.add + path.removeprefix(self.drop)
        return path if moved not in self.owners and path in self.owners else moved

    def module(self, path: str) -> nn.Module | None:
        """Returns a stand-in with the parameters that the headers list for it."""
        owner = self.own(path)
        if owner not in self.owners:
            return None
        # One for all paths that lead there, as a model has one module.
        if owner not in self.made:
            made = self.made[owner] = StandIn()
            for name in self.owners[owner]:
                entry = self.base.tensors[f"{owner}.{name}" if owner else name].entry
                numbers = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
                made._parameters[name] = nn.Parameter(numbers, requires_grad=False)
        return self.made[owner]

    def paths(self) -> list[str]:
        return [self.drop + owner.removeprefix(self.add) for owner in self.owners]

    def pieces(self, parameter: str, axes: int) -> tuple[Piece, ...]:
        place = self.base.tensors.get(parameter)
        return () if place is None else (Piece(parameter, 0, 0, math.prod(place.entry.shape[:axes])),)

    def shared(self, parameter: str) -> tuple[str, ...]:
        return (parameter,)


def find_names(base: Base, inputs: Sequence[Input]) -> HeaderNames:
    """Returns the names under which the headers hold every adapted module, tried as they are and with one prefix.

    A prefix counts only if it is the only one and fits every site; otherwise names are taken as they are.
    """
    plain = HeaderNames(base)
    wanted = [_owners(entry) for entry in inputs]
    sites = [owners for group in wanted for owners in group]
    # The first paths come first: an alias may be that of a head, above a prefix that all others have.
    for places in ([owners[:1] for owners in sites], sites):
        if all(_any_known(owners, plain) for owners in places):
            return plain
        candidates = next(filter(None, (_candidates(base, owners) for owners in sites)), [])
        fitting = [names for names in candidates if all(_any_known(owners, names) for owners in places)]
        if len(fitting) == 1:
            return fitting[0]
    return plain


def _owners(entry: Input) -> list[tuple[str, ...]]:
    return [
        tuple(record.owner(path) for path in (record.path, *record.aliases)) for record in entry.file.sites.values()
    ]


def _any_known(owners: Iterable[str], names: HeaderNames) -> bool:
    return any(names.own(path) in names.owners for path in owners)


def _candidates(base: Base, owners: tuple[str, ...]) -> list[HeaderNames]:
    path = owners[0]
    known = HeaderNames(base).owners
    added = [owner.removesuffix(path) for owner in known if path and owner.endswith(f".{path}")]
    parts = path.split(".")
    dropped = [".".join(parts[:i]) + "." for i in range(1, len(parts)) if ".".join(parts[i:]) in known]
    return [HeaderNames(base, add=prefix) for prefix in added] + [HeaderNames(base, drop=prefix) for prefix in dropped]
