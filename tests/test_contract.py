"""The contract of an adapter, design section 6, for every registered class × module variant × dtype.

A class that is registered and has no variants, or no reference mathematics, fails `test_every_class_is_covered`.
"""

from __future__ import annotations

import copy
import errno
import io
import os
import pickle

import pytest
import torch
from reference import DELTAS, low_rank_path, scaling, with_delta, within
from safetensors import safe_open
from snapshot import assert_same, snapshot, values
from torch.utils.checkpoint import checkpoint
from variants import FLOATS, VARIANTS, Variant

import lora_inject as li
from lora_inject.registry import registered

CASES = [pytest.param(v, d, id=f"{v.id}-{str(d)[6:]}") for v in VARIANTS for d in FLOATS]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
every = pytest.mark.parametrize(("variant", "dtype"), CASES)
in_float32 = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.id)
ROUNDINGS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 64, torch.float64: 64}
"""Roundings on the way to one output: of x, A, B, bias, the inner and the outer product, scale and sum; wide types
are rounded after each addition too."""


def outputs(model, x) -> tuple[torch.Tensor, ...]:
    found = model(x)
    return found if isinstance(found, tuple) else (found,)


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


def parameters64(model, name: str = "default") -> dict[str, torch.Tensor]:
    (ref,) = [ref for ref in li.adapters(model) if ref.name == name]
    return {key: value.detach().double() for key, value in ref.adapter.named_parameters()}


def strength(variant: Variant) -> float:
    given = {"rank": 3, "alpha": 4.0} | variant.options
    return scaling(given["rank"], given["alpha"], given.get("rslora", False))


def exact(variant: Variant, model, dtype: torch.dtype):
    """Returns the float64 outputs by hand, and the sum of the absolute values of their terms."""
    base, x, s = variant.model(dtype).eval(), variant.x(dtype), strength(variant)
    p = parameters64(model)
    x = x.double() if x.is_floating_point() else x
    if variant.kind == "block":
        wanted = base.double()(x)
        path = low_rank_path(x, p, s)
        size = wanted.abs() + low_rank_path(x.abs(), {k: t.abs() for k, t in p.items()}, s)
        return (wanted + path,), (size + 4,)
    held, sized = copy.deepcopy(base), copy.deepcopy(base)
    held.site = with_delta(variant.kind, base.site, p, s)
    sized.site = with_delta(variant.kind, base.site, p, s, torch.abs)
    return outputs(held, x), outputs(sized, x.abs())


def test_every_class_is_covered():
    kinds = {variant.kind for variant in VARIANTS}
    assert {known.kind for known in registered()} <= kinds, "add variants of the new class to tests/variants.py"
    assert {known.kind for known in registered() if known.mergeable} <= set(DELTAS), "add its mathematics"


@every
def test_1_identity_at_injection(variant, dtype):
    model, x = variant.model(dtype), variant.x(dtype)
    before = {mode: outputs(model.train(mode), x) for mode in (True, False)}
    variant.inject(model)
    for mode, wanted in before.items():
        assert same(outputs(model.train(mode), x), wanted)


@every
def test_2_alive_in_every_mode(variant, dtype):
    model, x = variant.model(dtype), variant.x(dtype)
    wanted = outputs(model.eval(), x)
    variant.inject(model)
    train(model)
    for mode in (True, False):
        model.train(mode)
        assert not torch.equal(outputs(model, x)[0], wanted[0])
        with torch.no_grad():
            assert not torch.equal(outputs(model, x)[0], wanted[0])
        with torch.inference_mode():
            assert not torch.equal(outputs(model, x)[0], wanted[0])


@every
def test_2_every_adapter_parameter_gets_a_gradient_and_nothing_else(variant, dtype):
    model, x = variant.model(dtype).requires_grad_(True), variant.x(dtype)
    variant.inject(model)
    train(model)
    outputs(model, x)[0].float().square().sum().backward()
    mine = li.adapter_parameters(model)
    for key, parameter in model.named_parameters():
        if key not in mine:
            assert parameter.grad is None, f"{key} is base and got a gradient"
            continue
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        assert gradient.isfinite().all() and gradient.count_nonzero(), f"{key} is dead"
    assert mine


@every
def test_3_forward_is_the_base_with_the_update_added_by_hand(variant, dtype):
    model = injected(variant, dtype)
    wanted, sizes = exact(variant, model, dtype)
    found = outputs(model, variant.x(dtype))
    base = outputs(variant.model(dtype).eval(), variant.x(dtype))
    assert len(found) == len(wanted)
    for got, want, size in zip(found, wanted, sizes, strict=True):
        assert got.dtype == dtype
        assert within(got, want, size, ROUNDINGS[dtype])
    assert not within(base[0], wanted[0], sizes[0], ROUNDINGS[dtype]), "the reference could not tell them apart"


@every
def test_3_delta_is_what_the_mathematics_say(variant, dtype):
    model = injected(variant, dtype)
    (ref,) = li.adapters(model)
    found = ref.adapter.delta(ref.module)
    if not ref.adapter.mergeable:
        assert found == {}
        return
    p = parameters64(model)
    wanted = DELTAS[variant.kind](variant.model(dtype).site, p, strength(variant))
    sizes = DELTAS[variant.kind](variant.model(dtype).site, {k: t.abs() for k, t in p.items()}, strength(variant))
    assert found.keys() == wanted.keys()
    for name, update in found.items():
        assert update.dtype in (torch.float32, torch.float64)
        assert update.shape == wanted[name].shape
        assert within(update, wanted[name], sizes[name], 64)


@every
def test_4_merge_rounds_each_weight_once(variant, dtype):
    model, x = injected(variant, dtype), variant.x(dtype)
    if variant.kind == "block":
        with pytest.raises(li.LoraInjectError, match="site"):
            li.merge(model)
        return
    base = variant.model(dtype)
    update = DELTAS[variant.kind](base.site, parameters64(model), strength(variant))
    li.merge(model)
    for name, delta in update.items():
        old = base.site._parameters[name]
        wanted = delta if old is None else old.double() + delta
        got = model.site._parameters[name]
        assert got.dtype == dtype
        # Half a unit in the last place for the one rounding, and float32's own for the sum before it.
        slack = 1e-5 if dtype != torch.float64 else 1e-13
        limit = torch.finfo(dtype).eps / 2 * wanted.abs() + slack * (delta.abs().max() + 1)
        assert ((got.double() - wanted).abs() <= limit).all()
    wanted, sizes = exact(variant, model, dtype)
    for got, want, size in zip(outputs(model, x), wanted, sizes, strict=True):
        assert within(got, want, size, ROUNDINGS[dtype])


@every
def test_5_the_base_comes_back_bit_for_bit_after_any_history(variant, dtype):
    model = variant.model(dtype)
    before = snapshot(model)
    variant.inject(model)
    mergeable = next(li.adapters(model)).adapter.mergeable
    for step in range(3):
        train(model, seed=step)
        with li.scaled(model, 3.0), li.disabled(model):
            model(variant.x(dtype))
        if mergeable:
            li.merge(model)
            with li.disabled(model):
                model(variant.x(dtype))
            li.unmerge(model)
        kept = {k: v for k, v in values(model).items() if ".adapters." not in k}
        assert list(kept.items()) == before["values"]
    if mergeable:
        li.merge(model)
    li.uninject(model)
    assert_same(before, model)


@every
def test_6_uninject_leaves_no_trace(variant, dtype):
    model = variant.model(dtype).requires_grad_(True)
    model.site.register_forward_hook(lambda *args: None)
    model.site.register_full_backward_pre_hook(lambda *args: None)
    next(model.site.parameters()).requires_grad_(False)
    model.site.eval()
    before, wanted = snapshot(model), outputs(model, variant.x(dtype))
    variant.inject(model)
    train(model)
    li.uninject(model)
    assert_same(before, model)
    assert same(outputs(model, variant.x(dtype)), wanted)


@every
def test_7_a_file_carries_the_adapter_to_a_fresh_base(variant, dtype, tmp_path):
    model, x = injected(variant, dtype), variant.x(dtype)
    wanted = outputs(model, x)
    path = li.export(model, tmp_path / "adapter.safetensors")
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {f"site.{key}" for key in parameters64(model)}
    fresh = variant.model(dtype).eval()
    li.load(fresh, path)
    assert same(outputs(fresh, x), wanted)


@in_float32
def test_8_copies_and_pickles_carry_the_adapter(variant):
    model, x = injected(variant, torch.float32), variant.x(torch.float32)
    wanted = outputs(model, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    before = snapshot(variant.model(torch.float32).eval())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert same(outputs(twin, x), wanted)
        train(twin, seed=9)
        assert same(outputs(model, x), wanted), "the copy shares memory with the original"
        li.uninject(twin)
        assert snapshot(twin)["values"] == before["values"]
        assert type(twin.site) is type(variant.model(torch.float32).site)


@pytest.mark.parametrize("reentrant", [True, False])
@in_float32
def test_8_checkpointing_gives_the_same_gradients(variant, reentrant):
    model, x = injected(variant, torch.float32).train(), variant.x(torch.float32)
    if x.is_floating_point():
        x.requires_grad_(True)
    elif reentrant:
        pytest.skip("reentrant checkpointing needs an input that has a gradient")

    def gradients(run):
        model.zero_grad()
        torch.manual_seed(5)
        out = run(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        found = {k: p.grad for k, p in li.adapter_parameters(model).items()}
        return {k: g.to_dense() if g.is_sparse else g for k, g in found.items()}

    wanted = gradients(model)
    found = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@in_float32
def test_9_a_failure_leaves_everything_as_it_was(variant, tmp_path, monkeypatch):
    model, x = injected(variant, torch.float32), variant.x(torch.float32)
    path = li.export(model, tmp_path / "adapter.safetensors")
    old = path.read_bytes()
    before, wanted = snapshot(model), outputs(model, x)
    with pytest.raises(RuntimeError), li.scaled(model, 2.0), li.disabled(model), li.activate(model):
        model(torch.zeros(1, 1, 1, 1, 1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _disk_full)
        with pytest.raises(li.LoraInjectError, match=r"adapter\.safetensors.*No space left"):
            li.export(model, path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["adapter.safetensors"]
    with pytest.raises(li.LoraInjectError, match="site"):
        variant.inject(model)
    assert_same(before, model)
    assert same(outputs(model, x), wanted)
    with torch.no_grad():
        list(li.adapter_parameters(model).values())[-1].fill_(float("nan"))
    before = snapshot(model)
    with pytest.raises(li.LoraInjectError, match="site"):
        li.merge(model)
    assert_same(before, model)


def _disk_full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
