"""Writing files that are whole or not there: beside the final name, synced, renamed."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import FormatError
from .safefile import DTYPES, HEADER_LIMIT, batches, joined

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_quoted = json.encoder.encode_basestring


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Writes a safetensors file under a temporary name beside `path`, syncs it to disk, and renames it.

    Raises:
        FormatError: the folder does not exist or the disk does not take the file; an older file stays as it was.
    """
    return write_whole(path, lambda beside: _write(beside, tensors, metadata))


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a temporary file beside `path`, syncs it to disk, and renames it.

    Raises:
        FormatError: the folder does not exist or the disk does not take the file; an older file stays as it was.
    """
    path = Path(path)
    place, beside = places(path)
    try:
        write(beside)
        sync(beside)
        os.replace(beside, place)
        sync(place.parent)
    except (OSError, UnicodeEncodeError) as error:
        raise FormatError(f"{path}: cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def places(path: Path) -> tuple[Path, Path]:
    """Returns where a path leads to, all links followed, and a name beside that place for what is being written.

    Raises:
        FormatError: nothing can be written there.
    """
    if path.name in ("", ".."):
        raise FormatError(f"{str(path)!r}: cannot be written: it names no file in a folder")
    try:
        place = path.resolve()
        beside = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
        beside.lstat()
    except FileNotFoundError:
        return place, beside
    except (OSError, ValueError, RuntimeError) as error:
        raise FormatError(f"{str(path)!r}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return place, beside


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    # Wide elements first, so that none lies across its own size in the file; the sort is stable.
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header = _written_header(order, metadata)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        with torch.no_grad():
            for batch in batches(tensor for _, tensor in order):
                file.write(raw_bytes(joined(batch)))


def _written_header(order: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    # Entry by entry: for thousands of small tensors, a dict to write would take longer than writing it.
    entries = [f'"__metadata__":{json.dumps(dict(metadata), ensure_ascii=False)}']
    kinds: dict[tuple[torch.dtype, torch.Size], tuple[str, int]] = {}
    position = 0
    for name, tensor in order:
        kind = tensor.dtype, tensor.shape
        if kind not in kinds:
            shape = ",".join(map(str, tensor.shape))
            kinds[kind] = f'"dtype":"{_NAMES[tensor.dtype]}","shape":[{shape}]', tensor.nbytes
        described, size = kinds[kind]
        entries.append(f'{_quoted(name)}:{{{described},"data_offsets":[{position},{position + size}]}}')
        position += size
    raw = f"{{{','.join(entries)}}}".encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > HEADER_LIMIT:
        raise OSError(f"its header would have {len(raw)} bytes, and {HEADER_LIMIT} is what readers take")
    return raw


def raw_bytes(tensor: Tensor) -> bytearray:
    """Returns a copy of what a tensor's elements are in memory, on whatever device."""
    raw = bytearray(tensor.nbytes)
    if raw:
        torch.frombuffer(raw, dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return raw


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
