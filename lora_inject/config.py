"""What one injection asks for, and what one site gets: frozen values, checked when they are made."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from .errors import ConfigError, did_you_mean

INITS = ("kaiming", "gaussian", "orthogonal")
FACTORIZATIONS = ("pointwise", "balanced")
DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_TAKEN = frozenset(dir(torch.nn.ModuleDict())) | {"adapters", "merged", "kept", "lora_A", "lora_B"}


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype as files and recipes spell it, for example "float32"."""
    return str(dtype).removeprefix("torch.")


def check_name(name: object) -> str:
    """Returns the name of an adapter if it is legal.

    Raises:
        ConfigError: not letters, digits, "_" and "-", or a name that an `nn.ModuleDict` uses itself.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"adapter name {name!r}: use one or more of the letters a-z, A-Z, the digits, '_' and '-'")
    if name in _TAKEN:
        raise ConfigError(f"adapter name {name!r} is taken by torch or by lora_inject itself: choose another")
    return name


def is_finite(value: object) -> bool:
    """Says whether a value is a finite number, and one that a float can hold: whole numbers can be larger."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _flag(value: object) -> bool:
    return isinstance(value, bool)


_CHECKS: dict[str, tuple[Any, str]] = {
    "rank": (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1, "a whole number of at least 1"),
    "alpha": (lambda v: v is None or (is_finite(v) and v > 0), "a finite number above 0, or None for alpha = rank"),
    "dropout": (lambda v: is_finite(v) and 0 <= v < 1, "a number in [0, 1)"),
    "factor": (is_finite, "a finite number"),
    "bias": (_flag, "True or False"),
    "rslora": (_flag, "True or False"),
    "dense": (_flag, "True or False"),
    "train_a": (_flag, "True or False"),
    "freeze": (_flag, "True or False"),
    "share_tied": (_flag, "True or False"),
    "requantize": (_flag, "True or False"),
    "init": (lambda v: v in INITS, f"one of {', '.join(INITS)}"),
    "factorization": (lambda v: v in FACTORIZATIONS, f"one of {', '.join(FACTORIZATIONS)}"),
    "dtype": (lambda v: v is None or v in DTYPES.values(), f"None or one of {', '.join(DTYPES)}"),
    "keep": (lambda v: v in ("residual", "copy", "nothing"), "one of residual, copy, nothing"),
    "accumulate": (lambda v: v in (torch.float32, torch.float64), "torch.float32 or torch.float64"),
    "seed": (
        lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63),
        "None or a whole number in [0, 2^63)",
    ),
}


def check_option(option: str, value: object) -> None:
    """Checks one option's value.

    Raises:
        ConfigError: the value is not one that the option takes; says which it takes.
    """
    if option in _CHECKS:
        accepts, wanted = _CHECKS[option]
        if not accepts(value):
            raise ConfigError(f"{option}={value!r}: must be {wanted}")


def as_dtype(value: object) -> Any:
    """Returns the torch dtype that a name such as "bfloat16" stands for; anything else as it is."""
    return DTYPES.get(value, value) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteConfig:
    """The options of one site, overrides applied.

    scaling = alpha / rank (Hu et al. 2021, arXiv:2106.09685, section 4.1), or alpha / sqrt(rank) with `rslora`
    (Kalajdzievski 2023, arXiv:2312.03732, equation 5).
    """

    rank: int = 8
    """Inner size of the factors."""
    alpha: float | None = None
    """Numerator of the scaling; None means rank, so that the scaling is 1."""
    dropout: float = 0.0
    """Probability with which an input of the low-rank path is dropped while training."""
    bias: bool = False
    """Give both factors a bias; `merge` adds their sum to the base's bias."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    dense: bool = False
    """Where rank * (rows + columns) >= rows * columns, hold one full-size update instead of two factors."""
    init: str = "kaiming"
    """How A is drawn ("kaiming", "gaussian" or "orthogonal"); B is zero."""
    factorization: str = "pointwise"
    """For convolutions: "pointwise" (kernel in A) or "balanced" (kernel split between A and B)."""
    dtype: torch.dtype | None = None
    """Dtype of A and B; None means float32 for half-precision bases, else the base's."""
    train_a: bool = True
    """Train A too; False keeps it as it was drawn (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303)."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            check_option(entry.name, getattr(self, entry.name))

    @property
    def scaling(self) -> float:
        """Alpha / rank, or alpha / sqrt(rank) with `rslora`."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def derive(config: SiteConfig, overrides: tuple[tuple[str, Any], ...]) -> SiteConfig:
    """Returns the options with some replaced; equal requests share one value, since sites come by the thousand."""
    # 16 and 16.0 are equal, yet print differently.
    return _derive(config, overrides, (type(config.alpha), type(config.dropout), *(type(v) for _, v in overrides)))


@functools.lru_cache(maxsize=1024)
def _derive(config: SiteConfig, overrides: tuple[tuple[str, Any], ...], kinds: tuple[type, ...]) -> SiteConfig:
    return replace(config, **dict(overrides))


SITE_OPTIONS = tuple(entry.name for entry in fields(SiteConfig))


@dataclass(frozen=True, kw_only=True)
class Injection:
    """What one call of `inject` asks for beside its targets; `li.inject` documents each option."""

    name: str = "default"
    site: SiteConfig = field(default_factory=SiteConfig)
    exclude: tuple[str, ...] = ()
    freeze: bool = True
    seed: int | None = None
    share_tied: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        check_option("freeze", self.freeze)
        check_option("seed", self.seed)
        check_option("share_tied", self.share_tied)

    def override(self, options: Mapping[str, Any]) -> Injection:
        """Returns a copy with the given options in place of its own.

        Raises:
            ConfigError: an unknown option, with the nearest known one, or a value that it does not take.
        """
        known = (*SITE_OPTIONS, *(entry.name for entry in fields(self) if entry.name != "site"))
        for option in options:
            if option not in known:
                raise ConfigError(f"unknown option {option!r}: {did_you_mean(option, known)}")
        given: dict[str, Any] = {
            option: as_dtype(value) if option == "dtype" else value for option, value in options.items()
        }
        if "exclude" in given:
            given["exclude"] = as_patterns(given["exclude"])
        site = replace(self.site, **{option: given.pop(option) for option in SITE_OPTIONS if option in given})
        return replace(self, site=site, **given)


def as_patterns(value: object) -> tuple[str, ...]:
    """Returns one pattern or several as a tuple.

    Raises:
        ConfigError: something that is neither a string nor a collection of strings.
    """
    if isinstance(value, str):
        return (value,)
    patterns = tuple(value) if isinstance(value, Iterable) else (value,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"exclude holds {pattern!r}: each entry must be a pattern, that is, a string")
    return patterns
