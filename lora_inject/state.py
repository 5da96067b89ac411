"""Exporting the adapters of a model into a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapter_file import SiteRecord, metadata
from .errors import StateError
from .fingerprint import fingerprint
from .host import Host
from .refs import pick
from .safefile import write_tensors
from .tree import Node, walk


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Returns the tensors of one adapter, keyed as in the exported file; they share memory with the model.

    Raises:
        StateError: no adapter has that name.
    """
    return {
        f"{node.path}.{key}" if node.path else key: parameter.detach()
        for node, host in _hosts(model, name)
        for key, parameter in host.adapters[name].named_parameters()
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
    records = [_record(node, host, name) for node, host in _hosts(model, name)]
    return write_tensors(path, state, metadata(name, records))


def _hosts(model: nn.Module, name: str) -> list[tuple[Node, Host]]:
    pick(model, (name,))
    return [
        (node, node.module) for node in walk(model) if isinstance(node.module, Host) and name in node.module.adapters
    ]


def _record(node: Node, host: Host, name: str) -> SiteRecord:
    adapter: Any = host.adapters[name]
    return SiteRecord(
        path=node.path,
        aliases=tuple(node.paths[1:]),
        kind=adapter.kind,
        config=adapter.config,
        extras=adapter.describe(),
        base=fingerprint(host, type(adapter)),
    )
