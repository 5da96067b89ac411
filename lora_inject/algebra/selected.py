"""Which parameters an extraction looks at: patterns, and the tensors of both checkpoints that hold them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..checkpoint.base import Base
from ..checkpoint.changes import STORED
from ..checkpoint.names import Names, Piece
from ..config import as_patterns, dtype_name
from ..errors import MismatchError, TargetError, UnsupportedError, listing
from ..targets import matcher, nearest_paths
from .parameters import Parameter, Place, find_names, parameters
from .weights import Weight


@dataclass(frozen=True, eq=False)
class Pair:
    """A parameter in both checkpoints, and the site that it is to get.

    Attributes:
        parameter: which one.
        before: where the base holds it.
        after: where the tuned checkpoint holds it.
        place: the site; None where it can only be listed.
        whole: whether it was asked for as a whole.
    """

    parameter: Parameter
    before: Weight
    after: Weight
    place: Place | None
    whole: bool


@dataclass(frozen=True, eq=False)
class Selected:
    """What to look at, and what not.

    Attributes:
        pairs: the parameters, in the order of the model.
        loose: keys of tensors, in both checkpoints, that belong to no parameter.
        note: how kinds were found.
    """

    pairs: tuple[Pair, ...]
    loose: tuple[str, ...]
    note: str


def select(base: Base, tuned: Base, targets: object, exclude: object, whole: object) -> Selected:
    """Returns the parameters that the patterns select, found in both checkpoints.

    Args:
        base: the checkpoint before.
        tuned: the checkpoint after.
        targets: patterns over the paths of modules and parameters; None selects everything.
        exclude: patterns that leave parameters out.
        whole: patterns of parameters that are stored whole.

    Raises:
        TargetError: a pattern that selects nothing.
        MismatchError: tensors that only one checkpoint has, or of different shapes; lists all of them.
    """
    names, note = find_names(base)
    other = names if tuned.tensors.keys() == base.tensors.keys() else find_names(tuned)[0]
    every = parameters(names, base)
    keys = base.tensors.keys() | tuned.tensors.keys()
    paths = sorted({path for parameter in every for path in _paths(parameter)} | keys | {_owner(key) for key in keys})
    wanted = None if targets is None else _Patterns(as_patterns(targets), paths)
    out, full = _Patterns(as_patterns(exclude), paths), _Patterns(as_patterns(whole), paths)
    finder, found = _Finder(base, names, tuned, other), []
    for parameter in every:
        if out.any(_paths(parameter)) or not (wanted is None or wanted.any(_paths(parameter))):
            finder.skip(parameter)
            continue
        is_whole = full.any(_paths(parameter))
        pair = finder.pair(parameter, parameter.whole if is_whole else parameter.place, is_whole)
        found += [pair] if pair else []
    loose = () if wanted else finder.loose(out)
    if finder.lines:
        raise MismatchError(
            f"{tuned.root}: {len(finder.lines)} tensors have no counterpart of the same shape in {base.root}, or the "
            f"other way round:\n{listing(finder.lines)}\nName the base that it was tuned from, or leave them out "
            "(exclude=, --exclude)."
        )
    return Selected(tuple(found), loose, note)


def _paths(parameter: Parameter) -> tuple[str, ...]:
    return (*parameter.owners, *parameter.paths)


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


class _Patterns:
    def __init__(self, patterns: Sequence[str], known: Sequence[str]) -> None:
        self.tests = [matcher(pattern) for pattern in patterns]
        for pattern, test in zip(patterns, self.tests, strict=True):
            if not any(map(test, known)):
                near = ", ".join(nearest_paths(pattern, known)) or "none"
                raise TargetError(f"pattern {pattern!r} selects nothing in the checkpoint (nearest: {near})")

    def any(self, paths: Iterable[str]) -> bool:
        """Says whether a pattern matches one of the paths."""
        return any(test(path) for path in paths for test in self.tests)


class _Finder:
    """Finds parameters in both checkpoints, and gathers what does not fit."""

    def __init__(self, base: Base, names: Names, tuned: Base, other: Names) -> None:
        self.sides = ((base, names), (tuned, other))
        self.used: set[str] = set()
        self.lines: list[str] = []

    def pair(self, parameter: Parameter, place: Place | None, whole: bool) -> Pair | None:
        """Returns the parameter with its tensors, or None where neither checkpoint holds it or it cannot be read."""
        axes = _axes(parameter, place, whole)
        before, after = (self._weight(base, names, parameter, axes) for base, names in self.sides)
        if before is None and after is None:
            self._note_misfit(parameter)
            return None
        if before is None or after is None:
            missing = self.sides[0 if before is None else 1][0].root
            self.lines.append(f"{parameter.paths[0]} {parameter.shape}: not in {missing}")
            return None
        wrong = _other_shapes(before, after)
        self.lines += wrong
        return None if wrong else Pair(parameter, before, after, place, whole)

    def skip(self, parameter: Parameter) -> None:
        """Accounts for the tensors of a parameter that is not wanted."""
        for _, names in self.sides:
            with contextlib.suppress(UnsupportedError):
                self.used |= {piece.key for piece in names.pieces(parameter.paths[0], min(1, len(parameter.shape)))}

    def _note_misfit(self, parameter: Parameter) -> None:
        """Notes a parameter that the checkpoints hold in another shape than its model has, if they do."""
        for base, _ in self.sides:
            for key in base.tensors.keys() & set(parameter.paths):
                shape = base.tensors[key].entry.shape
                self.lines.append(f"{key}: {shape} in {base.root}, {parameter.shape} in the model of its config.json")

    def _weight(self, base: Base, names: Names, parameter: Parameter, axes: int) -> Weight | None:
        pieces = self._pieces(names, parameter, axes)
        self.used |= {piece.key for piece in pieces}
        held = bool(pieces) and all(piece.key in base.tensors for piece in pieces)
        return Weight(base, parameter.shape, axes, pieces) if held else None

    def _pieces(self, names: Names, parameter: Parameter, axes: int) -> tuple[Piece, ...]:
        """Returns where a checkpoint holds the parameter, or what it is tied to."""
        path = parameter.paths[0]
        try:
            for name in (path, *names.shared(path)):
                found = names.pieces(name, axes)
                if found:
                    return found
        except UnsupportedError as error:
            raise UnsupportedError(f"{error}; or leave it out (exclude=, --exclude)") from error
        return ()

    def loose(self, out: _Patterns) -> tuple[str, ...]:
        """Returns the keys that no parameter uses, in both checkpoints, and notes those that only one has."""
        base, tuned = (side[0].tensors for side in self.sides)
        rest = [key for key in (base | tuned) if key not in self.used and not out.any((key, _owner(key)))]
        for key in rest:
            if key not in base or key not in tuned:
                self.lines.append(f"{key}: only in {(self.sides[0] if key in base else self.sides[1])[0].root}")
        return tuple(key for key in rest if key in base and key in tuned)


def _other_shapes(before: Weight, after: Weight) -> list[str]:
    """Returns a line for every tensor that both checkpoints have in different shapes."""
    shapes = [
        {piece.key: side.base.tensors[piece.key].entry.shape for piece in side.pieces} for side in (before, after)
    ]
    both = shapes[0].keys() & shapes[1].keys()
    return [f"{key}: {shapes[0][key]} became {shapes[1][key]}" for key in both if shapes[0][key] != shapes[1][key]]


def _axes(parameter: Parameter, place: Place | None, whole: bool) -> int:
    """Returns how many leading axes count as rows: two for a stack of matrices."""
    stack = not whole and place is not None and "parameter" in place.extras
    return min(len(parameter.shape), 2 if stack and len(parameter.shape) == 3 else 1)


def unreadable(pair: Pair) -> str:
    """Says why the difference of a pair cannot be formed, or returns an empty string."""
    odd = [weight.dtype for weight in (pair.before, pair.after) if weight.dtype not in STORED]
    return f"stored as {dtype_name(odd[0])}, of which no difference is formed" if odd else ""
