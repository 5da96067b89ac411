"""Recognising the base that an adapter was trained on, whether it is stored in float32 or bfloat16."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StateError
from .host import is_host, unmerged_tensor
from .quantized import stored_weight
from .safefile import joined
from .safewrite import raw_bytes
from .tree import INNER, Node, walk

SAMPLE = 64
"""How many elements of a weight are hashed, evenly spread, the first and the last among them."""
SMALL = 8 * SAMPLE
"""Weights of up to so many elements are joined before they are sampled, which is faster than one by one."""


def fingerprint(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns {"shape", "hash"} of the weight that a site adapts, as it is without merged updates.

    The hash is 8 bytes of blake2b over a fixed sample of elements, rounded to bfloat16. For an adapter of a whole
    block it covers a sample of every parameter of the block.

    Args:
        node: the host, or the module that will be one.
        names: the parameters that the adapter updates, the weight first; none for a block.

    Raises:
        StateError: the weight is on the meta device, and nothing says where its numbers are.
        UnsupportedError: it is offloaded and quantized in a way that loses what its numbers are made from.
    """
    return fingerprints([(node, names)])[0]


@torch.no_grad()
def fingerprints(places: Iterable[tuple[Node, tuple[str, ...]]]) -> list[dict[str, Any]]:
    """Returns what `fingerprint` does of many places, given as node and names."""
    shapes: list[list[int]] = []
    counts: list[int] = []
    tensors: list[Tensor] = []
    for node, names in places:
        if names:
            tensors.append(_original(node, names[0]))
            shapes.append(list(tensors[-1].shape))
            counts.append(1)
        else:
            own = _everything(node)
            tensors += own
            shapes.append([])
            counts.append(len(own))
    parts = iter(_samples(tensors))
    hashed = (next(parts) if count == 1 else b"".join(islice(parts, count)) for count in counts)
    return [
        {"shape": shape, "hash": hashlib.blake2b(part, digest_size=8).hexdigest()}
        for shape, part in zip(shapes, hashed, strict=True)
    ]


def _original(node: Node, name: str) -> Tensor:
    module: Any = node.module
    merged = is_host(module) and name in module._modules[INNER].kept
    plain = module._parameters.get(name)
    if type(plain) is nn.Parameter and not merged and not plain.is_meta:
        return plain
    found: Tensor = unmerged_tensor(module, name)
    away = _away(node, name) if found.is_meta else None
    stored = stored_weight(module, away) if not merged and name == "weight" else None
    if stored is not None:
        return stored.dequantized()
    return found if away is None else away(name)


def _away(node: Node, name: str) -> Callable[[str], Tensor]:
    """Returns what gives the module's tensors from where accelerate keeps them."""
    place = node.away
    if place is None:
        raise StateError(
            f"{node.key}{name} is on the meta device, so the base cannot be recognised by its numbers: load its weights"
        )
    return lambda own: place.tensor(node.key + own)


def _everything(block: Node) -> list[Tensor]:
    nodes = walk(block.module, block.key, block.away)
    return [_original(node, name) for node in nodes for name, p in node.module._parameters.items() if p is not None]


def _samples(tensors: list[Tensor]) -> list[bytes]:
    """Returns the bytes of each tensor's sample, those of one size, class, dtype and device formed together."""
    alike: dict[Any, list[int]] = {}
    for position, tensor in enumerate(tensors):
        alike.setdefault((tensor.numel(), type(tensor), tensor.dtype, tensor.device), []).append(position)
    found = [b""] * len(tensors)
    for positions in alike.values():
        whole = sample_bytes(_picked([tensors[position] for position in positions]))
        step = len(whole) // len(positions)
        for row, position in enumerate(positions):
            found[position] = whole[row * step : (row + 1) * step]
    return found


def _picked(alike: list[Tensor]) -> Tensor:
    """Returns the sampled elements of tensors of one size, one after the other."""
    size = alike[0].numel()
    index = sample_index(size).to(alike[0].device)
    if size <= SMALL and type(alike[0]) in (Tensor, nn.Parameter):
        return joined(alike).reshape(len(alike), size)[:, index].flatten()
    return torch.cat([torch.take(tensor, index) for tensor in alike])


def sample_index(size: int) -> Tensor:
    """Returns which elements of a flat weight of that size are hashed, int64."""
    index = torch.arange(min(SAMPLE, size))
    return index * (size - 1) // max(1, len(index) - 1)


def sample_bytes(picked: Tensor) -> bytes:
    """Returns what is hashed of the picked elements: their bytes in bfloat16."""
    return bytes(raw_bytes(picked.to(torch.bfloat16)))
