"""torchtune's format: one file of `<path>.lora_a.weight` and `.lora_b.weight`, rows of q and k in Meta's order."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError, MismatchError, UnsupportedError, listing
from ..safefile import parse_json
from ..safewrite import write_tensors
from .bundle import Bundle, Source
from .checks import number, whole
from .content import CONFIG, Content
from .factors import Factors
from .format import Format
from .pairs import Suffixes, paired, rank_of
from .pieces import cut, joined
from .refusals import matrices_of, refuse
from .resolve import Parsed, resolve
from .rotary import to_halves, to_pairs
from .text_model import TextModel, text_model
from .uniform import uniform

SUFFIXES = Suffixes(".lora_a.weight", ".lora_b.weight", {".magnitude": "DoRA's magnitude"})
OPTIONS = "lora_config"
"""Key of the metadata under which the scale stands in the files that are written here: torchtune keeps it elsewhere."""
LAYER = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
FUSED_LAYER = {
    "self_attn.qkv_proj": "attn.q_proj attn.k_proj attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_up_proj": "mlp.w1 mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
"""Modules of a layer in transformers, and those of torchtune that hold the same rows one after the other."""


@dataclass(frozen=True)
class Family:
    """How torchtune stores a family of models, as its functions `*_hf_to_tune` have it.

    Attributes:
        layer: transformers' modules of a layer and torchtune's.
        rotary: whether rows of q and k are in Meta's order, neighbours rotated together.
        head: whether the output layer can be one of its own.
    """

    layer: Mapping[str, str]
    rotary: bool
    head: bool = True


FAMILIES = {
    "llama": Family(LAYER, True),
    "mistral": Family(LAYER, True),
    "gemma": Family(LAYER, True, head=False),
    "gemma2": Family(LAYER, True, head=False),
    "qwen2": Family(LAYER, False),
    "phi3": Family(FUSED_LAYER, False),
}


@dataclass(frozen=True)
class Layout:
    """The names and rows of one model in both programs."""

    text: TextModel
    family: Family

    @property
    def stem(self) -> str:
        """What stands before `layers` in transformers' paths."""
        return self.text.embedding.rpartition(".")[0] + "." if "." in self.text.embedding else ""

    def theirs(self, path: str) -> list[str]:
        """Returns torchtune's paths of the rows of a module, none where torchtune has no LoRA for it."""
        if path and path == self.text.head:
            return ["output"] if self.family.head and not self.text.tied else []
        found = re.fullmatch(rf"{re.escape(self.stem)}layers\.(\d+)\.(.+)", path)
        parts = self.family.layer.get(found[2], "").split() if found else []
        return [f"layers.{found[1]}.{part}" for part in parts] if found else []

    def sizes(self, path: str, parts: list[str]) -> list[int]:
        """Returns how many rows of a module each of torchtune's holds."""
        if len(parts) != 3:
            return [self.shape(path)[0] // len(parts)] * len(parts)
        return [self.text.head_dim * heads for heads in (self.text.heads, self.text.kv_heads, self.text.kv_heads)]

    def shape(self, path: str) -> tuple[int, int]:
        """Returns the shape of a linear layer's weight, however that is stored."""
        layer: Any = self.text.modules[path]
        return layer.out_features, layer.in_features

    def heads(self, part: str) -> int | None:
        """Returns how many rotary heads in Meta's order the rows of a module of torchtune are, None for other rows."""
        kinds = {"q_proj": self.text.heads, "k_proj": self.text.kv_heads}
        return kinds.get(part.rpartition(".")[2]) if self.family.rotary else None


class Torchtune(Format):
    """A safetensors file, or the pickle that torchtune writes where pickles are allowed."""

    name = "torchtune"

    def recognises(self, content: Content) -> bool:
        return any(name.endswith((SUFFIXES.a, SUFFIXES.b)) for name in content.names)

    def read(self, content: Content, model: nn.Module | None) -> Source:
        stems = paired(content.names, SUFFIXES, content.path)
        rank, alpha = _scale(content)
        layout = _layout(model, content.path)
        _check_ranks(stems, rank, content)
        tensors = content.read(model)
        parts: dict[str, Factors] = {}
        for stem in stems:
            a, b = tensors[stem + SUFFIXES.a], tensors[stem + SUFFIXES.b]
            parts[stem] = Factors(path=stem, a=a, b=_halves(b, layout.heads(stem), stem), alpha=alpha)
        return resolve(Parsed(path=content.path, factors=_modules(parts, layout, content.path)), model)

    def write_sites(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        factors, layout = matrices_of(bundle, "torchtune"), _layout(model, bundle.path)
        unknown = [
            f"{one.site}: torchtune has no LoRA there"
            for one in factors
            if one.parameter is not None or not layout.theirs(one.path)
        ]
        refuse(bundle.path, "torchtune", unknown)
        parts = [part for one in factors for part in _parts(one, layout, bundle.path)]
        _, rank, factors = uniform(parts)
        tensors: dict[str, Tensor] = {}
        for one in factors:
            heads = layout.heads(one.path)
            tensors[one.path + SUFFIXES.a] = one.a
            tensors[one.path + SUFFIXES.b] = one.b if heads is None else to_pairs(one.b, heads, one.path)
        options = {"r": rank, "lora_alpha": factors[0].alpha}
        return write_tensors(path, tensors, {"format": "pt", OPTIONS: json.dumps(options)})


def _check_ranks(stems: Iterable[str], wanted: int, content: Content) -> None:
    shapes = content.shapes
    for stem in stems:
        rank = rank_of(stem, shapes[stem + SUFFIXES.a], shapes[stem + SUFFIXES.b], content.path)
        if rank != wanted:
            raise FormatError(f"{content.path}: {stem}: rank {rank} in its tensors, r = {wanted} in its config")


def _scale(content: Content) -> tuple[int, float]:
    """Returns rank and alpha, from what this package writes into the file or torchtune beside it."""
    config, where = content.config, f"{content.file.parent / CONFIG}"
    if OPTIONS in content.metadata:
        where = f"{content.file}: metadata {OPTIONS!r}"
        config = parse_json(content.metadata[OPTIONS], where)
    if not isinstance(config, dict):
        raise FormatError(
            f"{content.path}: nothing says how strong the adapter is: torchtune has rank and alpha in its recipe. Put "
            f'an {CONFIG} with {{"r": lora_rank, "lora_alpha": lora_alpha}} of the recipe beside the file, and name '
            "that adapter_model.safetensors or adapter_0.pt"
        )
    odd = [name for name in ("use_dora", "use_rslora") if config.get(name)]
    if odd:
        raise UnsupportedError(f"{where}: {', '.join(odd)}: torchtune's adapters know only alpha / rank")
    return whole(config, "r", where), number(config, "lora_alpha", where)


def _layout(model: nn.Module | None, where: Path) -> Layout:
    text = text_model(model, where, "how many heads the model has, whose rows torchtune keeps in an order of its own")
    if text.family not in FAMILIES:
        raise UnsupportedError(
            f"{where}: how torchtune stores models of the family {text.family!r} is unknown here: known are "
            f"{', '.join(FAMILIES)}"
        )
    return Layout(text, FAMILIES[text.family])


def _halves(b: Tensor, heads: int | None, stem: str) -> Tensor:
    return b if heads is None else to_halves(b, heads, stem)


def _parts(one: Factors, layout: Layout, where: Path) -> list[Factors]:
    """Returns the updates of torchtune's modules, from that of a module of transformers."""
    names = layout.theirs(one.path)
    sizes = _fitting(one, one.path, names, layout, where)
    return [replace(part, path=name) for name, part in zip(names, cut(one, sizes), strict=True)]


def _fitting(one: Factors, path: str, names: list[str], layout: Layout, where: Path) -> list[int]:
    """Returns the rows of each part of a module, after checking that the update has the shape of its weight."""
    if path not in layout.text.modules:
        raise MismatchError(f"{where}: {path}: the model has no such module")
    wanted = layout.shape(path)
    sizes = layout.sizes(path, names)
    rows = sizes[names.index(one.path)] if one.path in names else wanted[0]
    found = (one.b.shape[0], one.a.shape[1])
    if found != (rows, wanted[1]) or sum(sizes) != wanted[0]:
        raise MismatchError(f"{where}: {one.path}: an update of shape {found}, where the model has {(rows, wanted[1])}")
    return sizes


def _modules(parts: Mapping[str, Factors], layout: Layout, where: Path) -> Iterable[Factors]:
    """Returns the updates of transformers' modules, from those of torchtune's."""
    owners = {part: path for path in layout.text.modules for part in layout.theirs(path)}
    strangers = [part for part in parts if part not in owners]
    if strangers:
        raise MismatchError(
            f"{where}: the model has no module for {len(strangers)} of {len(parts)} pairs:\n{listing(strangers)}"
        )
    groups: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        groups[owners[part]] = layout.theirs(owners[part])
    return [_module(path, [parts.get(name) for name in names], names, layout, where) for path, names in groups.items()]


def _module(path: str, pieces: list[Factors | None], names: list[str], layout: Layout, where: Path) -> Factors:
    sizes, *_ = [_fitting(one, path, names, layout, where) for one in pieces if one is not None]
    return replace(joined(pieces, sizes), path=path)
