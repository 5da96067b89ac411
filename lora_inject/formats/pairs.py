"""A file's tensors put together as pairs by what stands before the factors' names, each of them used once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import FormatError, UnsupportedError, listing
from .checks import RANK_LIMIT

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Suffixes:
    """How a program ends the names of tensors.

    Attributes:
        a: the name's end of the factor that the input meets first.
        b: that of the other one.
        unknown: ends of tensors that have no counterpart here, with what they are.
    """

    a: str
    b: str
    unknown: Mapping[str, str]


def paired(names: Iterable[str], suffixes: Suffixes, where: object) -> list[str]:
    """Returns what stands before the suffixes of every pair, in the file's order.

    Raises:
        UnsupportedError: tensors of a feature that has no counterpart here; names both.
        FormatError: tensors that are no part of a pair, or half a pair; names all.
    """
    found: dict[str, set[str]] = defaultdict(set)
    stray: list[str] = []
    for name in names:
        feature = next((what for end, what in suffixes.unknown.items() if name.endswith(end)), None)
        if feature is not None:
            raise UnsupportedError(
                f"{where}: {name}: {feature} has no counterpart in lora_inject: merge the adapter into its base with "
                "the program that made it"
            )
        end = next((end for end in (suffixes.a, suffixes.b) if name.endswith(end)), None)
        if end is None:
            stray.append(name)
        else:
            found[name.removesuffix(end)].add(end)
    half = [stem + end for stem, ends in found.items() if len(ends) == 1 for end in ends]
    if stray or half:
        lines = [f"{name}: no part of a pair" for name in stray] + [
            f"{name}: its other factor is missing" for name in half
        ]
        raise FormatError(f"{where}: {len(lines)} tensors have no use:\n{listing(lines)}")
    return list(found)


def rank_of(stem: str, a: Shape, b: Shape, where: object, *, inner: tuple[int, int] = (-2, -1), axes: int = 2) -> int:
    """Returns the rank of a pair, which its shapes tell before any number is read.

    Args:
        stem: the pair, for messages.
        a: shape of one factor.
        b: shape of the other.
        where: the file, for messages.
        inner: which axis of each is the rank.
        axes: 2 for matrices, 3 for stacks of them.

    Raises:
        FormatError: other shapes, two ranks, or one that no adapter has.
    """
    if not len(a) == len(b) == axes or 0 in (*a, *b):
        raise FormatError(f"{where}: {stem}: factors of shape {a} and {b} are no matrices that make a pair")
    ranks = a[inner[0]], b[inner[1]]
    if ranks[0] != ranks[1] or ranks[0] > RANK_LIMIT:
        raise FormatError(f"{where}: {stem}: {a} and {b} do not share a rank, or one beyond {RANK_LIMIT}")
    return ranks[0]
