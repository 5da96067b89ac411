"""Patterns that select paths, and the overrides that a pattern may carry."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fnmatch2 import fnmatchcase2
from torch import nn

from .config import SITE_OPTIONS, as_dtype, check_option
from .errors import ConfigError, TargetError, did_you_mean, nearest

# fnmatchcase2 splits names at "/" and "\" and then matches prefixes; lone surrogates, which no text
# holds, stand in for both on either side, so that it sees one undivided name.
_UNDIVIDED = str.maketrans({"/": "\udc2f", "\\": "\udc5c"})
_WILD = re.compile(r"[*?\[]")


def matcher(pattern: str) -> Callable[[str], bool]:
    """Returns a function that says whether the pattern selects a path.

    Args:
        pattern: a case-sensitive glob over the whole dotted path ("*" crosses dots), or, after "re:", a regular
            expression that must match the whole path.

    Raises:
        TargetError: the regular expression cannot be compiled.
    """
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern[3:])
        except re.error as error:
            raise TargetError(f"pattern {pattern!r}: not a regular expression: {error}") from None
        return lambda path: compiled.fullmatch(path) is not None
    glob = pattern.translate(_UNDIVIDED)
    # For an undivided name fnmatchcase2 asks the standard library, whose regular expression is made once here.
    whole = re.compile(fnmatch.translate(glob)).match

    def matches(path: str) -> bool:
        if "/" in path or "\\" in path:
            return bool(fnmatchcase2(path.translate(_UNDIVIDED), glob))
        return whole(path) is not None

    return matches


def is_literal(pattern: str) -> bool:
    """Says whether the pattern names one path instead of describing several."""
    return not pattern.startswith("re:") and not _WILD.search(pattern)


@dataclass(frozen=True, init=False, eq=False)
class Target:
    """A pattern, and what its sites get instead of the injection's own options.

    Args:
        pattern: a glob or, after "re:", a regular expression, over the whole dotted path.
        type: select only modules of this class: a class, a tuple of classes, or the name of a class or base class.
        adapter: serve the sites by this adapter class (or its name) instead of the first that can; the way to adapt
            a whole block: `adapter="block"`.
        **options: overrides per site (rank, alpha, dropout, bias, rslora, dense, init, factorization, dtype,
            train_a), and what the adapter class asks for itself (a block: `in_features` and `out_features`, or
            `example`).

    Raises:
        ConfigError: an option's value cannot be used.
    """

    pattern: str
    type: type | tuple[type, ...] | str | None = None
    adapter: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, pattern: str, *, type: Any = None, adapter: Any = None, **options: Any) -> None:
        if not isinstance(pattern, str):
            raise ConfigError(f"target {pattern!r}: a pattern must be a string")
        kinds = type if isinstance(type, tuple) else (type,)
        if not (type is None or isinstance(type, str) or all(inspect.isclass(kind) for kind in kinds)):
            raise ConfigError(f"target {pattern!r}: type={type!r} must be a class, a tuple of classes or a class name")
        given = {option: value for option, value in options.items() if value is not None}
        if "dtype" in given:
            given["dtype"] = as_dtype(given["dtype"])
        overrides = {option: given.pop(option) for option in SITE_OPTIONS if option in given}
        for option, value in overrides.items():
            check_option(option, value)
        if adapter is None and given:
            option = next(iter(given))
            known = (*SITE_OPTIONS, "type", "adapter")
            raise ConfigError(f"target {pattern!r}: unknown option {option!r}: {did_you_mean(option, known)}")
        for name, value in (("pattern", pattern), ("type", type), ("adapter", adapter)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "options", overrides)
        object.__setattr__(self, "extras", given)

    @property
    def label(self) -> str:
        """The pattern, and the type where one is asked for."""
        kind = getattr(self.type, "__name__", self.type)
        return self.pattern if kind is None else f"{self.pattern} ({kind})"

    def accepts(self, module: nn.Module) -> bool:
        """Says whether the module is of the type that the target asks for."""
        if self.type is None:
            return True
        if isinstance(self.type, str):
            return any(base.__name__ == self.type for base in module.__class__.__mro__)
        return isinstance(module, self.type)


def as_targets(targets: object) -> tuple[Target, ...]:
    """Returns a pattern, a Target, or several of both as a tuple of Targets.

    Raises:
        ConfigError: something else, or nothing at all.
    """
    if isinstance(targets, (str, Target)):
        targets = (targets,)
    if not isinstance(targets, Iterable):
        raise ConfigError(f"targets={targets!r}: give a pattern, a Target, a list of both, or a recipe")
    found = tuple(target if isinstance(target, Target) else Target(target) for target in targets)
    if not found:
        raise ConfigError('targets is empty: give at least one pattern, for example "*.q_proj"')
    return found


def _shape(path: str) -> str:
    return re.sub(r"\d+", "0", path)


def nearest_paths(pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the paths that look most like a pattern that selected none, best first.

    Paths that differ only in numbers count once, so that a hundred layers do not crowd out the rest.
    """
    kinds: dict[str, str] = {}
    for path in paths:
        kinds.setdefault(_shape(path), path)
    word = _shape(pattern.removeprefix("re:"))
    tails: dict[str, str] = {}
    for kind, path in kinds.items():
        tails.setdefault(kind.rpartition(".")[2], path)
    last = word.rpartition(".")[2].strip("*?$\\()")
    close = [tails[tail] for tail in nearest(last, tails)]
    close += [kinds[kind] for kind in nearest(word, list(kinds)[:2000])]
    return list(dict.fromkeys(close))[:4]
