"""The mathematics of every adapter, written out a second time, by hand and in float64.

Nothing here calls lora_inject. ΔW = scaling · B A, with the weight's rows in B and its columns in A; each function
takes the adapter's parameters (float64) by name and returns the update of every parameter of the base.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]


def scaling(rank: int, alpha: float | None, rslora: bool = False) -> float:
    alpha = rank if alpha is None else alpha
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _pick(**found: Tensor | None) -> Params:
    return {name: value for name, value in found.items() if value is not None}


def linear(base: nn.Module, p: Params, s: float) -> Params:
    """y = x (W + s B A)^T + bias + s (B a + b)."""
    if "lora_dense" in p:
        return _pick(weight=s * p["lora_dense"], bias=s * p["lora_B_bias"] if "lora_B_bias" in p else None)
    weight = torch.einsum("or,ri->oi", p["lora_B"], p["lora_A"])
    bias = None
    if "lora_A_bias" in p:
        bias = s * (torch.einsum("or,r->o", p["lora_B"], p["lora_A_bias"]) + p["lora_B_bias"])
    return _pick(weight=s * weight, bias=bias)


def transposed_linear(base: nn.Module, p: Params, s: float) -> Params:
    """y = x (W + s B A) + bias + s (b A + a), for W (in, out)."""
    if "lora_dense" in p:
        return _pick(weight=s * p["lora_dense"], bias=s * p["lora_A_bias"] if "lora_A_bias" in p else None)
    weight = torch.einsum("ir,ro->io", p["lora_B"], p["lora_A"])
    bias = None
    if "lora_B_bias" in p:
        bias = s * (torch.einsum("r,ro->o", p["lora_B_bias"], p["lora_A"]) + p["lora_A_bias"])
    return _pick(weight=s * weight, bias=bias)


def embedding(base: nn.Module, p: Params, s: float) -> Params:
    """Row i: W[i] + s ((B[i] + b) A + a); the padding row stays."""
    rows = p["lora_dense"] if "lora_dense" in p else torch.einsum("nr,rd->nd", p["lora_B"], p["lora_A"])
    if "lora_B_bias" in p:
        rows = rows + torch.einsum("r,rd->d", p["lora_B_bias"], p["lora_A"])
    if "lora_A_bias" in p:
        rows = rows + p["lora_A_bias"]
    rows = rows.clone()
    if base.padding_idx is not None:
        rows[base.padding_idx] = 0
    return {"weight": s * rows}


def conv(base: nn.Module, p: Params, s: float) -> Params:
    """Every kernel tap of ΔW is B A over the rank; B holds the first kernel axes (balanced) or none (pointwise)."""
    if "lora_dense" in p:
        return _pick(weight=s * p["lora_dense"], bias=s * p["lora_B_bias"] if "lora_B_bias" in p else None)
    a, b = p["lora_A"], p["lora_B"]
    weight = torch.zeros(base.weight.shape, dtype=torch.float64)
    for tap in range(math.prod(base.kernel_size)):
        at = []
        for size in reversed(base.kernel_size):
            at.append(tap % size)
            tap //= size
        at = at[::-1]
        tap_a = a[(..., *(i if n > 1 else 0 for i, n in zip(at, a.shape[2:], strict=True)))]
        tap_b = b[(..., *(i if n > 1 else 0 for i, n in zip(at, b.shape[2:], strict=True)))]
        weight[(..., *at)] = tap_b @ tap_a
    bias = None
    if "lora_A_bias" in p:
        bias = s * (b.flatten(2).sum(2) @ p["lora_A_bias"] + p["lora_B_bias"])
    return _pick(weight=s * weight, bias=bias)


DELTAS = {"linear": linear, "transposed_linear": transposed_linear, "embedding": embedding, "conv": conv}
"""The update of the base's parameters, by kind of adapter."""


def with_delta(kind: str, base: nn.Module, p: Params, s: float, sign=lambda t: t) -> nn.Module:
    """Returns a float64 copy of the base with the update written into its parameters."""
    made = copy.deepcopy(base).double()
    update = DELTAS[kind](base, {name: sign(t) for name, t in p.items()}, s)
    for name, parameter in made._parameters.items():
        if parameter is not None:
            parameter.data = sign(parameter.data) + update.pop(name, torch.zeros(()))
    for name, value in update.items():
        made._parameters[name] = nn.Parameter(value)
    return made


def low_rank_path(x: Tensor, p: Params, s: float) -> Tensor:
    """What an adapter of a whole block adds: s ((x A^T + a) B^T + b)."""
    inner = torch.einsum("...i,ri->...r", x, p["lora_A"]) + p.get("lora_A_bias", torch.zeros(()))
    return s * (torch.einsum("...r,or->...o", inner, p["lora_B"]) + p.get("lora_B_bias", torch.zeros(())))


def within(found: Tensor, exact: Tensor, size: Tensor, roundings: float) -> bool:
    """Says whether `found` is `exact` (float64) up to some roundings of terms whose absolute values sum up to `size`.

    A tolerance that follows from the dtype: eps / 2 of that sum per rounding.
    """
    info = torch.finfo(found.dtype)
    allowed = roundings * info.eps / 2 * size + roundings * info.smallest_normal * info.eps
    return bool(((found.double() - exact).abs() <= allowed).all())
