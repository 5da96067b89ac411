"""The base checkpoint as its headers describe it: shards, tensors, index and config."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import FormatError, did_you_mean, listing
from ..safefile import Entry, Header, parse_json, read_header

INDEX = ".safetensors.index.json"
CONFIG = "config.json"
PREFERRED = "model"
"""The stem of the weights that transformers loads; other weights in its folder are another layout of the same."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: the header of its shard, and its entry there."""

    header: Header
    entry: Entry

    @property
    def offset(self) -> int:
        """Where its bytes begin in the file."""
        return self.header.data + self.entry.start

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.entry.end - self.entry.start


@dataclass(frozen=True)
class Base:
    """A checkpoint whose headers were read and checked; no tensor was read.

    Attributes:
        root: the folder, or the one file.
        shards: the headers of its files, in order of their names.
        index: the content of its index, None for a single file.
        index_name: the file name of that index.
    """

    root: Path
    shards: tuple[Header, ...]
    index: Mapping[str, Any] | None
    index_name: str

    @property
    def folder(self) -> Path | None:
        """The folder whose other files belong to the checkpoint, None for a bare file."""
        return self.root if self.root.is_dir() else None

    @cached_property
    def tensors(self) -> dict[str, Place]:
        """Every tensor by name."""
        return {key: Place(shard, entry) for shard in self.shards for key, entry in shard.tensors.items()}

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The content of config.json, or None where there is none."""
        path = None if self.folder is None else self.folder / CONFIG
        if path is None or not path.is_file():
            return None
        found = parse_json(_text(path), str(path))
        if not isinstance(found, dict):
            raise FormatError(f"{path}: must hold a JSON object")
        return found


def read_base(path: str | os.PathLike[str]) -> Base:
    """Returns what the headers of a checkpoint say.

    Args:
        path: a folder with `*.safetensors`, with or without an index, or one such file.

    Raises:
        FormatError: nothing there, or files that contradict each other, their size, or the index.
    """
    root = Path(path)
    if not root.is_dir():
        return Base(root, (read_header(root),), None, "")
    found = _find_index(root)
    if found is None:
        return Base(root, (read_header(_single(root)),), None, "")
    index = parse_json(_text(found), str(found))
    names = _shard_names(index, found)
    base = Base(root, tuple(read_header(root / name) for name in names), index, found.name)
    _check_index(base, found)
    return base


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error


def _find_index(root: Path) -> Path | None:
    if (root / f"{PREFERRED}.safetensors").is_file():
        return None
    found = sorted(root.glob(f"*{INDEX}"))
    chosen = [path for path in found if path.name == f"{PREFERRED}{INDEX}"] or found
    if len(chosen) > 1:
        raise FormatError(f"{root}: several indices:\n{listing([p.name for p in chosen])}\nName one .safetensors file.")
    return chosen[0] if chosen else None


def _single(root: Path) -> Path:
    found = sorted(root.glob("*.safetensors"))
    chosen = [path for path in found if path.stem == PREFERRED] or found
    if not chosen:
        raise FormatError(
            f"{root}: no .safetensors file in this folder: name the folder of a checkpoint, and convert weights that "
            "are kept as .bin files first (load them and call save_pretrained)"
        )
    if len(chosen) > 1:
        names = listing([path.name for path in chosen])
        raise FormatError(f"{root}: several .safetensors files and no index that joins them:\n{names}\nName one file.")
    return chosen[0]


def _shard_names(index: object, path: Path) -> list[str]:
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise FormatError(f"{path}: must hold an object 'weight_map' from tensor names to file names")
    names = sorted(set(weights.values()))
    for name in names:
        if Path(name).name != name or name in (".", "..") or "\\" in name:
            raise FormatError(f"{path}: {name!r} is not the name of a file beside the index")
    return names


def _check_index(base: Base, path: Path) -> None:
    assert base.index is not None
    twice = list(_repeated(base.shards))
    if twice:
        raise FormatError(f"{base.root}: tensors that stand in two shards:\n{listing(twice)}")
    lines = []
    for key, name in base.index["weight_map"].items():
        place = base.tensors.get(key)
        if place is None:
            lines.append(f"{key}: in no shard; {did_you_mean(key, list(base.tensors)[:2000])}")
        elif place.header.path.name != name:
            lines.append(f"{key}: in {place.header.path.name}, not in {name}")
    if lines:
        raise FormatError(f"{path}: names {len(lines)} tensors that are not where it says:\n{listing(lines)}")


def _repeated(shards: tuple[Header, ...]) -> Iterator[str]:
    seen: set[str] = set()
    for shard in shards:
        yield from (key for key in shard.tensors if key in seen)
        seen |= shard.tensors.keys()
