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
ZERO = torch.zeros((), dtype=torch.float64)


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


def conv_transpose(base: nn.Module, p: Params, s: float) -> Params:
    """Every kernel tap of ΔW (in, out / groups, *kernel) is B[tap] A; all groups share A."""
    if "lora_dense" in p:
        return _pick(weight=s * p["lora_dense"], bias=s * p["lora_A_bias"] if "lora_A_bias" in p else None)
    mix = p["lora_A"].flatten(1)
    weight = torch.einsum("ir...,ro->io...", p["lora_B"], mix)
    bias = None
    if "lora_B_bias" in p:
        bias = s * (torch.cat([mix.T @ p["lora_B_bias"]] * base.groups) + p["lora_A_bias"])
    return _pick(weight=s * weight, bias=bias)


def bilinear(base: nn.Module, p: Params, s: float) -> Params:
    """y = x1^T (W + s B A) x2 + bias + s (B a + b)."""
    if "lora_dense" in p:
        return _pick(weight=s * p["lora_dense"], bias=s * p["lora_B_bias"] if "lora_B_bias" in p else None)
    weight = torch.einsum("or,rij->oij", p["lora_B"], p["lora_A"])
    bias = s * (p["lora_B"] @ p["lora_A_bias"] + p["lora_B_bias"]) if "lora_A_bias" in p else None
    return _pick(weight=s * weight, bias=bias)


def parameter(base: nn.Module, p: Params, s: float) -> Params:
    """W + s B A; for a stack of matrices a pair for each."""
    if "lora_dense" in p:
        return {"weight": s * p["lora_dense"]}
    if p["lora_B"].dim() == 2:
        return {"weight": s * torch.einsum("or,ri->oi", p["lora_B"], p["lora_A"])}
    pairs = zip(p["lora_B"], p["lora_A"], strict=True)
    return {"weight": s * torch.stack([torch.einsum("or,ri->oi", b, a) for b, a in pairs])}


def full(base: nn.Module, p: Params, s: float) -> Params:
    """W + s D."""
    return {"weight": s * p["lora_dense"]}


DELTAS = {
    "linear": linear,
    "quantized_linear": linear,
    "transposed_linear": transposed_linear,
    "embedding": embedding,
    "embedding_bag": embedding,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "bilinear": bilinear,
    "parameter": parameter,
    "attention": parameter,
    "recurrent": parameter,
    "recurrent_cell": parameter,
    "full": full,
}
"""The update of the base's parameters, by kind of adapter."""


def update_of(kind: str, base: nn.Module, p: Params, s: float, name: str | None = None) -> Params:
    """Returns the update of every parameter of the module; `name` is the parameter that is the site, if one is."""
    found = DELTAS[kind](base, p, s)
    return found if name is None else {name: found.pop("weight")} | found


@torch.no_grad()
def with_update(model: nn.Module, at: str, update: Params, sign=lambda t: t) -> nn.Module:
    """Returns a float64 copy of the model with the update written into the parameters of the module at a path."""
    made = copy.deepcopy(model).double()
    for parameter in made.parameters():
        parameter.data = sign(parameter.data)
    host = made.get_submodule(at)
    for name, value in update.items():
        if host._parameters[name] is None:
            host._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            host._parameters[name].data += value
    return made


def sensitivity(outputs: tuple[Tensor, ...], leaves: list[Tensor], sizes: list[Tensor]) -> tuple[Tensor, ...]:
    """Returns for every element of the outputs the sum of |d output / d leaf| · size over all elements of all leaves.

    That is how far the output moves, to first order, when every leaf moves by its size: for what is no sum of products.
    """
    found = []
    for output in outputs:
        moves = []
        for element in output.reshape(-1):
            grads = torch.autograd.grad(element, leaves, retain_graph=True, allow_unused=True)
            moves.append(sum(((g.abs() * s).sum() for g, s in zip(grads, sizes, strict=True) if g is not None), ZERO))
        found.append(torch.stack(moves).reshape(output.shape))
    return tuple(found)


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
