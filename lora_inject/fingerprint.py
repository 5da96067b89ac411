"""Recognising the base that an adapter was trained on, whether it is stored in float32 or bfloat16."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from .host import Host, base_tensor
from .tree import walk

SAMPLE = 64
"""How many elements of a weight are hashed, evenly spread, the first and the last among them."""


def fingerprint(module: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns {"shape", "hash"} of the weight that a site adapts, as it is without merged updates.

    The hash is 8 bytes of blake2b over a fixed sample of elements, rounded to bfloat16. For an adapter of a whole
    block it covers a sample of every parameter of the block.

    Args:
        module: the host, or the module that will be one.
        names: the parameters that the adapter updates, the weight first; none for a block.
    """
    name = next(iter(names), None)
    tensors = _everything(module) if name is None else [_original(module, name)]
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(_sample(tensor))
    return {"shape": list(tensors[0].shape) if name else [], "hash": digest.hexdigest()}


def _original(module: Any, name: str) -> Tensor:
    kept = module.adapters.kept.get(name) if isinstance(module, Host) else None
    found: Tensor = base_tensor(module, name) if kept is None else kept.original(module, name)
    return found


def _everything(block: Any) -> list[Tensor]:
    nodes = [node.module for node in walk(block)]
    return [_original(module, name) for module in nodes for name, p in module._parameters.items() if p is not None]


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
