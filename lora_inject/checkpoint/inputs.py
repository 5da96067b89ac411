"""The adapters to merge: their files and weights, as the caller wrote them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter
from ..adapter_file import AdapterFile, SiteRecord, read_adapter_file
from ..errors import ConfigError, FormatError, listing
from ..safefile import Entry

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, eq=False)
class Input:
    """One adapter file, its header read and checked, and the weight that its updates get."""

    file: AdapterFile
    weight: float

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.header.path

    def fill(self, adapter: Adapter, record: SiteRecord) -> None:
        """Reads the numbers of one site into an adapter on the CPU, and gives it the weight.

        Raises:
            FormatError: the file cannot be read any more, or holds NaN or infinity.
        """
        bad = []
        try:
            with self.path.open("rb") as file:
                for name, parameter in adapter._parameters.items():
                    assert parameter is not None
                    key = f"{record.prefix}{name}"
                    loaded = _read(file.fileno(), self.file.header.data, self.file.header.tensors[key])
                    if not torch.isfinite(loaded).all():
                        bad.append(key)
                    parameter.data.copy_(loaded)
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        if bad:
            raise FormatError(f"{self.path}: NaN or infinity in {len(bad)} tensors:\n{listing(bad)}")
        adapter.scaling *= self.weight


def _read(number: int, data: int, entry: Entry) -> Tensor:
    raw = bytearray(entry.end - entry.start)
    view, done = memoryview(raw), 0
    while done < len(raw):
        count = os.preadv(number, [view[done:]], data + entry.start + done)
        if count == 0:
            raise OSError(0, "the file became shorter while it was read")
        done += count
    flat = torch.frombuffer(raw, dtype=entry.dtype) if raw else torch.empty(0, dtype=entry.dtype)
    return flat.reshape(entry.shape)


def read_inputs(adapters: Paths, weights: Sequence[float] | None) -> tuple[Input, ...]:
    """Returns the adapters in order.

    Args:
        adapters: one path or several; a string may end in ":weight".
        weights: one number per adapter, in place of those in the strings.

    Raises:
        ConfigError: no adapter, a weight that is no finite number, or not one weight per adapter.
        FormatError: a file that is no adapter.
    """
    given = [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)
    if not given:
        raise ConfigError("merge_checkpoint needs at least one adapter file")
    parts = [split_weight(entry) for entry in given]
    if weights is not None:
        if len(weights) != len(parts):
            raise ConfigError(f"{len(weights)} weights for {len(parts)} adapters: give one weight per adapter")
        parts = [(path, weight) for (path, _), weight in zip(parts, weights, strict=True)]
    for path, weight in parts:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"{path}: weight {weight!r} must be a finite number")
    return tuple(Input(read_adapter_file(path), float(weight)) for path, weight in parts)


def split_weight(entry: str | os.PathLike[str]) -> tuple[Path, float]:
    """Returns path and weight of an adapter written as `path` or `path:weight`; a file of that name comes first."""
    path = Path(entry)
    head, colon, tail = str(entry).rpartition(":")
    if not isinstance(entry, str) or not colon or path.exists():
        return path, 1.0
    try:
        return Path(head), float(tail)
    except ValueError:
        return path, 1.0
