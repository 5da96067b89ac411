"""What the tests of the contract share: the cases, and the exact outputs with bounds of their terms."""

from __future__ import annotations

import pytest
import torch
from reference import low_rank_path, scaling, sensitivity, update_of, with_update
from torch import Tensor
from variant import Variant, map_floats
from variants import VARIANTS

import lora_inject as li

CASES = [pytest.param(v, d, id=f"{v.id}-{str(d)[6:]}") for v in VARIANTS for d in v.dtypes]
every = pytest.mark.parametrize(("variant", "dtype"), CASES)
in_float32 = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.id)
# In files an adapter of a quantized layer is one of a linear layer.
of_every_stored_kind = pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.kind != "quantized_linear"], ids=lambda v: v.id
)
quiet = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths",
    # A merge of fixed random numbers may lose more than a tenth of one of them: measured elsewhere.
    "ignore::lora_inject.RoundingWarning",
    "ignore:MatMul8bitLt",
    "ignore:LSTM with projections is not supported with oneDNN",
)
ROUNDINGS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 64, torch.float64: 64}
"""Roundings on the way to one output: of x, A, B, bias, the inner and the outer product, scale and sum; wide types
are rounded after each addition too."""


def roundings(variant: Variant, dtype: torch.dtype) -> int:
    """Returns how many roundings of all terms are allowed; `sensitivity` adds up worst cases, which is plenty."""
    return ROUNDINGS[dtype] if variant.linear else 1


def flat(found) -> tuple[Tensor, ...]:
    """Returns the tensors of an output, however it is nested."""
    if isinstance(found, Tensor):
        return (found,)
    return tuple(tensor for item in found or () for tensor in flat(item))


def outputs(model, x) -> tuple[Tensor, ...]:
    return flat(model(*x))


def same(found, wanted) -> bool:
    """Bit-equal, in the same dtype and memory layout."""
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        for a, b in zip(found, wanted, strict=True)
    )


@torch.no_grad()
def train(model, seed: int = 3) -> None:
    """Sets every adapter parameter to numbers of the size that base weights have."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in li.adapter_parameters(model).values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)


def injected(variant: Variant, dtype: torch.dtype, **options):
    model = variant.model(dtype).eval()
    variant.inject(model, **options)
    train(model)
    return model


def parameters64(model, name: str = "default") -> dict[str, Tensor]:
    (ref,) = [ref for ref in li.adapters(model) if ref.name == name]
    return {key: value.detach().double() for key, value in ref.adapter.named_parameters()}


def strength(variant: Variant) -> float:
    given = {"rank": 3, "alpha": 4.0} | variant.options
    return scaling(given["rank"], given["alpha"], given.get("rslora", False))


def update(variant: Variant, model, p: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the update of every parameter of the host, by hand."""
    return update_of(variant.kind, model.get_submodule(variant.at), p, strength(variant), variant.parameter)


def exact(variant: Variant, model, dtype: torch.dtype):
    """Returns the float64 outputs by hand, and the sum of the absolute values of their terms."""
    base, x, s = variant.plain(dtype).eval(), variant.x(dtype), strength(variant)
    p = parameters64(model)
    absolute = {key: t.abs() for key, t in p.items()}
    x = map_floats(Tensor.double, x)
    if variant.kind == "block":
        wanted = base.double()(*x)
        size = wanted.abs() + low_rank_path(x[0].abs(), absolute, s)
        return (wanted + low_rank_path(*x, p, s),), (size + 4,)
    held = with_update(base, variant.at, update(variant, base, p))
    sized = with_update(base, variant.at, update(variant, base, absolute), torch.abs)
    if variant.linear:
        unit = roundings(variant, dtype) * torch.finfo(dtype).eps / 2
        sizes = outputs(sized, map_floats(Tensor.abs, x))
        return outputs(held, x), tuple(size + variant.blur(base, x, size) / unit for size in sizes)
    floats = [t.requires_grad_(True) for t in x if isinstance(t, Tensor) and t.is_floating_point()]
    found = outputs(held.requires_grad_(True), x)
    sizes = [t.abs() for t in (*sized.parameters(), *floats)]
    moves = sensitivity(found, [*held.parameters(), *floats], sizes)
    # Gates and probabilities lie between 0 and 1, and are rounded too.
    return tuple(t.detach() for t in found), tuple(m + t.detach().abs() + 1 for m, t in zip(moves, found, strict=True))
