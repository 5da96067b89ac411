"""Writing kohya's names and tensors."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from ..adapter_file import SiteRecord
from ..errors import UnsupportedError, listing
from ..rows import wide
from ..tree import walk
from .bundle import Bundle
from .factors import alpha_for
from .kohya_names import Spelling
from .orient import outward

KINDS = ("linear", "conv", "full")
_NORMS = (nn.LayerNorm, nn.GroupNorm)


def tensors_of(bundle: Bundle, model: nn.Module | None) -> dict[str, Tensor]:
    """Returns the tensors of a file by their keys in it.

    Raises:
        UnsupportedError: sites that the format cannot hold, or whose names would be those of other modules too.
    """
    spelling = Spelling(model, bundle.sites)
    _check(bundle)
    names = {
        record.owner(path): spelling.write(record.owner(path), bundle.path) for path, record in bundle.sites.items()
    }
    _check_names(bundle, names, spelling, model)
    modules = {} if model is None else {path: node.module for node in walk(model) for path in node.paths}
    found: dict[str, Tensor] = {}
    for path, record in bundle.sites.items():
        owner = record.owner(path)
        own = _whole(bundle, record, modules.get(owner)) if record.kind == "full" else _pair(bundle, record)
        found |= {f"{names[owner]}.{what}": tensor for what, tensor in own.items()}
    return found


def _pair(bundle: Bundle, record: SiteRecord) -> dict[str, Tensor]:
    factors = outward(bundle, record)
    alpha = torch.tensor(alpha_for(factors.scaling, factors.rank), dtype=torch.float64)
    # Most programs read a float32 alpha; only one that float32 does not hold is worth the wider type.
    alpha = alpha.float() if alpha.float().double() == alpha else alpha
    return {"alpha": alpha, "lora_down.weight": factors.a, "lora_up.weight": factors.b}


def _whole(bundle: Bundle, record: SiteRecord, module: nn.Module | None) -> dict[str, Tensor]:
    update, scaling = bundle.entries[record.path]["lora_dense"], record.config.scaling
    names = ("w_norm", "b_norm") if isinstance(module, _NORMS) else ("diff", "diff_b")
    key = names[("weight", "bias").index(record.extras["parameter"])]
    return {key: update if scaling == 1 else (wide(update) * scaling).to(update.dtype)}


def _check(bundle: Bundle) -> None:
    """Refuses what has no place in the format."""
    ways: dict[str, Callable[[SiteRecord], bool]] = {
        "sites that are neither linear layers nor convolutions": lambda record: record.kind not in KINDS,
        "parameters other than weight and bias": lambda record: (
            record.kind == "full" and record.extras["parameter"] not in ("weight", "bias")
        ),
        "biases of the low-rank path": lambda record: record.config.bias,
    }
    for what, meets in ways.items():
        found = [f"{path} ({record.kind})" for path, record in bundle.sites.items() if meets(record)]
        if found:
            raise UnsupportedError(
                f"{bundle.path}: kohya's files cannot hold {what}:\n{listing(found)}\nKeep lora_inject's format, or "
                "merge these sites into the base."
            )


def _check_names(bundle: Bundle, names: Mapping[str, str], spelling: Spelling, model: nn.Module | None) -> None:
    """Refuses names that a reader could take for another module of the model, or of the adapter."""
    holders: dict[str, set[object]] = defaultdict(set)
    for owner, name in names.items():
        holders[name].add(owner)
    clashes = [f"{name}: {' or '.join(map(str, found))}" for name, found in holders.items() if len(found) > 1]
    if model is not None:
        modules: dict[str, dict[int, str]] = defaultdict(dict)
        for node in walk(model):
            for path in node.paths:
                for name in spelling(path):
                    modules[name][id(node.module)] = path
        clashes += [f"{name}: {' or '.join(modules[name].values())}" for name in holders if len(modules[name]) > 1]
    if clashes:
        raise UnsupportedError(
            f"{bundle.path}: in kohya's spelling, '_' for '.', different modules would have one name:\n"
            f"{listing(list(dict.fromkeys(clashes)))}\nKeep a format with whole paths (lora_inject, peft, diffusers)."
        )


def network(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the metadata that sd-scripts writes about rank and alpha: one number, or "Dynamic" for several."""
    down = {key.removesuffix(".lora_down.weight"): tensor for key, tensor in tensors.items() if "lora_down" in key}
    kernels = {key for key, tensor in down.items() if tensor[0].numel() > tensor.shape[1]}
    linear = [key for key in down if key not in kernels]
    args = {}
    if kernels:
        dim, alpha = _common(down, tensors, kernels)
        args = {"conv_dim": dim, "conv_alpha": alpha}
    dim, alpha = _common(down, tensors, linear or kernels)
    whole = any(not key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")) for key in tensors)
    return {
        "ss_network_module": "lycoris.kohya" if whole else "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(args),
    }


def _common(down: Mapping[str, Tensor], tensors: Mapping[str, Tensor], modules: Collection[str]) -> tuple[str, str]:
    """Returns rank and alpha of these modules."""
    ranks = {str(down[module].shape[0]) for module in modules}
    alphas = {str(float(tensors[f"{module}.alpha"])) for module in modules}
    return "".join(ranks) if len(ranks) == 1 else "Dynamic", "".join(alphas) if len(alphas) == 1 else "Dynamic"
