"""mlx-lm's format: a folder with `adapters.safetensors` and `adapter_config.json`, factors stored transposed."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError, MismatchError, UnsupportedError
from ..safewrite import write_tensors
from .bundle import Bundle, Source
from .checks import number, section, whole
from .content import CONFIG, Content
from .experts import Experts, experts_of
from .factors import Factors, alpha_for
from .folder import write_folder, write_text
from .format import Format
from .mlx_ends import EMBEDDINGS, with_head, without_head
from .pairs import Suffixes, paired, rank_of
from .refusals import matrices_of, refuse
from .resolve import Parsed, resolve
from .text_model import TextModel, text_model
from .uniform import uniform

FILE = "adapters.safetensors"
SUFFIXES = Suffixes(".lora_a", ".lora_b", {".m": "DoRA's magnitude"})
EXPERTS = {
    "mixtral": "mlp.experts block_sparse_moe.switch_mlp",
    "phimoe": "mlp.experts block_sparse_moe.switch_mlp",
    "qwen2_moe": "mlp.experts mlp.switch_mlp",
    "qwen3_moe": "mlp.experts mlp.switch_mlp",
    "olmoe": "mlp.experts mlp.switch_mlp",
    "deepseek_v3": "mlp.experts mlp.switch_mlp",
    "gpt_oss": "mlp.experts mlp.experts",
}
"""By family, where a layer has its experts in transformers and in mlx-lm."""


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says of the adapter: y += scale * (x A) B, one rank for all."""

    rank: int
    scale: float
    dropout: float


class Mlx(Format):
    """`<path>.lora_a` (in, rank) and `.lora_b` (rank, out), stacks of experts (E, rank, in) and (E, out, rank)."""

    name = "mlx"
    folder = True

    def recognises(self, content: Content) -> bool:
        if content.header is None:
            return False
        return "fine_tune_type" in (content.config or {}) or any(
            name.endswith((SUFFIXES.a, SUFFIXES.b)) for name in content.names
        )

    def read(self, content: Content, model: nn.Module | None) -> Source:
        settings = _settings(content)
        stems = paired(content.names, SUFFIXES, content.path)
        stacked = {stem for stem in stems if _is_stack(stem, content, settings)}
        tensors = content.read(model)
        plain: list[Factors] = []
        stacks: dict[str, Factors] = {}
        for stem in stems:
            a, b = tensors[stem + SUFFIXES.a], tensors[stem + SUFFIXES.b]
            if stem in stacked:
                stacks[stem] = _factors(stem, a, b, settings)
            else:
                plain.append(_factors(stem, a.t(), b.t(), settings))
        factors = [*with_head(plain, model, content.path), *_packed(stacks, model, content.path)]
        return resolve(Parsed(path=content.path, factors=factors), model)

    def write_sites(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        factors = without_head(matrices_of(bundle, "mlx-lm"), model, bundle.path)
        factors = [piece for one in factors for piece in _stacks(one, model, bundle.path)]
        scale, rank, factors = uniform(factors)
        tensors: dict[str, Tensor] = {}
        for one in factors:
            pair = (one.a, one.b) if one.stacked else (one.a.t(), one.b.t())
            for suffix, tensor in zip((SUFFIXES.a, SUFFIXES.b), pair, strict=True):
                tensors[one.path + suffix] = tensor.contiguous()
        config = _config(factors, Settings(rank, scale, max(one.dropout for one in factors)))

        def fill(folder: Path) -> None:
            write_tensors(folder / FILE, tensors, {"format": "mlx"})
            write_text(folder / CONFIG, json.dumps(config, indent=4) + "\n")

        return write_folder(path, fill)


def _config(factors: Iterable[Factors], settings: Settings) -> dict[str, Any]:
    """Returns an adapter_config.json whose keys are whole paths, which mlx-lm looks for in the whole model."""
    paths = sorted({one.path for one in factors})
    layers = [int(found[1]) for path in paths if (found := re.search(r"\.(\d{1,9})\.", path))]
    parameters = {"rank": settings.rank, "scale": settings.scale, "dropout": settings.dropout, "keys": paths}
    return {"fine_tune_type": "lora", "num_layers": max(layers, default=0) + 1, "lora_parameters": parameters}


def _settings(content: Content) -> Settings:
    where = f"{content.file.parent / CONFIG}"
    if content.config is None:
        raise FormatError(
            f"{where}: is missing: it holds the scale of the adapter; without it nobody knows how strong the update is"
        )
    kind = content.config.get("fine_tune_type", "lora")
    if kind != "lora" or content.config.get("use_dora"):
        raise UnsupportedError(
            f"{where}: fine_tune_type {str(kind)[:40]!r}: only LoRA has a counterpart here; mlx_lm.fuse merges "
            "DoRA and fully trained weights into the base"
        )
    parameters = section(content.config, "lora_parameters", where)
    return Settings(
        rank=whole(parameters, "rank", where),
        scale=number(parameters, "scale", where),
        dropout=number(parameters, "dropout", where, 0.0, least=0.0, below=1.0),
    )


def _is_stack(stem: str, content: Content, settings: Settings) -> bool:
    """Says whether a pair is one of stacks, (E, rank, in) and (E, out, rank), after checking its shapes."""
    shapes = content.shapes
    a, b = shapes[stem + SUFFIXES.a], shapes[stem + SUFFIXES.b]
    stacked = len(a) == 3
    rank = rank_of(stem, a, b, content.path, inner=(-2, -1) if stacked else (-1, -2), axes=3 if stacked else 2)
    if rank != settings.rank:
        raise FormatError(f"{content.path}: {stem}: rank {rank} in its tensors, {settings.rank} in {CONFIG}")
    return stacked


def _factors(stem: str, a: Tensor, b: Tensor, settings: Settings) -> Factors:
    return Factors(
        path=stem,
        a=a,
        b=b,
        alpha=alpha_for(settings.scale, settings.rank),
        dropout=settings.dropout,
        kind="embedding" if stem.rpartition(".")[2] in EMBEDDINGS else "linear",
        parameter=stem.rpartition(".")[2] if a.dim() == 3 else None,
    )


def _packed(stacks: Mapping[str, Factors], model: nn.Module | None, where: Path) -> list[Factors]:
    """Returns the updates of the model's packed experts from mlx-lm's stacks."""
    if not stacks:
        return []
    text = text_model(model, where, "where the model keeps its experts")
    ours, theirs = _expert_names(text, where)
    groups: dict[str, dict[str, Factors]] = defaultdict(dict)
    for stem, one in stacks.items():
        owner, _, piece = stem.rpartition(".")
        path = owner.removesuffix(theirs) + ours
        if not owner.endswith(theirs) or path not in text.modules:
            raise MismatchError(f"{where}: {stem}: the model has no experts there")
        groups[path][piece] = one
    return [one for path, own in groups.items() for one in _experts(text, path).join(own, where)]


def _stacks(one: Factors, model: nn.Module | None, where: Path) -> list[Factors]:
    """Returns the updates of mlx-lm's stacks from that of a packed parameter; a plain update as it is."""
    if one.parameter is None:
        return [one]
    text = text_model(model, where, "how the model packs its experts")
    ours, theirs = _expert_names(text, where)
    if not one.path.endswith(ours) or one.path not in text.modules:
        refuse(where, "mlx-lm", [f"{one.site}: a parameter that is none of the experts'"])
    parts = _experts(text, one.path).split(one)
    return [replace(part, path=f"{one.path.removesuffix(ours)}{theirs}.{name}") for name, part in parts.items()]


def _experts(text: TextModel, path: str) -> Experts:
    return experts_of(text.modules[path], path)


def _expert_names(text: TextModel, where: Path) -> tuple[str, str]:
    if text.family not in EXPERTS:
        raise UnsupportedError(
            f"{where}: how mlx-lm names the experts of {text.family} models is unknown here (known: "
            f"{', '.join(EXPERTS)}): leave the experts out, or keep the adapter in lora_inject's or PEFT's format"
        )
    ours, theirs = EXPERTS[text.family].split()
    return ours, theirs
