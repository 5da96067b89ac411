"""Writing PEFT's folder: pieces to one set of tensors and the config that makes PEFT read them so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError, listing
from ..tree import walk
from .bundle import Bundle
from .factors import Factors, alpha_for
from .orient import outward
from .peft_config import VERSION
from .peft_full import Whole, whole
from .peft_keys import PREFIX
from .peft_layouts import LAYOUTS, PLAIN, Piece
from .peft_patterns import anchored, ends, shortest
from .trained import as_values

NO_TARGET = "dummy-target-modules"
"""What PEFT takes for targets where a config has none, and only whole modules were trained."""


def folder_of(bundle: Bundle, model: nn.Module | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config and the tensors of the folder.

    Raises:
        UnsupportedError: something that PEFT cannot hold, or that needs the model; names it.
    """
    bundle = as_values(bundle, model)
    nodes = walk(model) if model is not None else []
    modules = {path: node.module for node in nodes for path in node.paths} if model is not None else None
    left = {one.site: one for one in (outward(bundle, record) for record in bundle.sites.values())}
    pieces = [piece for layout in (PLAIN if bundle.by_segment else LAYOUTS) for piece in layout.take(left, modules)]
    if left:
        raise UnsupportedError(
            f"{bundle.path}: PEFT has no layer for these:\n"
            f"{listing([f'{site}: {one.kind}' for site, one in left.items()])}\nMerge them, or leave them out."
        )
    rest = whole(bundle.full, pieces, modules)
    tensors = {name: tensor for piece in pieces for name, tensor in piece.tensors.items()}
    tensors |= _biases(pieces) | rest.tensors
    config = _config(pieces, rest, None if model is None else [node.path for node in nodes])
    return config, {PREFIX + name: tensor for name, tensor in tensors.items()}


def _biases(pieces: Collection[Piece]) -> dict[str, Tensor]:
    """Returns the biases of B: where one layer has one, PEFT gives one to all."""
    if not any(piece.factors.bias is not None for piece in pieces):
        return {}
    without = [piece.key for piece in pieces if piece.bias is None]
    if without:
        raise UnsupportedError(
            "some pairs have a bias, and PEFT has lora_bias for all layers or none, and none for these:\n"
            f"{listing(without)}\nExport the two groups under two names."
        )
    return {str(piece.bias): _bias(piece.factors) for piece in pieces}


def _bias(factors: Factors) -> Tensor:
    return factors.b.new_zeros(factors.b.shape[0]) if factors.bias is None else factors.bias


def _config(pieces: Sequence[Piece], rest: Whole, known: Collection[str] | None) -> dict[str, Any]:
    """Returns adapter_config.json: for every option what most layers have, and patterns for the others."""
    rslora = _most([piece.factors.rslora for piece in pieces], False)
    factors = {piece.key: _flagged(piece.factors, rslora) for piece in pieces}
    ranks = {key: one.rank for key, one in factors.items()}
    alphas = {key: _whole_number(one.alpha) for key, one in factors.items()}
    # PEFT warns of every pattern that is meant for a parameter, though it obeys it: parameters get the defaults.
    first = [piece.key for piece in pieces if piece.parameter] or list(factors)
    rank, alpha = _most([(ranks[key], alphas[key]) for key in first], (8, 8))
    return {
        "peft_type": "LORA",
        "peft_version": VERSION,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": {anchored(key): value for key, value in ranks.items() if value != rank},
        "alpha_pattern": {anchored(key): value for key, value in alphas.items() if value != alpha},
        "lora_dropout": _dropout(pieces),
        "lora_bias": any(one.bias is not None for one in factors.values()),
        "bias": rest.bias,
        "fan_in_fan_out": _fan_in_fan_out(pieces),
        "target_modules": _targets(pieces, known),
        "target_parameters": _target_parameters(pieces, known) or None,
        "modules_to_save": rest.modules or None,
        "init_lora_weights": True,
        "use_dora": False,
    }


def _most(values: Sequence[Any], default: Any) -> Any:
    """Returns the value that stands most often, the first of several."""
    return Counter(values).most_common(1)[0][0] if values else default


def _flagged(factors: Factors, rslora: bool) -> Factors:
    """Returns the factors with the one flag that all layers share, and the alpha that gives the same scaling."""
    if factors.rslora == rslora:
        return factors
    return replace(factors, alpha=alpha_for(factors.scaling, factors.rank, rslora), rslora=rslora)


def _whole_number(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _dropout(pieces: Iterable[Piece]) -> float:
    """Returns the dropout of most layers; parameters cannot have one in PEFT."""
    pieces = list(pieces)
    return 0.0 if any(piece.parameter for piece in pieces) else _most([p.factors.dropout for p in pieces], 0.0)


def _fan_in_fan_out(pieces: Collection[Piece]) -> bool:
    transposed = any(piece.factors.kind == "transposed_linear" for piece in pieces)
    parameters = [piece.key for piece in pieces if piece.parameter]
    if transposed and parameters:
        raise UnsupportedError(
            "PEFT cannot have low-rank pairs of transposed linear layers (Conv1D) and of single parameters in one "
            f"adapter:\n{listing(parameters)}\nExport the two groups under two names."
        )
    return transposed


def _targets(pieces: Collection[Piece], known: Collection[str] | None) -> list[str] | str:
    if not pieces:
        return NO_TARGET
    paths = [piece.owner for piece in pieces if not piece.parameter]
    if "" in paths:
        raise UnsupportedError("(root): PEFT wraps modules inside a model, not the model itself")
    return shortest(paths, known)


def _target_parameters(pieces: Collection[Piece], known: Collection[str] | None) -> list[str]:
    found = sorted(piece.key for piece in pieces if piece.parameter)
    owners = {piece.owner for piece in pieces if piece.parameter}
    if "" in owners:
        raise UnsupportedError("(root): PEFT has no low-rank pairs for parameters of the model itself")
    also = [path for path in known or () if path not in owners and ends(path, owners)]
    if also:
        raise UnsupportedError(
            f"PEFT selects parameters by the end of their path, and these end alike:\n{listing(also)}\n"
            "Leave those experts out, or adapt all of them."
        )
    return found


def ready(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors as a file takes them: each in memory of its own."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
