"""Weights on disk, row by row: of one checkpoint, and the difference of two."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.base import Base, Place
from ..checkpoint.names import Piece
from ..errors import FormatError
from ..fingerprint import sample_bytes, sample_index
from .form import Form

BLOCK = 2**21
"""How many elements are held at a time, unless one row has more; 16 MiB in float64."""


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter in a checkpoint.

    Attributes:
        base: the checkpoint.
        shape: its shape.
        axes: how many leading axes count as rows, seen as one.
        pieces: the tensors that hold its rows, in order.
    """

    base: Base
    shape: tuple[int, ...]
    axes: int
    pieces: tuple[Piece, ...]

    @property
    def columns(self) -> int:
        """How many elements a row has."""
        return math.prod(self.shape[self.axes :])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it is stored."""
        return self.base.tensors[self.pieces[0].key].entry.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns some rows (stop - start, columns) as they are stored.

        Raises:
            FormatError: the checkpoint cannot be read any more.
        """
        found = []
        for piece in self.pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                at = piece.row + first - piece.start
                found.append(_read(self.base.tensors[piece.key], at * self.columns, (last - first) * self.columns))
        return torch.cat(found).reshape(-1, self.columns) if found else torch.empty(0, self.columns, dtype=self.dtype)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what `lora_inject.fingerprint` does for the parameter in memory."""
        picked = [torch.empty(0, dtype=self.dtype)]
        for position in sample_index(math.prod(self.shape)).tolist():
            row, column = divmod(position, self.columns)
            picked.append(self.rows(row, row + 1)[0, column : column + 1])
        digest = hashlib.blake2b(sample_bytes(torch.cat(picked)), digest_size=8)
        return {"shape": list(self.shape), "hash": digest.hexdigest()}


def _read(place: Place, start: int, count: int) -> Tensor:
    """Returns some elements of a tensor on disk, flat."""
    size, dtype = place.entry.dtype.itemsize, place.entry.dtype
    try:
        with place.header.path.open("rb") as file:
            file.seek(place.offset + start * size)
            raw = bytearray(file.read(count * size))
    except OSError as error:
        raise FormatError(f"{place.header.path}: cannot be read: {error.strerror or os.strerror(5)}") from error
    if len(raw) != count * size:
        raise FormatError(f"{place.header.path}: the file became shorter while it was read")
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Scan:
    """What one pass over a difference found.

    Attributes:
        energy: sum of the squared elements.
        rows: which rows of the matrix are not zero, (rows, 1).
        columns: which columns are not zero, (1, columns).
    """

    energy: float
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Delta:
    """One matrix of the difference tuned - base, made anew from disk in every pass, float64.

    Attributes:
        before: the parameter in the base.
        after: the parameter in the tuned checkpoint, of the same shape and axes.
        form: how the parameter is a matrix, or a stack of such.
        number: which matrix of the stack.
    """

    before: Weight
    after: Weight
    form: Form
    number: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        weight = self.before.shape
        if self.before.axes == 2:
            return weight[1], weight[2]
        columns = self.form.fold_dense(torch.empty(weight, device="meta")).shape[-1]
        return math.prod(weight) // max(1, columns), columns

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields blocks of rows of the matrix in order, and where they stand.

        Raises:
            FormatError: a checkpoint cannot be read, or the difference is not finite.
        """
        weight, axes = self.before.shape, self.before.axes
        count = weight[axes - 1] if axes else 1
        step, done = max(1, BLOCK // max(1, self.before.columns)), 0
        for start in range(self.number * count, (self.number + 1) * count, step):
            stop = min(start + step, (self.number + 1) * count)
            change = self.after.rows(start, stop).double() - self.before.rows(start, stop).double()
            if not torch.isfinite(change).all():
                raise FormatError(
                    f"{self.before.pieces[0].key}: NaN or infinity in {self.before.base.root} or "
                    f"{self.after.base.root}: leave it out (exclude=, --exclude), or repair the checkpoint"
                )
            block = change if axes != 1 else self.form.fold_dense(change.reshape(-1, *weight[1:]))
            yield slice(done, done + len(block)), block
            done += len(block)

    def times(self, right: Tensor) -> Tensor:
        """Returns the matrix times `right` (columns, n)."""
        return torch.cat([block @ right for _, block in self.blocks()])

    def transposed_times(self, left: Tensor) -> Tensor:
        """Returns the transposed matrix times `left` (rows, n)."""
        total = torch.zeros(self.shape[1], left.shape[1], dtype=torch.float64)
        for rows, block in self.blocks():
            total += block.mT @ left[rows]
        return total

    def whole(self) -> Tensor:
        """Returns all of the matrix."""
        return torch.cat([block for _, block in self.blocks()])

    def scan(self) -> Scan:
        """Returns energy and zero rows and columns, in one pass."""
        energy, rows, columns = 0.0, [], torch.zeros(1, self.shape[1], dtype=torch.bool)
        for _, block in self.blocks():
            energy += float(block.square().sum())
            rows.append((block != 0).any(1, keepdim=True))
            columns |= (block != 0).any(0, keepdim=True)
        return Scan(energy, torch.cat(rows), columns)

    def residual(self, b: Tensor, a: Tensor | None) -> float:
        """Returns the squared Frobenius norm of what B A leaves of the matrix, block by block; B alone without A."""
        left = 0.0
        for rows, block in self.blocks():
            left += float((block - (b[rows] if a is None else b[rows] @ a)).square().sum())
        return left
