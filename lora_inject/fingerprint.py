"""Recognising the base that an adapter was trained on, whether it is stored in float32 or bfloat16."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from .errors import StateError
from .host import Host, base_tensor
from .quantized import stored_weight
from .tree import Node, walk

SAMPLE = 64
"""How many elements of a weight are hashed, evenly spread, the first and the last among them."""


def fingerprint(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns {"shape", "hash"} of the weight that a site adapts, as it is without merged updates.

    The hash is 8 bytes of blake2b over a fixed sample of elements, rounded to bfloat16. For an adapter of a whole
    block it covers a sample of every parameter of the block.

    Args:
        node: the host, or the module that will be one.
        names: the parameters that the adapter updates, the weight first; none for a block.

    Raises:
        StateError: the weight is on the meta device, and nothing says where its numbers are.
    """
    name = next(iter(names), None)
    tensors = _everything(node) if name is None else [_original(node, name)]
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(_sample(tensor))
    return {"shape": list(tensors[0].shape) if name else [], "hash": digest.hexdigest()}


def _original(node: Node, name: str) -> Tensor:
    module: Any = node.module
    kept = module.adapters.kept.get(name) if isinstance(module, Host) else None
    found: Tensor = base_tensor(module, name) if kept is None else kept.original(module, name)
    stored = stored_weight(module) if kept is None and name == "weight" and not found.is_meta else None
    if stored is not None:
        return stored.dequantized()
    if not found.is_meta:
        return found
    if node.away is None:
        raise StateError(
            f"{node.key}{name} is on the meta device, so the base cannot be recognised by its numbers: load its weights"
        )
    return node.away.tensor(node.key + name)


def _everything(block: Node) -> list[Tensor]:
    nodes = walk(block.module, block.key, block.away)
    return [_original(node, name) for node in nodes for name, p in node.module._parameters.items() if p is not None]


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    return sample_bytes(flat[sample_index(flat.numel()).to(flat.device)])


def sample_index(size: int) -> Tensor:
    """Returns which elements of a flat weight of that size are hashed, int64."""
    index = torch.arange(min(SAMPLE, size))
    return index * (size - 1) // max(1, len(index) - 1)


def sample_bytes(picked: Tensor) -> bytes:
    """Returns what is hashed of the picked elements: their bytes in bfloat16."""
    return bytes(picked.to(torch.bfloat16).cpu().view(torch.uint8).tolist())
