"""Exporting the adapters of a model into a file."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from .adapter_file import SiteRecord
from .errors import StateError
from .fingerprint import fingerprint
from .formats import Bundle, write_adapter
from .refs import AdapterRef, adapters, pick
from .sites import join
from .tree import Node, walk


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Returns the tensors of one adapter, keyed as in the exported file; they share memory with the model.

    Raises:
        StateError: no adapter has that name.
    """
    return {
        join(ref.path, key): parameter.detach()
        for ref in _refs(model, name)
        for key, parameter in ref.adapter.named_parameters()
    }


def export(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, format: str = "lora_inject"
) -> Path:
    """Writes one adapter into a file, by default of the format that docs/file-format.md describes.

    That file holds the adapter's tensors, its options, and a fingerprint of the base; `load` and every safetensors
    reader can open it. It is written beside its final name, synced and renamed: an older file stays whole until then.

    Args:
        model: a model with adapters, merged or not.
        path: the file to write, or the folder where the format is one.
        name: which adapter.
        format: whose format; docs/formats.md lists them.

    Returns:
        The path of the file.

    Raises:
        StateError: no adapter has that name, or its parameters are on the meta device.
        ConfigError: no such format.
        UnsupportedError: the format cannot hold what the adapter does; names it.
        FormatError: the file cannot be written.
    """
    return write_adapter(bundle_of(model, name), path, format, model)


def bundle_of(model: nn.Module, name: str = "default") -> Bundle:
    """Returns one adapter of a model as a value: sites, options, fingerprints, and tensors that share its memory.

    Raises:
        StateError: no adapter has that name, or its parameters are on the meta device.
    """
    state = adapter_state(model, name)
    empty = next((key for key, tensor in state.items() if tensor.is_meta), None)
    if empty is not None:
        raise StateError(f"{empty} is on the meta device and holds no numbers: materialise the model first")
    nodes = {id(node.module): node for node in walk(model)}
    records = [_record(ref, nodes[id(ref.module)]) for ref in _refs(model, name)]
    return write_tensors(path, state, metadata(name, records))


def _refs(model: nn.Module, name: str) -> list[AdapterRef]:
    pick(model, (name,))
    return [ref for ref in adapters(model) if ref.name == name]


def _record(ref: AdapterRef, node: Node) -> SiteRecord:
    adapter = ref.adapter
    return SiteRecord(
        path=ref.path,
        aliases=tuple(join(alias, adapter.parameter) for alias in node.paths[1:]),
        kind=adapter.kind,
        config=adapter.config,
        extras=adapter.describe(),
        base=fingerprint(node, adapter.updates),
    )
