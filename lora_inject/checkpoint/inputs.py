"""The adapters to merge: their files and weights, as the caller wrote them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapter import Adapter
from ..adapter_file import SiteRecord
from ..config import is_finite
from ..errors import ConfigError, FormatError, UnsupportedError, listing
from ..formats import Bundle, Source, read_adapter
from ..models import build_on_meta

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, eq=False)
class Input:
    """One adapter, its header read and checked, and the weight that its updates get."""

    file: Source
    weight: float

    @property
    def path(self) -> Path:
        """The file, or the folder."""
        return self.file.path

    def fill(self, adapter: Adapter, record: SiteRecord) -> None:
        """Reads the numbers of one site into an adapter on the CPU, and gives it the weight.

        Raises:
            FormatError: the file cannot be read any more, or holds NaN or infinity.
        """
        keys = {name: f"{record.prefix}{name}" for name in adapter._parameters}
        tensors = self.file.read(keys.values())
        bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise FormatError(f"{self.path}: NaN or infinity in {len(bad)} tensors:\n{listing(bad)}")
        for name, key in keys.items():
            adapter._parameters[name].data.copy_(tensors[key])  # type: ignore[union-attr]
        adapter.scaling *= self.weight


def read_inputs(
    adapters: Paths, weights: Sequence[float] | None, base: str | os.PathLike[str] | None = None
) -> tuple[Input, ...]:
    """Returns the adapters in order.

    Args:
        adapters: one path or several, of any known format; a string may end in ":weight".
        weights: one number per adapter, in place of those in the strings.
        base: the folder of the model that they are for, for formats whose names need it.

    Raises:
        ConfigError: no adapter, a weight that is no finite number, or not one weight per adapter.
        FormatError: a file that is no adapter.
        UnsupportedError: an adapter that cannot be read without its base.
    """
    given = [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)
    if not given:
        raise ConfigError("no adapter file was given: give at least one path")
    parts = [split_weight(entry) for entry in given]
    if weights is not None:
        if len(weights) != len(parts):
            raise ConfigError(f"{len(weights)} weights for {len(parts)} adapters: give one weight per adapter")
        parts = [(path, weight) for (path, _), weight in zip(parts, weights, strict=True)]
    for path, weight in parts:
        if not is_finite(weight):
            raise ConfigError(f"{path}: weight {weight!r} must be a finite number")
    return tuple(Input(read_source(path, base), float(weight)) for path, weight in parts)


def read_source(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Source:
    """Returns the adapter at a path, of any format, in the native layout.

    The model in the folder `base` is built, without weights, only where the format's names need one.

    Raises:
        FormatError: no adapter, or a broken one.
        UnsupportedError: it needs its base to be understood.
    """
    try:
        found = read_adapter(path, None)
    except UnsupportedError:
        if base is None or not Path(base, "config.json").is_file():
            raise
        found = read_adapter(path, build_on_meta(str(base)))
    if isinstance(found, Bundle) and found.full:
        raise UnsupportedError(
            f"{path}: holds parameters that were trained as a whole, and without the base's weights nothing says how "
            f"they differ from it:\n{listing(list(found.full))}\nConvert it first: lora-inject convert {path} "
            "OUT.safetensors --to lora_inject --model BASE"
        )
    return found


def split_weight(entry: str | os.PathLike[str]) -> tuple[Path, float]:
    """Returns path and weight of an adapter written as `path` or `path:weight`; a file of that name comes first."""
    path = Path(entry)
    head, colon, tail = str(entry).rpartition(":")
    if not isinstance(entry, str) or not colon or os.path.exists(path):
        return path, 1.0
    try:
        return Path(head), float(tail)
    except ValueError:
        return path, 1.0
