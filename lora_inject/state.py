"""Exporting the adapters of a model into a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapter import parameters_of
from .adapter_file import SiteRecord, metadata
from .bulk import uncollected
from .errors import StateError
from .fingerprint import fingerprints
from .refs import AdapterRef, chosen
from .safefile import write_tensors
from .sites import join
from .tree import walk


@uncollected()
def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Returns the tensors of one adapter, keyed as in the exported file; they share memory with the model.

    Raises:
        StateError: no adapter has that name.
    """
    return _tensors(chosen(walk(model), (name,)))


def _tensors(refs: list[AdapterRef]) -> dict[str, Tensor]:
    return {join(ref.path, key): parameter.detach() for ref in refs for key, parameter in parameters_of(ref.adapter)}


@uncollected()
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
    nodes = walk(model)
    refs = chosen(nodes, (name,))
    state = _tensors(refs)
    empty = next((key for key, tensor in state.items() if tensor.is_meta), None)
    if empty is not None:
        raise StateError(f"{empty} is on the meta device and holds no numbers: materialise the model first")
    aliases = {id(node.module): node.paths[1:] for node in nodes}
    bases = fingerprints((ref.module, ref.adapter.updates) for ref in refs)
    records = [_record(ref, aliases[id(ref.module)], base) for ref, base in zip(refs, bases, strict=True)]
    return write_tensors(path, state, metadata(name, records))


def _record(ref: AdapterRef, aliases: list[str], base: dict[str, Any]) -> SiteRecord:
    adapter = ref.adapter
    return SiteRecord(
        path=ref.path,
        aliases=tuple(join(alias, adapter.parameter) for alias in aliases),
        kind=adapter.kind,
        config=adapter.config,
        extras=adapter.describe(),
        base=base,
    )
