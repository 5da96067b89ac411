"""Where a site stands in a report: its row by the kind of module, its column by its depth, both from its path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BANDS, LANES, COLUMNS = 120, 1600, 256
"""Most kinds, rows and columns that are drawn by kind and depth; more of any are drawn in the order of the file."""
WRAP = 64
"""Columns of a grid that follows the order of the file."""
NO_DEPTH = "–"
"""Label of the column of sites that have no depth, where others have."""
_NUMBER = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one site stands: its band, the lane inside of the band, and its column."""

    band: int
    lane: int
    column: int


@dataclass(frozen=True, slots=True)
class Band:
    """All sites of one kind of module.

    Attributes:
        label: the kind, from the paths with "*" for numbers behind the depth.
        lanes: how many rows it takes: one, or one per number behind the depth (experts, blocks of a stage).
        sites: the indices of its sites, by column, then by lane.
    """

    label: str
    lanes: int
    sites: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """The layout of all sites.

    Attributes:
        bands: the kinds in the order of the file.
        columns: labels of the columns.
        places: the place of every site, in the order of the sites; no two are equal.
        axis: what the columns are.
    """

    bands: tuple[Band, ...]
    columns: tuple[str, ...]
    places: tuple[Place, ...]
    axis: str


@dataclass(frozen=True, slots=True)
class _Address:
    """A path taken apart: what decides its band, its lane and its column."""

    kind: tuple[str, ...]
    lane: tuple[str, ...]
    column: str


def arrange(paths: Sequence[str]) -> Grid:
    """Returns where each site stands; no two share a place.

    The depth is the first number in a path. What stands before it and after it makes the kind. Where no path has a
    number, the last name is the kind, and the columns count the sites of a kind. Where that makes more rows or columns
    than can be drawn, the sites are laid out in the order of the file.
    """
    numbered = any(_depth(path.split(".")) is not None for path in paths)
    addresses = [_by_depth(path) for path in paths] if numbered else _by_count(paths)
    columns = sorted({address.column for address in addresses}, key=_natural)
    kinds = {address.kind for address in addresses}
    lanes = {(address.kind, address.lane) for address in addresses}
    if len(kinds) > BANDS or len(lanes) > LANES or len(columns) > COLUMNS:
        addresses = [_Address(("all sites",), (str(i // WRAP),), str(i % WRAP + 1)) for i in range(len(paths))]
        columns = [str(i + 1) for i in range(min(WRAP, len(paths)))]
        return _grid(addresses, columns, "sites in the order of the file, from left to right")
    return _grid(addresses, columns, "depth: first number in the path" if numbered else "sites of a kind, counted")


def _depth(parts: Sequence[str]) -> int | None:
    return next((i for i, part in enumerate(parts) if _NUMBER.fullmatch(part)), None)


def _by_depth(path: str) -> _Address:
    parts = path.split(".")
    at = _depth(parts)
    if at is None:
        return _Address((path or "(root)",), (), NO_DEPTH)
    rest = tuple(parts[at + 1 :])
    pattern = tuple("*" if _NUMBER.fullmatch(part) else part for part in rest)
    return _Address((".".join([*parts[:at], "*"]), *pattern), rest, parts[at])


def _by_count(paths: Iterable[str]) -> list[_Address]:
    seen: dict[str, int] = {}
    found = []
    for path in paths:
        kind = path.rpartition(".")[2] or "(root)"
        seen[kind] = seen.get(kind, 0) + 1
        found.append(_Address((kind,), (), str(seen[kind])))
    return found


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    """Returns a key that sorts names with numbers as people do; what is no number comes last."""
    return tuple((int(part) if _NUMBER.fullmatch(part) else 10**6, part) for part in text.split("."))


def _grid(addresses: Sequence[_Address], columns: Sequence[str], axis: str) -> Grid:
    kinds = list(dict.fromkeys(address.kind for address in addresses))
    lanes: dict[tuple[str, ...], list[tuple[str, ...]]] = {kind: [] for kind in kinds}
    for kind, lane in sorted({(a.kind, a.lane) for a in addresses}, key=lambda pair: _natural(".".join(pair[1]))):
        lanes[kind].append(lane)
    row = {(kind, lane): i for kind in kinds for i, lane in enumerate(lanes[kind])}
    place = {column: i for i, column in enumerate(columns)}
    band = {kind: i for i, kind in enumerate(kinds)}
    places = tuple(Place(band[a.kind], row[a.kind, a.lane], place[a.column]) for a in addresses)
    members: list[list[int]] = [[] for _ in kinds]
    for i in sorted(range(len(places)), key=lambda i: (places[i].column, places[i].lane)):
        members[places[i].band].append(i)
    labels = _labels(kinds)
    return Grid(
        tuple(Band(labels[kind], len(lanes[kind]), tuple(members[band[kind]])) for kind in kinds),
        tuple(columns),
        places,
        axis,
    )


def _labels(kinds: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Returns a short name per kind: without what stands before the depth where all kinds have the same there."""
    stacks = {kind[0] for kind in kinds if len(kind) > 1 and kind[0].endswith("*")}
    alone = len(stacks) == 1
    return {kind: ".".join(kind[1:] if alone and kind[0] in stacks and len(kind) > 1 else kind) for kind in kinds}
