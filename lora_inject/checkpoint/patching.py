"""Row-block arithmetic on one tensor on its way from the base to the output."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError, StateError
from ..rows import Rows, add_rows, row_blocks, total_rows, wide
from .changes import Change, Target
from .layout import Patch
from .names import Piece

RUN = 8
"""How many blocks one thread takes at a time."""
SAMPLED = 2**15
"""Elements of a parameter that its line in the report is estimated from."""
WRITE = 2**20
"""Bytes of one write."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What merging did to some rows in the middle of one parameter, as an estimate for the whole.

    Attributes:
        path: dotted path of the parameter.
        key: its first tensor in the checkpoint.
        adapters: names of the adapters that were added.
        relative: Frobenius norm of the update over that of the weight; None where that is zero.
        survives: share of the update's energy that is left after rounding, at most 1.
        error: largest distance of an element from the unrounded sum.
    """

    path: str
    key: str
    adapters: tuple[str, ...]
    relative: float | None
    survives: float
    error: float


class Scratch:
    """Two stretches of memory that a thread uses for every block again: for what it reads, and for what it writes."""

    def __init__(self) -> None:
        self.held = {True: bytearray(), False: bytearray()}
        self.given: dict[bool, tuple[Tensor, memoryview]] = {}

    def take(self, reading: bool, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """Returns a tensor over one of them, its numbers not set, and the same bytes as a view."""
        given = self.given.get(reading)
        if given is None or given[0].shape != shape or given[0].dtype != dtype:
            size = shape[0] * shape[1] * dtype.itemsize
            if len(self.held[reading]) < size:
                self.held[reading] = bytearray(size)
            view = memoryview(self.held[reading])[:size]
            given = self.given[reading] = torch.frombuffer(view, dtype=dtype).reshape(shape), view
        return given


class Loaded:
    """The numbers of the adapters of one parameter, read when the first thread asks for them."""

    def __init__(self, change: Change) -> None:
        self.change = change
        self.lock = threading.Lock()
        self.rows: list[Rows] = []
        self.bound = 0.0

    def updates(self) -> Sequence[Rows]:
        """Returns what gives the rows of each update, and knows then what no element of their sum exceeds."""
        with self.lock:
            if not self.rows:
                name, axes = self.change.name, self.change.axes
                loaded = [(update.load(), update.host) for update in self.change.updates]
                self.bound = sum(adapter.bound(name) for adapter, _ in loaded)
                self.rows = [adapter.rows_by(host, name, axes) for adapter, host in loaded]
        return self.rows


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one block of a parameter that lie in one tensor.

    Attributes:
        block: the rows that are computed.
        rows: those of them that lie in the tensor.
        row: where they begin there.
    """

    block: slice
    rows: slice
    row: int


@dataclass(frozen=True, slots=True)
class Work:
    """Some blocks of one tensor, one thread's share."""

    patch: Patch
    loaded: Loaded
    spans: tuple[Span, ...]
    probed: Span

    @property
    def size(self) -> int:
        """Bytes that are written."""
        rows = sum(span.rows.stop - span.rows.start for span in self.spans)
        return int(rows * self.loaded.change.columns * self.patch.target.dtype.itemsize)

    def do(self, source: int | None, into: int, scratch: Scratch) -> list[Sample]:
        """Reads, adds and writes all blocks.

        Args:
            source: the base's file; None where the tensor starts from zero.
            into: the output's file.
            scratch: the thread's memory.

        Raises:
            StateError: the sum is not finite in the stored dtype.
            FormatError: the base ends before the tensor does.
        """
        updates, columns = self.loaded.updates(), self.loaded.change.columns
        with torch.no_grad():
            found = [self._block(span, updates, columns, source, into, scratch) for span in self.spans]
        return [sample for sample in found if sample is not None]

    def _block(
        self, span: Span, updates: Sequence[Rows], columns: int, source: int | None, into: int, scratch: Scratch
    ) -> Sample | None:
        target, rows = self.patch.target, span.rows.stop - span.rows.start
        original = None if source is None else _read(source, target, span.row, rows, columns, scratch)
        value, view = scratch.take(False, (rows, columns), target.dtype)
        # Every call into torch lets the other threads have the interpreter, and then waits for it: few calls.
        if span.rows == span.block:
            summed = add_rows(original, updates, span.block, value)
        else:
            summed = _add_part(original, updates, span, value)
        if not (is_too_small(self.loaded.bound, original, value) or _surely_finite(summed, target.dtype)):
            _check_finite(target.key, value, original)
        write_all(into, view, self.patch.offset + span.row * columns * target.dtype.itemsize)
        return _sample(self.loaded.change, target.key, value, original, updates, span) if span is self.probed else None


def split(patch: Patch) -> Iterator[Work]:
    """Yields the blocks of a tensor in shares for threads; the adapters' numbers live as long as one of them."""
    for change, piece in patch.target.parts:
        spans = list(_spans(change, piece))
        loaded = Loaded(change)
        probed = spans[len(spans) // 2] if spans else None
        for start in range(0, len(spans), RUN):
            assert probed is not None
            yield Work(patch, loaded, tuple(spans[start : start + RUN]), probed)


def _spans(change: Change, piece: Piece) -> Iterator[Span]:
    for block in row_blocks(change.shape, change.axes) if change.columns else ():
        start, stop = max(block.start, piece.start), min(block.stop, piece.stop)
        if start < stop:
            yield Span(block, slice(start, stop), piece.row + start - piece.start)


def _add_part(original: Tensor | None, updates: Sequence[Rows], span: Span, value: Tensor) -> Tensor:
    """Adds rows of a block whose other rows lie elsewhere: as a whole all the same, lest the rest be other bits."""
    part = slice(span.rows.start - span.block.start, span.rows.stop - span.block.start)
    shape = (span.block.stop - span.block.start, value.shape[1])
    whole = None
    if original is not None:
        whole = torch.zeros(shape, dtype=original.dtype)
        whole[part] = original
    out = torch.empty(shape, dtype=value.dtype)
    summed = add_rows(whole, updates, span.block, out)[part]
    value.copy_(out[part])
    return summed


def _read(source: int, target: Target, row: int, rows: int, columns: int, scratch: Scratch) -> Tensor:
    assert target.place is not None
    dtype = target.place.entry.dtype
    found, view = scratch.take(True, (rows, columns), dtype)
    start, done = target.place.offset + row * columns * dtype.itemsize, 0
    while done < len(view):
        count = os.preadv(source, [view[done:]], start + done)
        if count == 0:
            raise FormatError(f"{target.place.header.path}: became shorter while it was read: do not change the base")
        done += count
    return found


def write_all(into: int, data: bytes | memoryview, at: int) -> None:
    """Writes bytes to a place in a file."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(into, view[done : done + WRITE], at + done)


def is_too_small(bound: float, original: Tensor | None, value: Tensor) -> bool:
    """Says whether no update of that size can make an element infinite that is finite, without a look at any.

    The largest number of a dtype stays what it is if half the distance to the one before is not reached; a quarter
    leaves room for the rounding of the bound itself.
    """
    known = torch.finfo(value.dtype)
    return original is not None and original.dtype == value.dtype and bound <= known.max * known.eps / 8


def _surely_finite(summed: Tensor, dtype: torch.dtype) -> bool:
    """Says whether the norm of the sum alone shows that no element can be infinite or NaN once it is rounded."""
    flat = summed.view(-1)
    return math.isfinite(norm := float(torch.dot(flat, flat)) ** 0.5) and norm < torch.finfo(dtype).max


def _check_finite(key: str, value: Tensor, original: Tensor | None) -> None:
    bad = ~torch.isfinite(value)
    if original is not None:
        bad &= torch.isfinite(original)
    if bad.any():
        raise StateError(
            f"{key}: {int(bad.sum())} merged elements of one block are not finite in {value.dtype}: the sum overflows; "
            "nothing was merged. Give the adapter a smaller weight, or a wider dtype="
        )


def _sample(
    change: Change, key: str, value: Tensor, original: Tensor | None, updates: Sequence[Rows], span: Span
) -> Sample:
    count = min(len(value), max(1, SAMPLED // max(1, change.columns)))
    rows, seen = slice(count), slice(span.rows.start, span.rows.start + count)
    value, total = value[rows], total_rows(updates, seen).reshape(-1, change.columns)
    original = None if original is None else original[rows]
    before = torch.zeros_like(total) if original is None else wide(original)
    miss = (wide(value) - before) - total
    energy, norm = float(total.double().square().sum()), float(before.double().square().sum()) ** 0.5
    return Sample(
        path=change.path,
        key=key,
        adapters=tuple(update.input.file.name for update in change.updates),
        relative=energy**0.5 / norm if norm else None,
        survives=1 - float(miss.double().square().sum()) / energy if energy else 1.0,
        error=float(miss.abs().max()) if miss.numel() else 0.0,
    )
