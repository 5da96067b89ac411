"""Exporting the adapters of a model into a file."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from .adapter_file import SiteRecord, metadata
from .errors import StateError
from .fingerprint import fingerprint
from .refs import AdapterRef, adapters, pick
from .safefile import write_tensors
from .sites import join
from .tree import walk


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


def export(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> Path:
    """Writes one adapter into a safetensors file that `load` and every safetensors reader can open.

    The file holds the adapter's tensors, its options, and a fingerprint of the base; docs/file-format.md describes
    it. It is written beside its final name, synced and renamed: an older file stays whole until then.

    Args:
        model: a model with adapters, merged or not.
        path: the file to write.
        name: which adapter.

    Returns:
        The path of the file.

    Raises:
        StateError: no adapter has that name, or its parameters are on the meta device.
        FormatError: the file cannot be written.
    """
    state = adapter_state(model, name)
    empty = next((key for key, tensor in state.items() if tensor.is_meta), None)
    if empty is not None:
        raise StateError(f"{empty} is on the meta device and holds no numbers: materialise the model first")
    aliases = {id(node.module): node.paths[1:] for node in walk(model)}
    records = [_record(ref, aliases[id(ref.module)]) for ref in _refs(model, name)]
    return write_tensors(path, state, metadata(name, records))


def _refs(model: nn.Module, name: str) -> list[AdapterRef]:
    pick(model, (name,))
    return [ref for ref in adapters(model) if ref.name == name]


def _record(ref: AdapterRef, aliases: list[str]) -> SiteRecord:
    adapter = ref.adapter
    return SiteRecord(
        path=ref.path,
        aliases=tuple(join(alias, adapter.parameter) for alias in aliases),
        kind=adapter.kind,
        config=adapter.config,
        extras=adapter.describe(),
        base=fingerprint(ref.module, adapter.updates),
    )
