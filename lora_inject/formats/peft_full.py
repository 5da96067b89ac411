"""Parameters trained as a whole, in PEFT's three ways: modules_to_save, biases, and the base of an embedding."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, listing
from ..host import unmerged_tensor
from ..tree import walk
from .peft_layouts import Modules, Piece


@dataclass
class Whole:
    """What the folder holds beside low-rank pairs.

    Attributes:
        tensors: the values, by their names behind the prefix.
        modules: `modules_to_save`.
        bias: the config's `bias`.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    bias: str = "none"


def whole(full: Mapping[str, Tensor], pieces: Collection[Piece], modules: Modules) -> Whole:
    """Returns trained values as PEFT stores them.

    Args:
        full: trained values by path of the parameter.
        pieces: the low-rank layers.
        modules: the model's modules by path, or None.

    Raises:
        UnsupportedError: PEFT cannot hold them beside the low-rank layers; names them and why.
    """
    inner = {path: place for piece in pieces for path, place in piece.inner.items()}
    owners: dict[str, set[str]] = {}
    for path in full:
        owner, _, name = path.rpartition(".")
        owners.setdefault(owner, set()).add(name)
    found = Whole()
    saved = []
    for owner, names in owners.items():
        if names == {"bias"} or owner in inner:
            _beside(found, owner, names, inner, full, pieces)
        else:
            saved.append(owner)
    biased = [owner for owner, names in owners.items() if names == {"bias"}]
    found.bias = "none" if not biased else "lora_only" if all(owner in inner for owner in biased) else "all"
    found.modules = [path for path in saved if not any(path.startswith(f"{other}.") for other in saved)]
    for path in found.modules:
        _check_match(path, pieces, modules)
        found.tensors |= _module(path, full, modules)
    return found


def _beside(
    found: Whole,
    owner: str,
    names: set[str],
    inner: Mapping[str, str],
    full: Mapping[str, Tensor],
    pieces: Collection[Piece],
) -> None:
    """Adds values of a module that PEFT does not save as a whole."""
    embedded = any(piece.owner == owner and piece.factors.kind == "embedding" for piece in pieces)
    odd = sorted(names - {"bias"} - ({"weight"} if embedded else set()))
    if odd:
        raise UnsupportedError(
            f"{owner}: {', '.join(odd)}: trained as a whole beside a low-rank pair of the same module, which PEFT has "
            "only for embeddings and biases: merge the adapter into the base, or keep lora_inject's format"
        )
    for name in names:
        found.tensors[f"{inner.get(owner, owner)}.{name}"] = full[f"{owner}.{name}"]


def _check_match(path: str, pieces: Collection[Piece], modules: Modules) -> None:
    """Refuses a module whose name PEFT's looser rules would find elsewhere too."""
    if not path:
        raise UnsupportedError("(root): parameters of the model itself, trained as a whole: PEFT saves children only")
    others = [other for other in modules or () if other.endswith(path) and other != path]
    inside = re.compile(rf"(^|.*\.){re.escape(path)}($|\..*)")
    others += [piece.owner for piece in pieces if inside.match(piece.owner)]
    if others:
        raise UnsupportedError(
            f"{path}: trained as a whole: PEFT's modules_to_save would take these for it too:\n{listing(others)}\n"
            "Merge it into the base, or keep lora_inject's format."
        )


def _module(path: str, full: Mapping[str, Tensor], modules: Modules) -> dict[str, Tensor]:
    """Returns all tensors of a module, those that were not trained from the model: PEFT wants it complete."""
    module = modules.get(path) if modules else None
    if module is None:
        return {name: value for name, value in full.items() if name.startswith(f"{path}.")}
    buffers = [name for name, _ in module.named_buffers() if name in module.state_dict()]
    if buffers:
        raise UnsupportedError(
            f"{path}: {', '.join(buffers[:3])}: PEFT stores a trained module with its buffers, which are no part of an "
            "adapter here: keep lora_inject's format"
        )
    found: dict[str, Tensor] = {}
    for node in walk(module):
        for name in node.module._parameters:
            key = ".".join(part for part in (path, node.path, name) if part)
            tensor = full[key] if key in full else _stored(node.module, name, key)
            found |= {} if tensor is None else {key: tensor}
    return found


def _stored(module: nn.Module, name: str, key: str) -> Tensor | None:
    tensor = unmerged_tensor(module, name)
    if tensor is None:
        return None
    if tensor.is_meta:
        raise UnsupportedError(
            f"{key}: PEFT stores a trained module as a whole, and this parameter of it was not trained: its value "
            "would come from the model, whose weights are not at hand: export from the model itself"
        )
    held: torch.Tensor = tensor.detach().cpu()
    return held
