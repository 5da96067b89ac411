"""Exporting the adapters of a model into a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapter import parameters_of
from .adapter_file import SiteRecord
from .bulk import uncollected
from .errors import StateError
from .fingerprint import fingerprints
from .formats import Bundle, Serve, write_adapter
from .refs import AdapterRef, Placed, chosen, chosen_places, unique
from .sites import join
from .ties import pair_of
from .tree import Node, walk


@uncollected()
def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Returns the tensors of one adapter, keyed as in the exported file; they share memory with the model.

    Raises:
        StateError: no adapter has that name.
    """
    return _tensors(chosen(walk(model), (name,)))


def _tensors(refs: list[AdapterRef]) -> dict[str, Tensor]:
    found = {join(ref.path, key): parameter for ref in refs for key, parameter in parameters_of(ref.adapter)}
    return {key: parameter.detach() for key, parameter in unique(found).items()}


@uncollected()
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    format: str = "lora_inject",
    profile: str | Serve | None = None,
) -> Path:
    """Writes one adapter into a file, by default of the format that docs/file-format.md describes.

    That file holds the adapter's tensors, its options, and a fingerprint of the base; `load` and every safetensors
    reader can open it. It is written beside its final name, synced and renamed: an older file stays whole until then.

    Args:
        model: a model with adapters, merged or not.
        path: the file to write, or the folder where the format is one.
        name: which adapter.
        format: whose format; docs/formats.md lists them.
        profile: "serve", or a `Serve` with options, makes a file of PEFT that all servers read alike.

    Returns:
        The path of the file.

    Raises:
        StateError: no adapter has that name, or its parameters are on the meta device.
        ConfigError: no such format, or no such profile for it.
        UnsupportedError: the format cannot hold what the adapter does; names it.
        FormatError: the file cannot be written.
    """
    return write_adapter(bundle_of(model, name), path, format, model, profile)


def bundle_of(model: nn.Module, name: str = "default") -> Bundle:
    """Returns one adapter of a model as a value: sites, options, fingerprints, and tensors that share its memory.

    Raises:
        StateError: no adapter has that name, or its parameters are on the meta device.
    """
    groups: dict[int, list[Placed]] = {}
    entries: dict[str, dict[str, Tensor]] = {}

    def owners() -> Iterator[tuple[Node, tuple[str, ...]]]:
        # All that an adapter is asked for at once: of thousands, each look costs more than what it finds.
        for node, ref in chosen_places(walk(model), (name,)):
            adapter = ref.adapter
            group = groups.setdefault(pair_of(adapter) if adapter.shared else id(adapter), [])
            group.append((node, ref))
            if len(group) == 1:
                entries[ref.path] = _tensors_of(ref)
                yield node, adapter.updates

    bases = fingerprints(owners())
    sites = {group[0][1].path: _record(group, base) for group, base in zip(groups.values(), bases, strict=True)}
    return Bundle(Path("the model"), name, sites, entries)


def _tensors_of(ref: AdapterRef) -> dict[str, Tensor]:
    found = {}
    for key, parameter in parameters_of(ref.adapter):
        if parameter.is_meta:
            raise StateError(
                f"{join(ref.path, key)} is on the meta device and holds no numbers: materialise the model first"
            )
        found[key] = parameter.detach()
    return found


def _record(group: list[Placed], base: dict[str, Any]) -> SiteRecord:
    """Returns the record of adapters that share their parameters; those of a single one in most cases."""
    node, ref = group[0]
    adapter = ref.adapter
    aliases: tuple[str, ...] = ()
    tied: dict[str, str] = {}
    if len(group) > 1 or len(node.paths) > 1 or adapter.absent:
        paths = [join(path, ref.adapter.parameter) for node, ref in group for path in node.paths]
        tied = {ref.path: ref.adapter.stored_as or ref.adapter.kind for _, ref in group[1:]}
        tied |= {path: kind for _, ref in group for path, kind in ref.adapter.absent}
        aliases = tuple(dict.fromkeys((*paths[1:], *tied)))
    return SiteRecord(
        path=ref.path,
        aliases=aliases,
        kind=adapter.stored_as or adapter.kind,
        config=adapter.config,
        extras=adapter.describe(),
        base=base,
        tied={path: kind for path, kind in tied.items() if kind},
    )
