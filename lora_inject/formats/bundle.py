"""An adapter between two formats, and what loading needs to know of one, whatever file it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..adapter_file import SiteRecord
from ..errors import FormatError, listing
from ..safefile import stamp
from ..sites import join

STAMPED = 2**20
"""How many bytes of a file go into its stamp, beside its size and time."""


class Shaped(Protocol):
    """A tensor, or the entry of one in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""


class Source(Protocol):
    """What `load` reads: the sites of one adapter, and their tensors."""

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""

    @property
    def name(self) -> str:
        """The adapter's name."""

    @property
    def sites(self) -> Mapping[str, SiteRecord]:
        """The sites by path."""

    @property
    def entries(self) -> Mapping[str, Mapping[str, Shaped]]:
        """Shapes and dtypes by path of the site, then by parameter."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how the file was understood."""

    @property
    def program(self) -> str:
        """What wrote it, and its version where that is known."""

    @property
    def size(self) -> int:
        """Bytes on disk."""

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Returns tensors by `<path of the site>.<parameter>`."""

    def stamp(self) -> bytes:
        """Returns what tells one state of the file from another."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """The sites of one adapter as the native format describes them, with their tensors in memory.

    Attributes:
        path: where it came from, for messages.
        name: the adapter's name.
        sites: the sites by path; the hash of a record's base is None where the origin says nothing of it.
        entries: the tensors in the native layout, by path of the site, then by parameter.
        full: trained values that replace a parameter, by the parameter's path.
        notes: what the user should know of how the file was understood.
        program: what wrote it.
        by_segment: whether its readers know a layer by the last segment of its path alone.
    """

    path: Path
    name: str
    sites: Mapping[str, SiteRecord]
    entries: Mapping[str, Mapping[str, Tensor]]
    full: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    program: str = "lora_inject"
    by_segment: bool = False

    @property
    def size(self) -> int:
        """Bytes of the file, or of all files of the folder."""
        return sum(file.stat().st_size for file in self._files)

    def stamp(self) -> bytes:
        """Returns what tells one state of the file, or of the folder's files, from another."""
        return b"".join(stamp(file, STAMPED) for file in self._files)

    @property
    def _files(self) -> list[Path]:
        return sorted(file for file in self.path.iterdir() if file.is_file()) if self.path.is_dir() else [self.path]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The sites' tensors by their keys in a native file."""
        return {join(site, name): t for site, own in self.entries.items() for name, t in own.items()}

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Returns the tensors of these keys."""
        tensors = self.tensors
        return {key: tensors[key] for key in keys}


def described(record: SiteRecord, tensors: Mapping[str, Tensor]) -> SiteRecord:
    """Returns the record with the shape of its weight and no hash, for an origin that says nothing of the base.

    Rows of the weight are in B, columns and the kernel in A; a balanced convolution, which only the native format
    knows, comes with its base.
    """
    if "lora_dense" in tensors:
        shape = [*tensors["lora_dense"].shape]
    elif "parameter" in record.extras:
        shape = [*tensors["lora_B"].shape[:-1], tensors["lora_A"].shape[-1]]
    else:
        shape = [tensors["lora_B"].shape[0], *tensors["lora_A"].shape[1:]]
    return record._replace(base={"shape": shape, "hash": None})


def loaded(source: Source) -> Bundle:
    """Returns an adapter with all its tensors in memory.

    Raises:
        FormatError: tensors that belong to no site, or hold NaN or infinity; lists them.
    """
    stray = sorted(set(source.entries) - set(source.sites))
    if stray:
        raise FormatError(f"{source.path}: tensors that belong to no site of the file:\n{listing(stray)}")
    keys = {(site, name): join(site, name) for site, own in source.entries.items() for name in own}
    tensors = source.read(keys.values())
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise FormatError(f"{source.path}: NaN or infinity in {len(bad)} tensors:\n{listing(bad)}")
    entries: dict[str, dict[str, Tensor]] = {site: {} for site in source.sites}
    for (site, name), key in keys.items():
        entries[site][name] = tensors[key]
    full = source.full if isinstance(source, Bundle) else {}
    return Bundle(source.path, source.name, source.sites, entries, full, source.notes)
