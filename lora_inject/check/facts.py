"""What is known of an adapter before a reader meets it: taken from any known format, broken ones included."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..config import dtype_name
from ..errors import MismatchError, UnsupportedError
from ..formats import FORMATS, Bundle
from ..formats.bundle import loaded
from ..formats.content import Content
from ..formats.factors import Factors
from ..formats.format import recognise
from ..formats.orient import outward
from ..formats.separate import is_told, separated
from ..formats.trained import KIND
from ..registry import adapter_for
from ..tree import walk

FEATURES = {
    "DoRA": re.compile(r"lora_magnitude_vector|dora_scale|\.magnitude$|(?<!lora)\.m$"),
    "LoHa": re.compile(r"hada_"),
    "LoKr": re.compile(r"lokr_"),
}
"""What is more than low-rank pairs, by names of tensors."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Facts:
    """An adapter as a reader's rules see it.

    Attributes:
        path: the file or folder.
        format: whose format it is.
        bundle: the adapter, or None where it could not be read.
        problem: why it could not be read.
        pairs: its low-rank pairs that other programs know.
        others: sites that no other program knows.
        full: parameters trained as a whole.
        features: names of tensors by what they belong to beyond low-rank pairs.
        config: adapter_config.json, empty without.
        layers: the model's linear layers by path, or None without a model.
        model: the model, or None.
    """

    path: Path
    format: str
    bundle: Bundle | None
    problem: str
    pairs: tuple[Factors, ...]
    others: tuple[str, ...]
    full: tuple[str, ...]
    features: Mapping[str, list[str]]
    config: Mapping[str, Any]
    layers: frozenset[str] | None
    model: nn.Module | None

    @property
    def header(self) -> tuple[float, int, bool]:
        """Alpha, rank and rslora that hold where no pattern says otherwise; those of most pairs without a config."""
        if self.format == "peft" and self.pairs:
            return float(self.config["lora_alpha"]), int(self.config["r"]), bool(self.config.get("use_rslora"))
        ((rank, scaling), _), *_ = Counter((one.rank, one.scaling) for one in self.pairs).most_common(1) or [
            ((1, 1.0), 0)
        ]
        return rank * scaling, rank, False

    def scaled(self, alpha: float, rank: int | None = None, root: bool = False) -> list[str]:
        """Returns the pairs that are not scaled by alpha / rank (by default each its own; its root if asked for)."""
        return [
            f"{one.site}: {_ratio(alpha, rank or one.rank, root):.4g} instead of {one.scaling:.4g}"
            for one in self.pairs
            if not math.isclose(one.scaling, _ratio(alpha, rank or one.rank, root), rel_tol=1e-6)
        ]

    def dtypes(self) -> list[str]:
        """Returns the pairs that are wider than half precision."""
        return [f"{one.site}: {dtype_name(one.a.dtype)}" for one in self.pairs if one.a.dtype.itemsize > 2]


def _ratio(alpha: float, rank: int, root: bool) -> float:
    return alpha / (math.sqrt(rank) if root else rank)


def facts_of(path: str | os.PathLike[str], model: nn.Module | None) -> Facts:
    """Returns what is known of the adapter at a path.

    Raises:
        FormatError: nothing there, no known format, or a broken file.
    """
    known, content = recognise(FORMATS, path)
    bundle, problem = None, ""
    try:
        bundle = loaded(known.read(content, model))
        bundle = separated(bundle, model) if model is not None or is_told(bundle) else bundle
    except (UnsupportedError, MismatchError) as error:
        problem = str(error)
    pairs, others, full = _parts(bundle)
    return Facts(
        path=content.path,
        format=known.name,
        bundle=bundle,
        problem=problem,
        pairs=pairs,
        others=others,
        full=full,
        features=_features(content),
        config=content.config or {},
        layers=None if model is None else _linear_layers(model),
        model=model,
    )


def _parts(bundle: Bundle | None) -> tuple[tuple[Factors, ...], tuple[str, ...], tuple[str, ...]]:
    pairs: list[Factors] = []
    others: list[str] = []
    if bundle is None:
        return (), (), ()
    whole = [path for path, record in bundle.sites.items() if record.kind == KIND]
    for path, record in bundle.sites.items():
        if path in whole:
            continue
        try:
            pairs.append(outward(bundle, record))
        except UnsupportedError:
            others.append(f"{path}: {record.kind}")
    return tuple(pairs), tuple(others), (*whole, *bundle.full)


def _features(content: Content) -> dict[str, list[str]]:
    found = {feature: [n for n in content.names if names.search(n)] for feature, names in FEATURES.items()}
    return {feature: names for feature, names in found.items() if names}


def _linear_layers(model: nn.Module) -> frozenset[str]:
    kinds = {node.path: getattr(adapter_for(node.module), "kind", None) for node in walk(model)}
    return frozenset(path for path, kind in kinds.items() if kind in ("linear", "transposed_linear"))
