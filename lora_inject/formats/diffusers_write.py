"""Writing diffusers' tensors, and the config of every component that says how to use them."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError, listing
from ..tree import walk
from .bundle import Bundle
from .components import TEXT_ENCODERS, clip_paths
from .diffusers_keys import BIAS, A, B, Spelling, keys
from .factors import Factors, alpha_for
from .orient import outward
from .peft_limits import check_conv
from .peft_patterns import anchored, shortest

METADATA = "lora_adapter_metadata"
KINDS = ("linear", "conv")

Sites = Mapping[str, Factors]
"""The pairs of one component by their path in it, as files spell it."""


def tensors_and_metadata(bundle: Bundle, model: nn.Module | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file by their keys in it, and its metadata.

    Raises:
        UnsupportedError: sites that the format cannot hold.
    """
    _check(bundle)
    check_convs(bundle, model)
    spelling = Spelling(model, bundle.sites)
    components: dict[str, dict[str, Factors]] = defaultdict(dict)
    for path, record in bundle.sites.items():
        component, rest = spelling.write(path, bundle.path)
        components[component][rest] = outward(bundle, record)
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for component, sites in components.items():
        text = component in TEXT_ENCODERS
        for path, factors in sites.items():
            tensors |= _tensors(keys(component, path), factors, any(one.bias is not None for one in sites.values()))
        known = None if model is None else {rest for part, rest in _paths(spelling, model) if part == component}
        said |= {f"{component}.{key}": value for key, value in _config(sites, known, text).items()}
    return tensors, {"format": "pt", METADATA: json.dumps(said, indent=2, sort_keys=True)}


def _paths(spelling: Spelling, model: nn.Module) -> list[tuple[str | None, str]]:
    return [spelling.parts.split(path) for node in walk(model) for path in node.paths]


def _tensors(names: Mapping[str, str], factors: Factors, biased: bool) -> dict[str, Tensor]:
    """Returns A, B, and where any pair of the component has a bias, which then all must have, that or zeros."""
    found = {names[A]: factors.a, names[B]: factors.b}
    if biased:
        found[names[BIAS]] = factors.b.new_zeros(factors.b.shape[0]) if factors.bias is None else factors.bias
    return found


def _config(sites: Sites, known: Collection[str] | None, text: bool) -> dict[str, Any]:
    """Returns the LoRA config of one component, in PEFT's words.

    Rank and alpha are the most frequent ones, patterns name the rest. Patterns and targets of a text encoder leave
    out CLIP's level `text_model`, which not all versions of transformers have: they match the end of a path.
    """
    rslora = all(factors.rslora for factors in sites.values())
    ranks = {path: factors.rank for path, factors in sites.items()}
    alphas = {
        path: factors.alpha if rslora else alpha_for(factors.scaling, factors.rank) for path, factors in sites.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    dropouts = {factors.dropout for factors in sites.values()}

    def pattern(path: str) -> str:
        return re.escape(clip_paths(path)[-1]) if text else anchored(path)

    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": rslora,
        "use_dora": False,
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "bias": "none",
        "lora_bias": any(factors.bias is not None for factors in sites.values()),
        "target_modules": [clip_paths(path)[-1] for path in sites] if text else shortest(list(sites), known),
        "rank_pattern": {pattern(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {pattern(path): value for path, value in alphas.items() if value != alpha},
    }


def _check(bundle: Bundle) -> None:
    found = [f"{path} ({record.kind})" for path, record in bundle.sites.items() if record.kind not in KINDS]
    found += [f"{path} (a parameter trained as a whole)" for path in bundle.full]
    if found:
        raise UnsupportedError(
            f"{bundle.path}: diffusers' files hold linear layers and convolutions, and not these sites:\n"
            f"{listing(found)}\nKeep lora_inject's format, or merge these sites into the base."
        )


def check_convs(bundle: Bundle, model: nn.Module | None) -> None:
    """Refuses convolutions whose low-rank path diffusers, through PEFT, runs over another grid than the base's.

    Raises:
        UnsupportedError: there is one.
    """
    modules = {} if model is None else {path: node.module for node in walk(model) for path in node.paths}
    for path, record in bundle.sites.items():
        if record.kind == "conv" and path in modules:
            check_conv(outward(bundle, record), modules[path])
