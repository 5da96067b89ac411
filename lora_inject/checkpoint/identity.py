"""Whether the base is the one that an adapter was trained on, from a sample of its elements on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ..errors import FormatError, MismatchError, listing
from ..fingerprint import sample_bytes, sample_index
from .base import Base, Place
from .names import Names, Piece
from .updates import Update


class Reader:
    """Reads bytes and single elements of base tensors; files stay open until the stack closes them."""

    def __init__(self, base: Base, stack: ExitStack) -> None:
        self.base, self.stack = base, stack
        self.open: dict[Path, int] = {}

    def elements(self, piece: Piece, columns: int) -> Callable[[int], bytes]:
        """Returns what reads one element of the parameter that the piece is a part of, by its place there."""
        place = self.base.tensors[piece.key]
        number, size = self._file(place), place.entry.dtype.itemsize
        start = place.offset + (piece.row - piece.start) * columns * size
        return lambda position: os.pread(number, size, start + position * size)

    def read(self, place: Place, at: int, size: int) -> bytes:
        """Returns `size` bytes from the position `at` of the file that a tensor lies in.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        parts = []
        while size:
            part = os.pread(self._file(place), size, at)
            if not part:
                raise OSError(0, "a file became shorter while it was read")
            parts.append(part)
            at, size = at + len(part), size - len(part)
        return b"".join(parts)

    def _file(self, place: Place) -> int:
        number = self.open.get(place.header.path)
        if number is None:
            number = self.open[place.header.path] = os.open(place.header.path, os.O_RDONLY)
            self.stack.callback(os.close, number)
        return number


def check_base(base: Base, names: Names, updates: Sequence[Update]) -> None:
    """Compares the fingerprint of every adapted weight with the one in the adapter's file.

    Raises:
        MismatchError: weights that differ; lists them.
        FormatError: the base cannot be read.
    """
    differ: dict[Path, list[str]] = {}
    try:
        with ExitStack() as stack:
            reader = Reader(base, stack)
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


def _fingerprint(reader: Reader, names: Names, update: Update) -> dict[str, object] | None:
    name = update.weight_name
    path = f"{update.path}.{name}" if update.path else name
    shape = list(update.host._parameters[name].shape)  # type: ignore[union-attr]
    return weight_fingerprint(reader, names, path, shape, update.row_axes)


def weight_fingerprint(
    reader: Reader, names: Names, path: str, shape: list[int], axes: int
) -> dict[str, object] | None:
    """Returns {"shape", "hash"} of a weight on disk, as `fingerprint` gives them in memory; None where rows miss.

    Args:
        reader: reads the base.
        names: how the base's tensors are called in the model.
        path: the parameter's path in the model.
        shape: its shape there.
        axes: how many of its leading axes count as rows.
    """
    columns = max(1, torch.Size(shape[axes:]).numel())
    held = (names.pieces(other, axes) for other in names.shared(path))
    pieces = next((found for found in held if found), ())
    picked: list[bytes] = []
    last, read = None, None
    for position in sample_index(torch.Size(shape).numel()).tolist():
        row = position // columns
        if last is None or not last.start <= row < last.stop:
            last = next((piece for piece in pieces if piece.start <= row < piece.stop), None)
            if last is None:
                return None
            read = reader.elements(last, columns)
        assert read is not None
        picked.append(read(position))
    if not picked:
        return {"shape": shape, "hash": hashlib.blake2b(digest_size=8).hexdigest()}
    dtype = reader.base.tensors[pieces[0].key].entry.dtype
    elements = torch.frombuffer(bytearray(b"".join(picked)), dtype=dtype)
    digest = hashlib.blake2b(sample_bytes(elements), digest_size=8).hexdigest()
    return {"shape": shape, "hash": digest}
