"""Real English text that is on every machine: the docstrings of Python's standard library, labelled by package."""

from __future__ import annotations

import ast
import collections
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "lib-dynload", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT = 25
"""Percent of the texts that are never trained on."""


@dataclass(frozen=True)
class Example:
    """One docstring's first paragraph and the position of its package among the labels."""

    text: str
    label: int


@dataclass(frozen=True)
class Dataset:
    """Texts for training and held-out texts; no text is in both."""

    labels: tuple[str, ...]
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def paragraphs(source: bytes) -> Iterator[str]:
    """Yields the first paragraph of every docstring in a module, which is parsed and never run."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(text.split()) >= 3:
                yield text


def standard_library() -> dict[str, str]:
    """Returns package by text, for the texts that stand in one package alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    owners: dict[str, set[str]] = collections.defaultdict(set)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not SKIPPED & set(parts):
            for text in paragraphs(path.read_bytes()):
                owners[text].add(parts[0].removesuffix(".py"))
    return {text: next(iter(names)) for text, names in owners.items() if len(names) == 1}


def is_held_out(text: str) -> bool:
    """Says which half a text belongs to, by its hash alone, so that the split is the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100 < HELD_OUT


def load(packages: int = 20, limit: int | None = None) -> Dataset:
    """Returns the docstrings of the largest packages.

    Args:
        packages: how many packages, the largest first.
        limit: at most so many texts of each package; None means all.
    """
    owner = standard_library()
    largest = [name for name, _ in collections.Counter(owner.values()).most_common(packages)]
    halves: dict[bool, list[Example]] = {True: [], False: []}
    taken: collections.Counter[str] = collections.Counter()
    for text in sorted(owner, key=lambda text: hashlib.sha256(text.encode()).digest()):
        name = owner[text]
        if name in largest and (limit is None or taken[name] < limit):
            taken[name] += 1
            halves[is_held_out(text)].append(Example(text, largest.index(name)))
    return Dataset(tuple(largest), tuple(halves[False]), tuple(halves[True]))
