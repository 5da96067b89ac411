"""Norms of the base's weights, read from a checkpoint on disk block by block."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..adapter_file import SiteRecord
from ..checkpoint.base import Base, read_base
from ..checkpoint.identity import Reader, weight_fingerprint
from ..checkpoint.inputs import Input
from ..checkpoint.model_names import ModelNames
from ..checkpoint.names import Names, Piece, find_names
from ..config import DTYPES
from ..errors import ConfigError, FormatError, MismatchError, UnsupportedError, listing
from ..registry import by_kind
from ..sites import join

BLOCK = 2**24
"""Bytes of a weight that are held at a time."""


@dataclass(frozen=True, slots=True)
class Weight:
    """Where a site's weight lies: its path in the model, the tensors that hold its rows, and its columns."""

    path: str
    pieces: tuple[Piece, ...]
    columns: int


def base_norms(path: str | os.PathLike[str], entry: Input, check: bool = True) -> dict[str, float]:
    """Returns the Frobenius norm of each site's weight by the site's path, in float64.

    Sites without one weight (whole blocks), sites whose weight the checkpoint does not hold, holds in another size or
    not as floating-point numbers, are left out.

    Args:
        path: a folder with `*.safetensors`, or one such file.
        entry: the adapter.
        check: refuse weights that the adapter was not trained on.

    Raises:
        FormatError: the checkpoint cannot be read.
        MismatchError: it holds no weight of the adapter, or other ones than it was trained on.
    """
    base = read_base(path)
    names, found = _find_all(base, entry)
    if not found:
        raise MismatchError(
            f"{base.root}: holds the weight of none of the {len(entry.file.sites)} sites of {entry.path}: name the "
            "checkpoint that the adapter was trained on"
        )
    try:
        with ExitStack() as stack:
            reader = Reader(base, stack)
            if check:
                _check(reader, names, entry, found)
            return {site: _norm(reader, weight) for site, weight in found.items()}
    except OSError as error:
        raise FormatError(f"{base.root}: cannot be read: {error.strerror or error}") from error


def _axes(record: SiteRecord) -> int:
    """Returns how many leading axes of the site's weight count as rows."""
    return max(1, len(record.base["shape"]) - 1) if "parameter" in record.extras else 1


def _find_all(base: Base, entry: Input) -> tuple[Names, dict[str, Weight]]:
    """Returns the sites' weights under the headers' names or, where those miss some, under transformers' names."""
    records = [record for record in entry.file.sites.values() if _places(record)]
    names: Names = find_names(base, [entry])
    found = {record.path: weight for record in records if (weight := _find(base, names, record))}
    if len(found) < len(records) and "model_type" in (base.config or {}):
        names = ModelNames(base)
        found = {record.path: weight for record in records if (weight := _find(base, names, record))}
    return names, found


def _find(base: Base, names: Names, record: SiteRecord) -> Weight | None:
    axes = _axes(record)
    for owner, name in _places(record):
        path = join(names.own(owner), name)
        try:
            pieces = next((held for other in names.shared(path) if (held := names.pieces(other, axes))), ())
        except UnsupportedError:
            continue
        entries = [base.tensors[piece.key].entry for piece in pieces]
        columns = math.prod(record.base["shape"][axes:])
        held = sum(piece.stop - piece.start for piece in pieces) * columns
        whole = len(pieces) > 1 or all(math.prod(entry.shape) == held for entry in entries)
        fits = whole and held == math.prod(record.base["shape"])
        if pieces and fits and all(entry.dtype in DTYPES.values() for entry in entries):
            return Weight(path, pieces, columns)
    return None


def _places(record: SiteRecord) -> list[tuple[str, str]]:
    """Returns modules that the site's weight may be in, and its name there; none for a block."""
    try:
        touched = by_kind(record.kind).touches(record.extras)[:1]
    except (ConfigError, KeyError):
        return []
    return [(record.owner(path), name) for name in touched for path in (record.path, *record.aliases)]


def _check(reader: Reader, names: Names, entry: Input, found: Mapping[str, Weight]) -> None:
    differ = []
    for site, weight in found.items():
        record = entry.file.sites[site]
        known = record.base["hash"] is not None
        if known and weight_fingerprint(reader, names, weight.path, record.base["shape"], _axes(record)) != record.base:
            differ.append(site)
    if differ:
        raise MismatchError(
            f"{reader.base.root}: other base weights than {entry.path} was trained on: {len(differ)} of "
            f"{len(entry.file.sites)} sites differ:\n{listing(differ)}\nName its own base, or pass check_base=False "
            "(--no-check-base) to measure against this one."
        )


def _norm(reader: Reader, weight: Weight) -> float:
    return math.hypot(*(part for piece in weight.pieces for part in _parts(reader, piece, weight.columns)))


def _parts(reader: Reader, piece: Piece, columns: int) -> Iterable[float]:
    """Yields the norms of the blocks of a piece."""
    place = reader.base.tensors[piece.key]
    width = place.entry.dtype.itemsize
    start = place.offset + piece.row * columns * width
    stop = start + (piece.stop - piece.start) * columns * width
    for at in range(start, stop, BLOCK):
        raw = reader.read(place, at, min(BLOCK, stop - at))
        numbers = torch.frombuffer(bytearray(raw), dtype=place.entry.dtype)
        yield float(torch.linalg.vector_norm(numbers, dtype=torch.float64))
