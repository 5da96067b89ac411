"""The bytes of the output's shards: which tensor goes where, which bytes are copies, and which are computed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..safefile import DTYPES, Header
from .base import Base, Place
from .changes import Target, uncovered

CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of the base that go into the output as they are."""

    source: Path
    start: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Patch:
    """A tensor that is computed, and where it begins in the output."""

    target: Target
    offset: int


@dataclass(frozen=True, eq=False)
class Shard:
    """One file of the output.

    Attributes:
        name: its name.
        head: its first bytes: the length of its header, and the header.
        copies: what is copied, neighbours joined.
        patches: what is computed.
        size: all of its bytes.
    """

    name: str
    head: bytes
    copies: tuple[Copy, ...]
    patches: tuple[Patch, ...]
    size: int


@dataclass(slots=True)
class _Slot:
    """One tensor of a shard: from where, and as what."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: Place | None
    target: Target | None
    offset: int = 0

    @property
    def size(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def lay_out(base: Base, targets: Sequence[Target]) -> list[Shard]:
    """Returns the output's shards: names, order, dtypes and metadata of the base, new tensors behind the others."""
    return [
        _lay_out(shard, [target for target in targets if target.shard == number])
        for number, shard in enumerate(base.shards)
    ]


def _lay_out(shard: Header, targets: Sequence[Target]) -> Shard:
    by_key = {target.key: target for target in targets}
    slots = []
    for key, entry in shard.tensors.items():
        target = by_key.pop(key, None)
        place = Place(shard, entry)
        slots.append(_Slot(key, entry.dtype if target is None else target.dtype, entry.shape, place, target))
    added = [_Slot(t.key, t.dtype, t.shape, t.place, t) for t in by_key.values()]
    same = not added and all(slot.place is not None and slot.dtype == slot.place.entry.dtype for slot in slots)
    ordered = sorted(slots, key=lambda slot: (slot.place.entry.start, slot.place.entry.end)) + added  # type: ignore[union-attr]
    if not same:
        # As the safetensors library does it, so that every tensor is aligned to its elements.
        ordered.sort(key=lambda slot: -slot.dtype.itemsize)
    position = 0
    for slot in ordered:
        slot.offset, position = position, position + slot.size
    head = _read_head(shard) if same else _write_head(shard, [*slots, *added])
    for slot in ordered:
        slot.offset += len(head)
    patches = tuple(Patch(slot.target, slot.offset) for slot in ordered if slot.target and slot.target.parts)
    return Shard(shard.path.name, head, tuple(_join(_raw(ordered))), patches, len(head) + position)


def _raw(ordered: Sequence[_Slot]) -> Iterator[Copy]:
    """Yields what is copied, tensor by tensor, and the rows of changed tensors that no change reaches."""
    for slot in ordered:
        if slot.place is None:
            continue
        source, start = slot.place.header.path, slot.place.offset
        if slot.target is None or not slot.target.parts:
            yield Copy(source, start, slot.offset, slot.size)
            continue
        width = slot.target.parts[0][0].columns * slot.dtype.itemsize
        for first, last in uncovered(slot.target):
            yield Copy(source, start + first * width, slot.offset + first * width, (last - first) * width)


def _join(copies: Iterator[Copy]) -> Iterator[Copy]:
    """Yields the copies, neighbours in both files joined."""
    last: Copy | None = None
    for copy in copies:
        if not copy.size:
            continue
        if last and _end(last) == (copy.source, copy.start, copy.offset):
            last = Copy(last.source, last.start, last.offset, last.size + copy.size)
            continue
        if last:
            yield last
        last = copy
    if last:
        yield last


def _end(copy: Copy) -> tuple[Path, int, int]:
    return copy.source, copy.start + copy.size, copy.offset + copy.size


def _read_head(shard: Header) -> bytes:
    with shard.path.open("rb") as file:
        return file.read(shard.data)


def _write_head(shard: Header, slots: Sequence[_Slot]) -> bytes:
    """Returns a new header in the order of the old one, padded so that tensors stay aligned."""
    entries: dict[str, object] = {"__metadata__": dict(shard.metadata)} if shard.metadata else {}
    for slot in slots:
        offsets = [slot.offset, slot.offset + slot.size]
        entries[slot.key] = {"dtype": CODES[slot.dtype], "shape": list(slot.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
