"""The portable adapter: one rank, no scale beside the factors, nothing that a server could overlook."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..config import check_option, dtype_name
from ..errors import ConfigError, RoundingWarning, UnsupportedError, listing
from ..host import base_tensor
from ..registry import adapter_for
from ..tree import walk
from .bundle import Bundle
from .factors import Factors
from .orient import outward
from .peft_layouts import padded
from .peft_patterns import last
from .resolve import Parsed, resolve
from .separate import separated
from .trained import KIND

KINDS = ("linear", "transposed_linear")
"""The kinds of adapters that every server reads."""
HALF = (torch.float16, torch.bfloat16)
TOLERANCE = 0.01
"""Share of an update that rounding may take before a warning says so."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """What `profile="serve"` asks for: a file of PEFT that vLLM, SGLang, TGI, LoRAX and llama.cpp read alike.

    Every pair has one rank R (padded with zeros: exact), its scale folded into B in float32 or wider, r = lora_alpha
    = R, no patterns, and is rounded once to half precision. Layers of a used kind (the last segment of their path)
    that have no pair get one of zeros. What some server would refuse or overlook is refused here: biases, parameters
    trained as a whole, and everything that is no linear layer.

    Attributes:
        dtype: dtype of the factors: float16 or bfloat16; None takes the base's, if it is one of them, else the one
            that loses less.
        rank: the rank; None takes the largest of the adapter's.
    """

    dtype: torch.dtype | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in HALF:
            raise ConfigError(f"dtype={self.dtype}: servers read float16 and bfloat16")
        if self.rank is not None:
            check_option("rank", self.rank)

    def apply(self, bundle: Bundle, model: nn.Module | None) -> Bundle:
        """Returns the adapter as servers want it.

        Raises:
            UnsupportedError: something that not every server reads, or no model to know all layers of a kind by.
            ConfigError: the rank is too small.
        """
        if model is None:
            raise UnsupportedError(
                f"{bundle.path}: servers drop a kind of layer of which some have no adapter, and only the model tells "
                "which those are: give one (--model DIR)"
            )
        bundle = separated(bundle, model)
        factors = _served(bundle)
        rank = self._rank(factors)
        whole = [padded(_folded(one), rank) for one in factors]
        dtype = self.dtype or _best(whole, _base_dtype(factors, model))
        rounded = [_rounded(one, dtype) for one in whole]
        zeros = [_zero(path, module, rank, dtype) for path, module in _without(factors, model).items()]
        note = _report(whole, rounded, dtype)
        parsed = Parsed(path=bundle.path, factors=[*rounded, *zeros], name=bundle.name, notes=(*bundle.notes, note))
        found = resolve(parsed, model)
        base = {path: record.base for path, record in bundle.sites.items()}
        sites = {path: record._replace(base=base.get(path, {})) for path, record in found.sites.items()}
        return replace(found, sites=sites, by_segment=True)

    def _rank(self, factors: list[Factors]) -> int:
        most = max(one.rank for one in factors)
        if self.rank is not None and self.rank < most:
            raise ConfigError(f"rank={self.rank}: the adapter has pairs of rank {most}: resize it first")
        return self.rank or most


def _served(bundle: Bundle) -> list[Factors]:
    """Returns the pairs, after a look at what servers do not read."""
    odd = [f"{path}: trained as a whole" for path in bundle.full]
    odd += [f"{path}: trained as a whole" for path, record in bundle.sites.items() if record.kind == KIND]
    factors = [outward(bundle, record) for record in bundle.sites.values() if record.kind != KIND]
    odd += [f"{one.site}: {one.kind}" for one in factors if one.kind not in KINDS]
    odd += [f"{one.site}: a bias" for one in factors if one.bias is not None]
    if odd or not factors:
        raise UnsupportedError(
            f"{bundle.path}: servers read low-rank pairs of linear layers without biases, and nothing else:\n"
            f"{listing(odd)}\nMerge these into the base, or export without profile."
        )
    return factors


def _folded(factors: Factors) -> Factors:
    """Returns the update with scaling 1, in float32 or wider."""
    wide = torch.promote_types(factors.b.dtype, torch.float32)
    b = (factors.b.double() * factors.scaling).to(wide)
    return replace(factors, a=factors.a.to(wide), b=b, alpha=float(factors.rank), rslora=False, dropout=0.0)


def _rounded(factors: Factors, dtype: torch.dtype) -> Factors:
    return replace(factors, a=factors.a.to(dtype), b=factors.b.to(dtype))


def _base_dtype(factors: list[Factors], model: nn.Module) -> torch.dtype | None:
    """Returns the dtype of the adapted weights, where all have one."""
    modules = {path: node.module for node in walk(model) for path in node.paths}
    found = {base_tensor(modules[one.path], "weight").dtype for one in factors if one.path in modules}
    return found.pop() if len(found) == 1 else None


def _best(factors: list[Factors], base: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of the base, to which servers cast, or the one that loses less."""
    return (
        base if base in HALF else min(HALF, key=lambda dtype: _worst(factors, [_rounded(f, dtype) for f in factors])[0])
    )


def _worst(exact: list[Factors], rounded: list[Factors]) -> tuple[float, str]:
    return max((_error(one, other), one.site) for one, other in zip(exact, rounded, strict=True))


def _error(exact: Factors, rounded: Factors) -> float:
    """Returns how much of an update rounding takes: the norm of the difference by the norm of the update."""
    size = _norm(exact.b, exact.a)
    b = torch.cat([exact.b.double(), -rounded.b.double()], 1)
    a = torch.cat([exact.a.double(), rounded.a.double()], 0)
    return _norm(b, a) / size if size else 0.0


def _norm(b: Tensor, a: Tensor) -> float:
    """Returns the Frobenius norm of B A without forming it: sqrt of the sum of (B^T B) * (A A^T)."""
    b, a = b.double(), a.double()
    square = float(((b.T @ b) * (a @ a.T)).sum())
    return math.sqrt(max(0.0, square)) if math.isfinite(square) else math.inf


def _report(exact: list[Factors], rounded: list[Factors], dtype: torch.dtype) -> str:
    """Returns what rounding took, and refuses or warns where that is much."""
    error, site = _worst(exact, rounded)
    if math.isinf(error):
        raise UnsupportedError(f"{site}: its factors overflow {dtype_name(dtype)}: choose the other half precision")
    if error > TOLERANCE:
        warnings.warn(
            f"{dtype_name(dtype)} takes {error:.1%} of the update of {site}: scale its factors alike, or choose the "
            "other half precision",
            RoundingWarning,
            stacklevel=2,
        )
    return f"rounded to {dtype_name(dtype)}: takes at most {error:.2e} of an update ({site})"


def _without(factors: list[Factors], model: nn.Module) -> Mapping[str, nn.Module]:
    """Returns the layers of the used kinds that have no pair."""
    have, used = {one.path for one in factors}, {last(one.path) for one in factors}
    nodes = walk(model)
    known = {id(node.module) for node in nodes if have & set(node.paths)}
    found = {n.path: n.module for n in nodes if last(n.path) in used and id(n.module) not in known}
    odd = [path for path, module in found.items() if getattr(adapter_for(module), "kind", None) not in KINDS]
    if odd:
        raise UnsupportedError(
            "servers know layers by the last segment of their path, and these are called like adapted ones and are no "
            f"linear layers:\n{listing(odd)}\nMerge the adapter into the base."
        )
    return found


def _zero(path: str, module: nn.Module, rank: int, dtype: torch.dtype) -> Factors:
    rows, columns = base_tensor(module, "weight").shape
    kind = str(getattr(adapter_for(module), "kind", None))
    out, inner = (columns, rows) if kind == "transposed_linear" else (rows, columns)
    a, b = torch.zeros(rank, inner, dtype=dtype), torch.zeros(out, rank, dtype=dtype)
    return Factors(path=path, a=a, b=b, alpha=float(rank), kind=kind)
