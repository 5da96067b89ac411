"""Paths that differ from the model's by a prefix alone: wrappers, or one level of the model more or less."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import product

WRAPPERS = ("base_model.model.", "_orig_mod.", "module.")
LEVELS = ("", "model.", "base_model.", "transformer.", "language_model.", "model.language_model.")


def aligned(paths: Collection[str], known: Collection[str]) -> tuple[Callable[[str], str], str] | None:
    """Returns what turns the file's paths into the model's, and a note that says so; None where nothing does for sure.

    A prefix is accepted only where it is complete, so that every path of the file is then one of the model's, and
    unambiguous, so that no other prefix does the same for other modules.
    """
    if all(path in known for path in paths):
        return (lambda path: path), ""
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    for cut, put in _changes(paths):
        moved = tuple(put + path.removeprefix(cut) for path in paths)
        if all(path in known for path in moved):
            found.setdefault(moved, (cut, put))
    if len(found) != 1:
        return None
    ((cut, put),) = found.values()
    said = " and ".join([f"without the prefix {cut!r}"] * bool(cut) + [f"under {put!r}"] * bool(put))
    return (lambda path: put + path.removeprefix(cut)), f"the file's paths are the model's {said}"


def _changes(paths: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Yields prefixes that all paths have, each with the prefixes that could stand in its place."""
    shared = [prefix for prefix in _wrapped() if all(path.startswith(prefix) for path in paths)]
    return ((cut, put) for cut, put in product(shared, LEVELS) if cut != put)


def _wrapped() -> list[str]:
    """Returns every chain of up to three wrappers, with and without a level of the model behind it."""
    chains = {"".join(chain) for count in range(4) for chain in product(WRAPPERS, repeat=count)}
    return sorted({chain + level for chain in chains for level in LEVELS}, key=lambda prefix: (len(prefix), prefix))
