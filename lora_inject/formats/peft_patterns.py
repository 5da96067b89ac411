"""PEFT's rules for names: which pattern belongs to a module, and which modules a list of targets means."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Generic, TypeVar

from ..errors import FormatError

T = TypeVar("T")
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\(\?|.", re.DOTALL)
_PATIENCE = 0.5
"""Seconds that matching the patterns of one config may take."""
_STEPS = 10**6
"""How many ways of matching a name a pattern may have, by a coarse count."""


class Patterns(Generic[T]):
    """Values by regular expression, looked up as PEFT does: the first that matches the end of a path wins.

    An expression must match the whole path, or all of it behind some dot. They come from strangers: those that could
    keep the regex engine busy for ages are refused.
    """

    def __init__(self, values: Mapping[str, T], where: str) -> None:
        self._values = dict(values)
        self._where = where
        # Patterns for one path each, as they are written here, are looked up: an adapter may have thousands.
        single = [re.sub(r"\\(.)", r"\1", key[1:]) for key in values]
        self._single = {
            path: n for n, (path, key) in enumerate(zip(single, values, strict=True)) if anchored(path) == key
        }
        singles = set(self._single.values())
        rest = [(n, key) for n, key in enumerate(values) if n not in singles]
        self._compiled = [(n, checked(rf"(.*\.)?({key})$", key, where), key) for n, key in rest]
        self._spent = 0.0

    def __len__(self) -> int:
        return len(self._values)

    def of(self, path: str, default: T) -> T:
        """Returns the value for a path.

        Raises:
            FormatError: the patterns take too long to match.
        """
        start = time.monotonic()
        found = self._single.get(path, len(self))
        for position, pattern, key in self._compiled:
            if position > found:
                break
            if pattern.match(path):
                return self._values[key]
            if self._spent + time.monotonic() - start > _PATIENCE + len(self) * 1e-3:
                raise FormatError(f"{self._where}: its patterns take too long to match: write them as plain paths")
        self._spent += time.monotonic() - start
        return self._values[anchored(path)] if path in self._single else default


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
