"""The one family of errors: each message says where, what, why, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LoraInjectError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(LoraInjectError, ValueError):
    """An option, a recipe or a name has a value that cannot be used."""


class RecipeError(ConfigError):
    """A recipe cannot be found or read, or says what it must not; gives file, line and column."""


class TargetError(LoraInjectError, ValueError):
    """A pattern selects nothing, or nothing that can be adapted."""


class UnsupportedError(LoraInjectError, TypeError):
    """A module, or a module in its present state, cannot be served exactly."""


class StateError(LoraInjectError, RuntimeError):
    """The call does not fit what the model carries now: names, merges, switches."""


class FormatError(LoraInjectError, ValueError):
    """A file cannot be read, or does not say what it must."""


class MismatchError(FormatError):
    """A readable file does not fit this model: sites, shapes or base weights differ."""


class RoundingWarning(UserWarning):
    """Numbers are stored in a dtype that keeps too little of an update."""


def listing(lines: Sequence[str], limit: int = 12) -> str:
    """Returns the lines as an indented list, cut after `limit` with a count of the rest."""
    shown = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Returns the known words that look most like `word`, best first."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns a clause that names the nearest known words, or all of them where none is near."""
    words = list(known)
    close = nearest(word, words)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    return f"known: {', '.join(sorted(words)) or 'none'}"
