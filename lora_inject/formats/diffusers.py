"""The files of diffusers' pipelines: pytorch_lora_weights.safetensors, paths behind the name of their component."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError, UnsupportedError, listing
from ..safefile import parse_json
from ..safewrite import write_tensors
from ..tree import walk
from .bundle import Bundle, Source
from .components import check_one, clip_paths
from .content import Content
from .diffusers_keys import ALPHA, BIAS, ROW_A, ROW_B, A, B, Spelling, component_of, parse
from .diffusers_write import METADATA, check_convs, tensors_and_metadata
from .factors import Factors
from .format import Format
from .peft_config import PeftConfig, parse_config
from .resolve import Parsed, resolve

FEATURES = {"lora_magnitude_vector": "DoRA's magnitudes", "dora_scale": "DoRA's magnitudes"}
FEATURES |= {"hada_": "LoHa's Hadamard products", "lokr_": "LoKr's Kronecker products"}
PAIRS = ({A, B}, {A, B, BIAS}, {A, B, ALPHA}, {A, B, BIAS, ALPHA}, {ROW_A, ROW_B})

Modules = Mapping[str, Mapping[str, str]]
"""Keys of the file by the module's path in it, then by what they hold."""


class Diffusers(Format):
    """Pairs with whole paths; rank, alpha and their exceptions per component in the metadata."""

    name = "diffusers"

    def recognises(self, content: Content) -> bool:
        if content.header is None or content.config is not None:
            return False
        found = [parsed for name in content.names if (parsed := parse(name)) is not None]
        said = METADATA in content.metadata
        return any(held in (A, B) and (said or component_of(path)) for path, held in found)

    def read(self, content: Content, model: nn.Module | None) -> Source:
        configs = _configs(content)
        modules = _by_module(content)
        alphas = content.numbers(keys[ALPHA] for keys in modules.values() if ALPHA in keys)
        tensors = content.read(model, [key for keys in modules.values() for what, key in keys.items() if what != ALPHA])
        spelling = Spelling(model)
        if model is not None and not spelling.parts.several:
            known = {name for node in walk(model) for path in node.paths for name in spelling(path)}
            check_one(content.path, {component_of(path) for path in modules if path in known})
        parsed = Parsed(
            path=content.path,
            factors=[_factors(content, path, keys, tensors, alphas, configs) for path, keys in modules.items()],
            spell=spelling,
        )
        bundle = resolve(parsed, model)
        check_convs(bundle, model)
        return bundle

    def write_sites(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        return write_tensors(path, *tensors_and_metadata(bundle, model))


def _configs(content: Content) -> dict[str, PeftConfig]:
    """Returns the config of every component, under "" for a file of one model without its name."""
    text = content.metadata.get(METADATA)
    if text is None:
        return {}
    where = f"{content.file}: metadata {METADATA!r}"
    raw = parse_json(text, where)
    if not isinstance(raw, dict):
        raise FormatError(f"{where}: must be a JSON object")
    split: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in raw.items():
        component = component_of(key)
        split[component][key.removeprefix(f"{component}.")] = value
    configs = {name: parse_config(own, Path(f"{where}: {name}" if name else where)) for name, own in split.items()}
    packed = [name for name, config in configs.items() if config.parameters]
    if packed:
        raise UnsupportedError(
            f"{where}: {packed[0]}: target_parameters: pairs of single parameters are read from PEFT's own files"
        )
    return configs


def _by_module(content: Content) -> Modules:
    """Returns the keys of all pairs.

    Raises:
        FormatError: tensors of a feature that has no counterpart here, of no known meaning, or half a pair.
    """
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    stray: list[str] = []
    for key in content.names:
        parsed = parse(key)
        if parsed is None or parsed[1] in modules[parsed[0]]:
            stray.append(key)
        else:
            modules[parsed[0]][parsed[1]] = key
    for part, feature in FEATURES.items():
        named = [key for key in stray if f".{part}" in key]
        if named:
            raise FormatError(
                f"{content.path}: {feature}, which have no counterpart here, in {len(named)} tensors:\n"
                f"{listing(named)}\nMerge the file into its base with the program that it comes from."
            )
    found = {path: keys for path, keys in modules.items() if set(keys) in PAIRS}
    stray += [key for path, keys in modules.items() if path not in found for key in keys.values()]
    if stray:
        raise FormatError(
            f"{content.path}: {len(stray)} tensors of no known meaning, or without their other half:\n{listing(stray)}"
        )
    return found


def _factors(
    content: Content,
    path: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    configs: Mapping[str, PeftConfig],
) -> Factors:
    rows = ROW_A in keys
    a, b = (tensors[keys[name]] for name in ((ROW_A, ROW_B) if rows else (A, B)))
    if min(a.dim(), b.dim()) < 2:
        raise FormatError(f"{content.path}: {path}: A and B must have two axes or more")
    found = Factors(
        path=path,
        a=a,
        b=b,
        bias=tensors[keys[BIAS]] if BIAS in keys else None,
        alpha=alphas[keys[ALPHA]] if ALPHA in keys else float(a.shape[0]),
        kind="embedding" if rows else "conv" if a.dim() > 2 else "linear",
    )
    config = configs.get(component_of(path))
    return found if config is None else _configured(found, config, ALPHA in keys)


def _configured(factors: Factors, config: PeftConfig, has_alpha: bool) -> Factors:
    """Returns the factors with the scale that the metadata give them.

    Raises:
        FormatError: the metadata contradict the tensors.
    """
    paths = clip_paths(factors.path.removeprefix(f"{component_of(factors.path)}."))
    rank = next((rank for one in paths if (rank := config.rank_of(one)) != config.rank), config.rank)
    alpha = next((alpha for one in paths if (alpha := config.alpha_of(one)) != config.alpha), float(config.alpha))
    if rank != factors.rank:
        raise FormatError(f"{config.file}: rank {rank} for {factors.path}, whose tensors have rank {factors.rank}")
    if has_alpha and (alpha != factors.alpha or config.rslora):
        raise FormatError(f"{config.file}: alpha {alpha:g} for {factors.path}, whose tensor says {factors.alpha:g}")
    return replace(factors, alpha=alpha, rslora=config.rslora, dropout=config.dropout)
