"""adapter_config.json of PEFT: what of it changes the function of an adapter, checked and kept; the rest refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import is_finite
from ..errors import FormatError, UnsupportedError
from .peft_experts import Version
from .peft_patterns import Patterns

VERSION = "0.21.2"
"""The PEFT whose layout is written, and the newest that this reader knows."""

SILENT = (
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
)
"""Keys that say nothing of what the tensors do. No name or path in them is followed."""

FEATURES: dict[str, str] = {
    "use_dora": "DoRA (a magnitude per output beside the low-rank pair)",
    "use_qalora": "QA-LoRA (the input is pooled before it meets A)",
    "alora_invocation_tokens": "activated LoRA (the adapter waits for certain tokens)",
    "trainable_token_indices": "single trained rows of an embedding",
    "layer_replication": "layers that are repeated",
    "megatron_config": "layers of Megatron",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA (random samples of the factors)",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow (several adapters behind a router)",
    "kasa_config": "KaSA (it changes the base's weights)",
    "ensure_weight_tying": "factors that two tied modules share",
}
"""Keys that ask for more than low-rank pairs, unless they are empty."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` after which PEFT subtracts the initial pair from the base, also when loading."""


def _size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _by_pattern(accepts: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(accepts, value.values()))


_FLAG: tuple[Callable[[object], bool], str] = (lambda value: isinstance(value, bool), "true or false")
_CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "peft_type": (lambda value: isinstance(value, str), "a string"),
    "r": (_size, "a whole number of at least 1"),
    "lora_alpha": (is_finite, "a number"),
    "lora_dropout": (lambda value: is_finite(value) and 0 <= value < 1, "a number in [0, 1)"),  # type: ignore[operator]
    "rank_pattern": (_by_pattern(_size), "an object of whole numbers by pattern"),
    "alpha_pattern": (_by_pattern(is_finite), "an object of numbers by pattern"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
    "target_modules": (lambda value: isinstance(value, str) or _names(value), "a string or a list of strings"),
    "exclude_modules": (lambda value: isinstance(value, str) or _names(value), "a string or a list of strings"),
    "target_parameters": (_names, "a list of strings"),
    "modules_to_save": (_names, "a list of strings"),
    "layers_to_transform": (
        lambda value: _layer(value) or (isinstance(value, list) and all(map(_layer, value))),
        "a number or a list of numbers",
    ),
    "layers_pattern": (lambda value: isinstance(value, str) or _names(value), "a string or a list of strings"),
    "init_lora_weights": (lambda value: isinstance(value, (bool, str)), "true, false or a string"),
    "peft_version": (lambda value: isinstance(value, str), "a string"),
    **dict.fromkeys(("use_rslora", "fan_in_fan_out", "lora_bias", "use_dora"), _FLAG),
}
_NEEDED = ("peft_type", "r", "lora_alpha")


@dataclass(frozen=True, eq=False, kw_only=True)
class PeftConfig:
    """What the config says of the tensors' function.

    Attributes:
        file: the config's file, for messages.
        rank: rank where no pattern says another.
        alpha: alpha where no pattern says another.
        ranks: ranks by pattern.
        alphas: alphas by pattern.
        rslora: scaling = alpha / sqrt(rank).
        dropout: dropout while training.
        fan_in_fan_out: the linear layers are transposed ones.
        parameters: ends of the paths of single parameters that have low-rank pairs.
        version: the PEFT that wrote it, where it says so.
    """

    file: str
    rank: int
    alpha: float
    ranks: Patterns[int]
    alphas: Patterns[float]
    rslora: bool
    dropout: float
    fan_in_fan_out: bool
    parameters: tuple[str, ...]
    version: Version | None

    def rank_of(self, path: str) -> int:
        """Returns the rank for a path of the wrapped model."""
        return self.ranks.of(path, self.rank)

    def alpha_of(self, path: str) -> float:
        """Returns alpha for a path of the wrapped model."""
        return float(self.alphas.of(path, self.alpha))


def parse_config(raw: Mapping[str, Any], file: Path) -> PeftConfig:
    """Returns the config, every key of it understood.

    Raises:
        FormatError: a key is missing, or has a value of a wrong type or range.
        UnsupportedError: it asks for something that is no plain low-rank pair; names the key.
    """
    where = str(file)
    _check_types(raw, where)
    _check_features(raw, where)
    return PeftConfig(
        file=where,
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        ranks=Patterns(raw.get("rank_pattern") or {}, f"{where}: rank_pattern"),
        alphas=Patterns(raw.get("alpha_pattern") or {}, f"{where}: alpha_pattern"),
        rslora=bool(raw.get("use_rslora")),
        dropout=raw.get("lora_dropout") or 0.0,
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        parameters=tuple(raw.get("target_parameters") or ()),
        version=version_of(raw.get("peft_version")),
    )


def _check_types(raw: Mapping[str, Any], where: str) -> None:
    missing = [key for key in _NEEDED if raw.get(key) is None]
    if missing:
        raise FormatError(f"{where}: {', '.join(missing)} missing: no adapter's config of PEFT is without")
    for key, (accepts, wanted) in _CHECKS.items():
        if raw.get(key) is not None and not accepts(raw[key]):
            raise FormatError(f"{where}: {key} = {str(raw[key])[:80]}: must be {wanted}")


def _check_features(raw: Mapping[str, Any], where: str) -> None:
    if raw["peft_type"] != "LORA":
        raise UnsupportedError(f"{where}: peft_type {raw['peft_type'][:80]!r} is no LoRA: only LORA is read")
    for key, value in raw.items():
        understood = key in SILENT or (key in _CHECKS and key not in FEATURES)
        if understood or value in (None, False, "", [], {}):
            continue
        feature = FEATURES.get(key, "which this version of lora_inject does not know")
        raise UnsupportedError(
            f"{where}: {key} = {str(value)[:80]}: {feature}: the adapter is more than low-rank pairs"
        )
    init = str(raw.get("init_lora_weights", True)).lower()
    if init.startswith(CHANGES_BASE):
        raise UnsupportedError(
            f"{where}: init_lora_weights = {init!r}: PEFT changes the base's weights when it loads such an adapter: "
            "save it again in PEFT with path_initial_model_for_weight_conversion, which makes it an ordinary one"
        )


def version_of(text: str | None) -> Version | None:
    """Returns the three numbers of a version, or None where the text is none."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?!\d)", text or "", re.ASCII)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None
