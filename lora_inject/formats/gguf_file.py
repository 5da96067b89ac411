"""GGUF files, read by strict rules of our own: a stranger's header is checked before anything of its size is built.

The layout is the one that ggml documents for GGUF versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import torch
from torch import Tensor

from ..errors import FormatError, UnsupportedError
from ..safefile import open_regular

HEADER_LIMIT = 8 * 2**20
"""Largest header of an adapter in bytes that is parsed: it holds no vocabulary."""
COUNT_LIMIT = 1 << 16
"""Most fields, tensors, or elements of all arrays together that are parsed."""
SIZE_LIMIT = 1 << 40
"""Most elements of a tensor that are believed."""
ALIGNMENT = 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value types by their number, as struct spells them."""
STRING, ARRAY = 8, 9
DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Plain tensor types by their number."""
Q8_0 = 8
BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), Q8_0: (32, 34)}
"""Elements and bytes of one block of the tensor types that adapters come in."""
T = TypeVar("T")


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies: its number of a type, its shape with rows first, and its bytes in the file."""

    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says about itself, checked against its size."""

    path: Path
    fields: Mapping[str, object]
    tensors: Mapping[str, GgufTensor]


class _Cursor:
    """The header, read from front to back and never beyond the limit."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path, self.place, self.elements = file, path, 0, 0
        self.size = os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        if count > min(self.size, HEADER_LIMIT) - self.place:
            raise self.wrong(f"its header wants {count} bytes more, beyond the file's end or any adapter's header")
        self.place += count
        return self.file.read(count)

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def count(self, what: str) -> int:
        found = self.number("Q")
        if found > COUNT_LIMIT:
            raise self.wrong(f"{found} {what}: no adapter has as many")
        return found

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong("a name or text that is no UTF-8") from None

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array()
        return self._scalars(kind, 1)[0]

    def _array(self) -> list[object]:
        kind, count = self.number("I"), self.count("elements of an array")
        self.elements += count
        if self.elements > COUNT_LIMIT:
            raise self.wrong(f"arrays of more than {COUNT_LIMIT} elements: no adapter has as many")
        if kind == STRING:
            return [self.text() for _ in range(count)]
        return self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[object]:
        if kind not in SCALARS:
            raise self.wrong(f"a value of type {kind}, which is none, or an array in an array")
        code = f"<{count}{SCALARS[kind]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code))))

    def mapping(self, count: int, value: Callable[[], T]) -> dict[str, T]:
        found: dict[str, T] = {}
        for _ in range(count):
            name = self.text()
            if name in found:
                raise self.wrong(f"{name[:80]!r} stands twice")
            found[name] = value()
        return found

    def wrong(self, problem: str) -> FormatError:
        return FormatError(f"{self.path}: not a GGUF adapter, or a broken one: {problem}")


def read_gguf(path: Path) -> GgufFile:
    """Returns the checked header of a GGUF file; no tensor is read.

    Raises:
        FormatError: no such file, another format or version, a truncated file, or entries that contradict its size.
        UnsupportedError: tensors of a type that adapters do not come in.
    """
    try:
        with open_regular(path) as file:
            return _parse(_Cursor(file, path))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse(cursor: _Cursor) -> GgufFile:
    if cursor.take(4) != b"GGUF":
        raise cursor.wrong("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise cursor.wrong(f"version {version} or another byte order, where 2 and 3, little-endian, are known")
    tensors, fields = cursor.count("tensors"), cursor.count("fields")
    values = cursor.mapping(fields, lambda: cursor.value(cursor.number("I")))
    entries = cursor.mapping(tensors, lambda: _entry(cursor))
    return GgufFile(cursor.path, values, _placed(entries, _alignment(values, cursor), cursor))


def _entry(cursor: _Cursor) -> tuple[int, tuple[int, ...], int]:
    """Returns type, shape and offset of one tensor; GGUF lists the sizes from the innermost axis on."""
    axes = cursor.number("I")
    if not 1 <= axes <= 4:
        raise cursor.wrong(f"a tensor of {axes} axes")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    if not 0 < math.prod(shape) <= SIZE_LIMIT:
        raise cursor.wrong(f"a tensor of shape {str(shape)[:80]}")
    return cursor.number("I"), shape, cursor.number("Q")


def _alignment(fields: Mapping[str, object], cursor: _Cursor) -> int:
    found = fields.get("general.alignment", ALIGNMENT)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 < found <= COUNT_LIMIT or found & (found - 1):
        raise cursor.wrong(f"general.alignment {str(found)[:40]} is no power of two")
    return found


def _placed(
    entries: Mapping[str, tuple[int, tuple[int, ...], int]], alignment: int, cursor: _Cursor
) -> dict[str, GgufTensor]:
    """Returns the tensors with their places, after checking that they fill the file one behind the other."""
    base = _aligned(cursor.place, alignment)
    found: dict[str, GgufTensor] = {}
    for name, (kind, shape, offset) in entries.items():
        if kind not in BLOCKS:
            raise UnsupportedError(
                f"{cursor.path}: {name[:80]}: tensor type {kind}: adapters are read in F32, F16, BF16 and Q8_0: "
                "convert the adapter again with --outtype f32"
            )
        elements, size = BLOCKS[kind]
        if shape[-1] % elements:
            raise cursor.wrong(f"{name[:80]}: rows of {shape[-1]} elements in blocks of {elements}")
        found[name] = GgufTensor(kind, shape, base + offset, math.prod(shape) // elements * size)
    place = base
    for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
        if tensor.start != place:
            raise cursor.wrong(f"{name[:80]}: its data overlap those of another tensor, or leave a gap")
        place = _aligned(tensor.start + tensor.size, alignment)
    end = max((tensor.start + tensor.size for tensor in found.values()), default=cursor.place)
    if not end <= cursor.size <= max(place, end):
        raise cursor.wrong(f"its tensors end at byte {end}, and the file has {cursor.size}: it is truncated or longer")
    return found


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def read_tensors(file: GgufFile, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns the named tensors on the CPU, Q8_0 ones in float32.

    Raises:
        FormatError: the file changed or cannot be read any more, or a tensor holds NaN or infinity.
    """
    found: dict[str, Tensor] = {}
    try:
        with file.path.open("rb") as opened:
            for name in names:
                opened.seek(file.tensors[name].start)
                found[name] = _tensor(file.tensors[name], bytearray(opened.read(file.tensors[name].size)))
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise FormatError(f"{file.path}: cannot be read: {error}") from error
    bad = [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise FormatError(f"{file.path}: {bad[0]}: holds NaN or infinity: the adapter is broken, train it again")
    return found


def _tensor(entry: GgufTensor, data: bytearray) -> Tensor:
    if entry.kind in DTYPES:
        return torch.frombuffer(data, dtype=DTYPES[entry.kind]).reshape(entry.shape)
    # A block of Q8_0 is a float16 scale and 32 signed bytes.
    blocks = torch.frombuffer(data, dtype=torch.uint8).reshape(-1, BLOCKS[Q8_0][1])
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return (scales * blocks[:, 2:].contiguous().view(torch.int8).float()).reshape(entry.shape)
