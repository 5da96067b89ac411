"""The file format, version 1: one safetensors file with the adapters' tensors and how to use them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .config import SITE_OPTIONS, SiteConfig, as_dtype, check_name, dtype_name
from .errors import ConfigError, FormatError
from .safefile import Entry, Header, parse_json, read_tensors, stamp
from .version import VERSION

FORMAT = "lora_inject"
FORMAT_VERSION = 1
_quoted = json.encoder.encode_basestring_ascii
_SITE_KEYS = frozenset(("path", "aliases", "adapter", "options", "tied", *SITE_OPTIONS))
_ADDED: dict[str, Any] = {"train_a": True, "tied": {}}
"""Keys that files of this version did not have at first, and what a file without one means."""


_NONE: dict[str, str] = {}


class SiteRecord(NamedTuple):
    """One site as a file describes it.

    Attributes:
        path: first path of the module in the model that the adapter was exported from.
        aliases: its further paths.
        kind: kind of the adapter class.
        config: the options.
        extras: options of the adapter class alone.
        base: {"shape", "hash"} of the weight that it was trained on.
        tied: of the aliases, the first path of each further module whose tied weight the pair updates too, and the
            kind of the class that serves it; files from before it was written tell none.
    """

    path: str
    aliases: tuple[str, ...]
    kind: str
    config: SiteConfig
    extras: Mapping[str, Any]
    base: Mapping[str, Any]
    tied: Mapping[str, str] = _NONE

    def owner(self, path: str) -> str:
        """Returns the path of the module that a path of this site belongs to: itself, or its parameter's owner."""
        parameter = self.extras.get("parameter")
        return path if parameter is None else path.removesuffix(f".{parameter}") if path != parameter else ""

    @property
    def prefix(self) -> str:
        """What stands before the names of its tensors."""
        return f"{self.path}." if self.path else ""


@dataclass(frozen=True)
class AdapterFile:
    """A file whose header was read and checked: the adapter's name and its sites by path."""

    header: Header
    name: str
    version: str
    sites: Mapping[str, SiteRecord]
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file."""
        return self.header.path

    @property
    def program(self) -> str:
        """What wrote it."""
        return f"lora_inject {self.version}"

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def stamp(self) -> bytes:
        """Returns what tells one state of the file from another."""
        return stamp(self.path, self.header.data)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Returns tensors by their keys in the file, on the CPU."""
        return read_tensors(self.header, keys)

    @cached_property
    def entries(self) -> dict[str, dict[str, Entry]]:
        """Tensor entries by path of their site, then by parameter name."""
        found: dict[str, dict[str, Entry]] = {}
        for key, entry in self.header.tensors.items():
            path, _, name = key.rpartition(".")
            found.setdefault(path, {})[name] = entry
        return found


def metadata(name: str, records: Sequence[SiteRecord]) -> dict[str, str]:
    """Returns the metadata of a file that holds these sites."""
    configs = {id(record.config): record.config for record in records}
    options = {key: json.dumps(_options_of(config))[1:-1] for key, config in configs.items()}
    sites = ", ".join([_written_site(record, options[id(record.config)]) for record in records])
    base = {"sites": {record.path: dict(record.base) for record in records}}
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "lora_inject_version": VERSION,
        "adapter": f'{{"name": {_quoted(name)}, "sites": [{sites}]}}',
        "base": json.dumps(base),
    }


def _written_site(record: SiteRecord, options: str) -> str:
    """Returns a site as JSON; thousands of them share their options, which are given written."""
    aliases = json.dumps(record.aliases) if record.aliases else "[]"
    extras = json.dumps(dict(record.extras)) if record.extras else "{}"
    tied = f'"tied": {json.dumps(dict(record.tied))}, ' if record.tied else ""
    where = f'"path": {_quoted(record.path)}, "aliases": {aliases}, "adapter": {_quoted(record.kind)}'
    return f'{{{where}, {options}, {tied}"options": {extras}}}'


def _options_of(config: SiteConfig) -> dict[str, Any]:
    options = {option: getattr(config, option) for option in SITE_OPTIONS}
    return options | {"dtype": dtype_name(options["dtype"])}


def read_adapter_file(header: Header) -> AdapterFile:
    """Returns what an adapter file says by its header, every key of its metadata checked; no tensor is read.

    Raises:
        FormatError: another format or version, or metadata that are incomplete or wrong.
    """
    path, meta = header.path, header.metadata
    if meta.get("format") != FORMAT:
        raise FormatError(
            f"{path}: not a lora_inject adapter: its metadata say format {meta.get('format')!r}, not {FORMAT!r}"
        )
    if meta.get("format_version") != str(FORMAT_VERSION):
        raise FormatError(
            f"{path}: format_version {meta.get('format_version')!r} is unknown to lora_inject {VERSION}, which reads "
            f"version {FORMAT_VERSION}: upgrade lora_inject, or export the adapter again"
        )
    adapter = _mapping(meta.get("adapter"), f"{path}: metadata 'adapter'", {"name", "sites"})
    base = _mapping(meta.get("base"), f"{path}: metadata 'base'", {"sites"})
    if not isinstance(adapter["sites"], list) or not isinstance(base["sites"], dict):
        raise FormatError(f"{path}: metadata: adapter.sites must be a list and base.sites an object")
    sites: dict[str, SiteRecord] = {}
    for entry in adapter["sites"]:
        record = _read_site(entry, base["sites"], f"{path}: metadata")
        if record.path in sites:
            raise FormatError(f"{path}: metadata: site {record.path!r} stands twice")
        sites[record.path] = record
    if not sites:
        raise FormatError(f"{path}: the file holds no site")
    try:
        name = check_name(adapter["name"])
    except ConfigError as error:
        raise FormatError(f"{path}: metadata: {error}") from None
    return AdapterFile(header, name, meta.get("lora_inject_version", "unknown"), sites)


def _options(values: list[Any]) -> SiteConfig:
    try:
        return _cached_options(*values)
    except TypeError:
        # A list or an object: no option takes one, and no cache either.
        return _cached_options.__wrapped__(*values)


# Typed, so that 1 and True, which are equal, do not pass for each other.
@lru_cache(maxsize=1024, typed=True)
def _cached_options(*values: Any) -> SiteConfig:
    return SiteConfig(**dict(zip(SITE_OPTIONS, values, strict=True)))


def _mapping(text: str | None, where: str, keys: set[str]) -> dict[str, Any]:
    value = parse_json(text, where) if text is not None else None
    if not isinstance(value, dict) or set(value) != keys:
        raise FormatError(f"{where}: must be an object with exactly the keys {', '.join(sorted(keys))}")
    return value


def _read_site(entry: object, bases: Mapping[str, Any], where: str) -> SiteRecord:
    if isinstance(entry, dict) and not _ADDED.keys() <= entry.keys():
        entry = _ADDED | entry
    if not isinstance(entry, dict) or entry.keys() != _SITE_KEYS:
        raise FormatError(f"{where}: a site must be an object with exactly the keys {', '.join(sorted(_SITE_KEYS))}")
    path, aliases = entry["path"], entry["aliases"]
    if not isinstance(path, str) or not isinstance(aliases, list) or not _all_strings(aliases):
        raise FormatError(f"{where}: path must be a string and aliases a list of strings")
    if not isinstance(entry["adapter"], str) or not isinstance(entry["options"], dict):
        raise FormatError(f"{where}: site {path!r}: adapter must be a string and options an object")
    base = bases.get(path)
    if not isinstance(base, dict) or set(base) != {"shape", "hash"}:
        raise FormatError(f"{where}: base.sites does not describe site {path!r} by its shape and hash")
    values = [as_dtype(entry[option]) if option == "dtype" else entry[option] for option in SITE_OPTIONS]
    try:
        config = _options(values)
    except ConfigError as error:
        raise FormatError(f"{where}: site {path!r}: {error}") from None
    return SiteRecord(path, tuple(aliases), entry["adapter"], config, entry["options"], base, _tied(entry, where))


def _tied(entry: Mapping[str, Any], where: str) -> dict[str, str]:
    tied = entry["tied"]
    if not isinstance(tied, dict) or not tied.keys() <= set(entry["aliases"]) or not _all_strings(tied.values()):
        raise FormatError(f"{where}: site {entry['path']!r}: tied must give kinds of adapters for some of its aliases")
    return tied


def _all_strings(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)
