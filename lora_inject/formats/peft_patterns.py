"""PEFT's rules for names: which pattern belongs to a module, and which modules a list of targets means."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Generic, TypeVar

from ..errors import FormatError

T = TypeVar("T")
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\(\?|.", re.DOTALL)
_LETTER = re.compile(r"\\[.-]|[\w.-]", re.ASCII)
_NAME = re.compile(rf"(?:{_LETTER.pattern})+", re.ASCII)
_PATIENCE = 0.5
"""Seconds that matching the patterns of one config may take."""
_MOST = 4000
"""How many expressions one config may have beside names: no program writes as many, and each is compiled."""
_KINDS = 256
"""How many ways of having dots names of one length may have."""
_STEPS = 10**6
"""How many ways of matching a name a pattern may have, by a coarse count."""


class Patterns(Generic[T]):
    """Values by regular expression, looked up as PEFT does: the first that matches the end of a path wins.

    An expression must match the whole path, or all of it behind some dot. They come from strangers: those that could
    keep the regex engine busy for ages are refused.
    """

    def __init__(self, values: Mapping[str, T], where: str) -> None:
        self._where = where
        # Patterns for one path each, as they are written here, are looked up: an adapter may have thousands.
        single = {n: re.sub(r"\\(.)", r"\1", key[1:]) for n, key in enumerate(values) if key.startswith("^")}
        self._values, keys = list(values.values()), list(values)
        self._single = {path: n for n, path in single.items() if anchored(path) == keys[n]}
        known = set(self._single.values())
        self._names = _Names({key: n for n, key in enumerate(values) if n not in known and _NAME.fullmatch(key)})
        rest = [(n, key) for n, key in enumerate(values) if n not in known and not _NAME.fullmatch(key)]
        if len(rest) > _MOST or self._names.kinds > _KINDS:
            raise FormatError(f"{where}: {len(rest)} patterns and {len(values) - len(rest)} names: too costly to match")
        self._compiled = [(n, checked(rf"(.*\.)?({key})$", key, where)) for n, key in rest]
        self._spent = 0.0

    def __len__(self) -> int:
        return len(self._values)

    def of(self, path: str, default: T) -> T:
        """Returns the value for a path.

        Raises:
            FormatError: the patterns take too long to match.
        """
        start = time.monotonic()
        found = min(self._single.get(path, len(self)), self._names.first(path, len(self)))
        for position, pattern in self._compiled:
            if position > found:
                break
            if pattern.match(path):
                return self._values[position]
            if self._spent + time.monotonic() - start > _PATIENCE + len(self._compiled) * 1e-3:
                raise FormatError(f"{self._where}: its patterns take too long to match: write them as plain paths")
        self._spent += time.monotonic() - start
        return self._values[found] if found < len(self) else default


class _Names:
    """Patterns that are names, looked up instead of matched: an adapter may have as many as layers.

    A dot without a backslash stands for any letter: names are grouped by their length and the places of such dots.
    """

    def __init__(self, positions: Mapping[str, int]) -> None:
        self._groups: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        for key, position in positions.items():
            letters = _LETTER.findall(key)
            dots = tuple(place for place, letter in enumerate(letters) if letter == ".")
            name = "".join(letter[-1] for letter in letters)
            self._groups.setdefault(len(name), {}).setdefault(dots, {}).setdefault(name, position)

    @property
    def kinds(self) -> int:
        """How many groups of names of one length a look-up goes through at most."""
        return max(map(len, self._groups.values()), default=0)

    def first(self, path: str, default: int) -> int:
        """Returns the least position of the names that a path is, or ends with behind a dot."""
        found = default
        for end in (path, *(path[place + 1 :] for place, letter in enumerate(path) if letter == ".")):
            for dots, names in self._groups.get(len(end), {}).items():
                letters = list(end)
                for place in dots:
                    letters[place] = "."
                found = min(found, names.get("".join(letters), default))
        return found


def checked(expression: str, pattern: str, where: str) -> re.Pattern[str]:
    """Returns the compiled expression.

    Args:
        expression: what is compiled.
        pattern: what stands in the file.
        where: the file and key, for messages.

    Raises:
        FormatError: no regular expression, or one that can take exponential time.
    """
    if len(pattern) > 10_000 or _ways(pattern) > _STEPS:
        raise FormatError(f"{where}: the pattern {pattern[:80]!r} is too costly to match: write it as plain paths")
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(f"{where}: {pattern[:80]!r} is no regular expression: {error}") from error


def _ways(pattern: str) -> float:
    """Returns a bound on the ways of matching a name of a hundred letters; infinite for what can be nested."""
    ways, choices, before = 1.0, 1, ""
    for token in _TOKEN.findall(pattern):
        if token in "*+{" and (before == ")" or before in "*+?}"):
            return float("inf")
        if token == "(?" or re.fullmatch(r"\\[1-9]", token):
            return float("inf")
        if token in "*+{":
            ways *= 100
        elif token == "?" and before not in "*+?}":
            ways *= 2
        elif token == "|":
            choices += 1
        elif token in (")", "(", "(?:"):
            ways, choices = ways * choices, 1
        before = token
    return ways * choices


def anchored(path: str) -> str:
    """Returns the pattern that matches this path and no other."""
    return f"^{re.escape(path)}"


def ends(path: str, names: Iterable[str]) -> bool:
    """Says whether a path is one of the names, or ends with one behind a dot: the rule for lists of targets."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def last(path: str) -> str:
    """Returns the last segment of a path."""
    return path.rpartition(".")[2]


def shortest(paths: Collection[str], known: Collection[str] | None) -> list[str] | str:
    """Returns targets that select these paths, and of the model's known ones no other.

    Last segments where they suffice, else whole paths, else, where even those end other paths, one expression.
    """
    wanted = set(paths)
    whole = sorted(wanted)
    if known is None:
        return whole
    segments = sorted({last(path) for path in paths})
    for names in (segments, whole):
        chosen = set(names)
        if {path for path in known if path in chosen or _suffix_in(path, chosen)} == wanted:
            return names
    return "|".join(re.escape(path) for path in whole)


def _suffix_in(path: str, names: Collection[str]) -> bool:
    return any(path[place + 1 :] in names for place, letter in enumerate(path) if letter == ".")


def selects(config: Mapping[str, Any], path: str, where: str) -> bool:
    """Says whether a config of PEFT, its types checked, makes it adapt the module of that path.

    Raises:
        FormatError: an expression that is broken or too costly to match.
    """
    if _meant(config.get("exclude_modules") or [], path, where):
        return False
    targets = config.get("target_modules") or []
    if targets == "all-linear":
        return True
    return _meant(targets, path, where) and (isinstance(targets, str) or _in_layers(config, path, where))


def _meant(names: str | list[str], path: str, where: str) -> bool:
    """A string is an expression for whole paths, a list holds ends of paths."""
    return bool(checked(names, names, where).fullmatch(path)) if isinstance(names, str) else ends(path, names)


def _in_layers(config: Mapping[str, Any], path: str, where: str) -> bool:
    """Says whether the number of the path's layer is one of `layers_to_transform`."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [(rf"(?:^|.*?\.){pattern}\.(\d+)\.", pattern) for pattern in patterns] or [
        (r".*?\.[^.]*\.(\d+)\.", "")
    ]
    found = (checked(expression, pattern, where).match(path) for expression, pattern in expressions)
    number = next((match[1] for match in found if match), None)
    return number is not None and len(number) < 20 and int(number) in ([layers] if isinstance(layers, int) else layers)
