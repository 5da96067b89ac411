"""Reading safetensors files: a strict look at the header before any tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from .errors import FormatError

HEADER_LIMIT = 100_000_000
"""Largest header in bytes that the safetensors library reads or writes."""

RUN = 2**26
"""How many bytes of small tensors are read, written or checked in one go."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_SIZES = 2**63


class Entry(NamedTuple):
    """One tensor of a file: its dtype and shape, and where its bytes lie behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself, checked against its size."""

    path: Path
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data: int
    """Where the first tensor's bytes begin in the file: behind the header."""


def parse_json(text: str | bytes, where: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        FormatError: not JSON, a key twice in one object, NaN or Infinity, or nested beyond reason.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise FormatError(f"{where}: the key {twice!r} stands twice in one object")
        return found

    def constant(name: str) -> NoReturn:
        raise FormatError(f"{where}: {name} is not a number that JSON knows")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{where}: not valid JSON: {error}") from None


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file, or a link to one: a pipe or a device could keep its reader waiting for ever.

    Raises:
        FormatError: there is none, or it cannot be read.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        opened = path.open("rb") if regular else None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if opened is None:
        raise FormatError(f"{path}: cannot be read: not a regular file")
    return opened


def read_header(path: str | os.PathLike[str]) -> Header:
    """Returns the checked header of a safetensors file; no tensor is read.

    Args:
        path: the file.

    Raises:
        FormatError: no such file, another format, a truncated file, or entries that contradict the file's size.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > HEADER_LIMIT:
                raise FormatError(
                    f"{path}: not a safetensors file, or a truncated one: its first eight bytes announce a header of "
                    f"{length} bytes, and the file has {size}"
                )
            raw = parse_json(file.read(length), f"{path}: header")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(raw, dict):
        raise FormatError(f"{path}: header is not a JSON object")
    metadata = raw.pop("__metadata__", None)
    # mlx writes null where it has nothing to say.
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map strings to strings")
    tensors: dict[str, Entry] = {}
    for name, entry in raw.items():
        try:
            tensors[name] = _entry(entry)
        except FormatError as error:
            raise FormatError(f"{path}: tensor {name!r}: {error}") from None
    _check_offsets(path, tensors.values(), size - 8 - length)
    return Header(path, tensors, metadata, 8 + length)


def _are_sizes(values: object, fewest: int, most: int) -> bool:
    """Says whether this is a list of so many sizes; JSON has no other integers than int, and bool is none of them."""
    if not isinstance(values, list) or not fewest <= len(values) <= most:
        return False
    return all([type(value) is int and 0 <= value < _SIZES for value in values])


def _entry(entry: object) -> Entry:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise FormatError("needs exactly dtype, shape and data_offsets")
    shape, offsets, named = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _are_sizes(shape, 0, 64):
        raise FormatError(f"shape {str(shape)[:80]} is not a list of sizes")
    if not _are_sizes(offsets, 2, 2):
        raise FormatError(f"data_offsets {str(offsets)[:80]} is not a pair of offsets")
    dtype = DTYPES.get(named) if isinstance(named, str) else None
    if dtype is None:
        raise FormatError(f"unknown dtype {str(named)[:80]!r}")
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise FormatError(f"shape {shape} in {named} does not fill bytes {start} to {end}")
    return Entry(dtype, tuple(shape), start, end)


def _check_offsets(path: Path, entries: Iterable[Entry], size: int) -> None:
    position = 0
    for start, end in sorted((entry.start, entry.end) for entry in entries):
        if start != position:
            raise FormatError(f"{path}: tensor data overlap, or leave a gap, at byte {min(start, position)}")
        position = end
    if position != size:
        raise FormatError(f"{path}: header describes {position} bytes of data, the file holds {size}: it is truncated")


def read_tensors(header: Header, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns the named tensors on the CPU.

    Raises:
        FormatError: the file changed or cannot be read any more.
    """
    wanted = sorted(((header.tensors[name], name) for name in names), key=lambda item: item[0].start)
    found: dict[str, Tensor] = {}
    try:
        with header.path.open("rb") as file:
            for run in _runs(wanted):
                found.update(_read_run(file, header, run))
    except (OSError, MemoryError) as error:
        raise FormatError(f"{header.path}: cannot be read: {error or 'not enough memory'}") from error
    return found


def _runs(entries: Iterable[tuple[Entry, str]]) -> Iterator[list[tuple[Entry, str]]]:
    """Yields tensors that follow each other in the file, of one dtype, as many as are worth one look."""
    run: list[tuple[Entry, str]] = []
    for entry, name in entries:
        if run and (
            entry.start != run[-1][0].end or entry.dtype != run[0][0].dtype or entry.end - run[0][0].start > RUN
        ):
            yield run
            run = []
        run.append((entry, name))
    if run:
        yield run


def _read_run(file: BufferedReader, header: Header, run: list[tuple[Entry, str]]) -> Iterator[tuple[str, Tensor]]:
    start, size = run[0][0].start, run[-1][0].end - run[0][0].start
    raw = bytearray(size)
    file.seek(header.data + start)
    if file.readinto(raw) != size:
        raise OSError("it became shorter while it was read")
    dtype = run[0][0].dtype
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    parts = torch.split(flat, [(entry.end - entry.start) // dtype.itemsize for entry, _ in run])
    for (entry, name), part in zip(run, parts, strict=True):
        yield name, part.view(entry.shape)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Says whether no tensor holds a NaN or an infinity; looks at many small ones at once."""
    return all(bool(torch.isfinite(joined(batch)).all()) for batch in batches(tensors))


def batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yields tensors that follow each other and have one dtype and device, as many as are worth one look."""
    batch: list[Tensor] = []
    size, kind = 0, None
    for tensor in tensors:
        found = tensor.dtype, tensor.device
        if found != kind or size > RUN:
            if batch:
                yield batch
            batch, size, kind = [], 0, found
        batch.append(tensor)
        size += tensor.nbytes
    if batch:
        yield batch


def joined(batch: Sequence[Tensor]) -> Tensor:
    """Returns the elements of tensors of one dtype and device in one row; a single tensor is not copied."""
    # torch flattens and joins them in one call: from here, one call for each would take longer than the copying.
    return batch[0] if len(batch) == 1 else _flatten_dense_tensors(batch)  # type: ignore[no-untyped-call]


def stamp(path: Path, head: int) -> bytes:
    """Returns what tells one state of a file from another: a hash of its first bytes, its size and its time."""
    with path.open("rb") as file:
        state = os.fstat(file.fileno())
        content = hashlib.blake2b(file.read(head)).digest()
    return content + f"{path.name}:{state.st_size}:{state.st_mtime_ns}".encode("utf-8", "surrogatepass")
