"""Exporting the adapters of a model into a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapter import parameters_of
from .adapter_file import SiteRecord
from .bulk import uncollected
from .errors import StateError
from .fingerprint import fingerprints
from .formats import Bundle, Serve, write_adapter
from .refs import AdapterRef, chosen, unique
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
    walked = walk(model)
    nodes = {id(node.module): node for node in walked}
    groups: dict[int, list[AdapterRef]] = {}
    for ref in chosen(walked, (name,)):
        groups.setdefault(pair_of(ref.adapter), []).append(ref)
    owners = [refs[0] for refs in groups.values()]
    entries = {ref.path: {key: p.detach() for key, p in parameters_of(ref.adapter)} for ref in owners}
    empty = [join(path, key) for path, own in entries.items() for key, tensor in own.items() if tensor.is_meta]
    if empty:
        raise StateError(f"{empty[0]} is on the meta device and holds no numbers: materialise the model first")
    bases = fingerprints((nodes[id(ref.module)], ref.adapter.updates) for ref in owners)
    sites = {
        refs[0].path: _record(refs, [nodes[id(ref.module)] for ref in refs], base)
        for refs, base in zip(groups.values(), bases, strict=True)
    }
    return Bundle(Path("the model"), name, sites, entries)


def _record(refs: list[AdapterRef], nodes: list[Node], base: dict[str, Any]) -> SiteRecord:
    """Returns the record of adapters that share their parameters; those of a single one in most cases."""
    adapter = refs[0].adapter
    paths = [join(path, ref.adapter.parameter) for ref, node in zip(refs, nodes, strict=True) for path in node.paths]
    further: dict[str, str] = {}
    if len(refs) > 1 or adapter.absent:
        further = {ref.path: ref.adapter.stored_as or ref.adapter.kind for ref in refs[1:]}
        further |= {path: kind for ref in refs for path, kind in ref.adapter.absent}
    return SiteRecord(
        path=paths[0],
        aliases=tuple(dict.fromkeys((*paths[1:], *further))),
        kind=adapter.stored_as or adapter.kind,
        config=adapter.config,
        extras=adapter.describe(),
        base=base,
        tied={path: kind for path, kind in further.items() if kind},
    )
