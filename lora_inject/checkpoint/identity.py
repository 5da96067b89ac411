"""Whether the base is the one that an adapter was trained on, from a sample of its elements on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ..errors import FormatError, MismatchError, listing
from ..fingerprint import sample_bytes, sample_index
from .base import Base
from .names import Names, Piece
from .updates import Update


class _Reader:
    """Reads single elements of base tensors."""

    def __init__(self, base: Base, stack: ExitStack) -> None:
        self.base, self.stack = base, stack
        self.open: dict[Path, int] = {}

    def element(self, piece: Piece, row: int, column: int, columns: int) -> bytes:
        place = self.base.tensors[piece.key]
        number = self.open.get(place.header.path)
        if number is None:
            number = self.open[place.header.path] = os.open(place.header.path, os.O_RDONLY)
            self.stack.callback(os.close, number)
        size = place.entry.dtype.itemsize
        at = (piece.row + row - piece.start) * columns + column
        return os.pread(number, size, place.offset + at * size)


def check_base(base: Base, names: Names, updates: Sequence[Update]) -> None:
    """Compares the fingerprint of every adapted weight with the one in the adapter's file.

    Raises:
        MismatchError: weights that differ; lists them.
        FormatError: the base cannot be read.
    """
    differ: dict[Path, list[str]] = {}
    try:
        with ExitStack() as stack:
            reader = _Reader(base, stack)
            for update in updates:
                known = update.record.base["hash"] is not None
                if known and _fingerprint(reader, names, update) != update.record.base:
                    differ.setdefault(update.input.path, []).append(update.record.path)
    except OSError as error:
        raise FormatError(f"{base.root}: cannot be read: {error.strerror or error}") from error
    for path, sites in differ.items():
        count = sum(update.input.path == path for update in updates)
        raise MismatchError(
            f"{path}: made for other base weights: {len(sites)} of {count} sites differ:\n{listing(sites)}\n"
            "Merge it into its own base (not one that it is merged into already), or pass check_base=False "
            "(--no-check-base) if you know that this one will do."
        )


def _fingerprint(reader: _Reader, names: Names, update: Update) -> dict[str, object] | None:
    name = update.weight_name
    path = f"{update.path}.{name}" if update.path else name
    shape = list(update.host._parameters[name].shape)  # type: ignore[union-attr]
    columns = max(1, torch.Size(shape[update.row_axes :]).numel())
    held = (names.pieces(other, update.row_axes) for other in names.shared(path))
    pieces = next((found for found in held if found), ())
    picked = []
    for position in sample_index(torch.Size(shape).numel()).tolist():
        row, column = divmod(position, columns)
        piece = next((piece for piece in pieces if piece.start <= row < piece.stop), None)
        if piece is None:
            return None
        picked.append(reader.element(piece, row, column, columns))
    if not picked:
        return {"shape": shape, "hash": hashlib.blake2b(digest_size=8).hexdigest()}
    dtype = reader.base.tensors[pieces[0].key].entry.dtype
    elements = torch.frombuffer(bytearray(b"".join(picked)), dtype=dtype)
    digest = hashlib.blake2b(sample_bytes(elements), digest_size=8).hexdigest()
    return {"shape": shape, "hash": digest}
