"""The contract of an adapter, design section 6, points 1 to 5, for every registered class × module variant × dtype.

A class that is registered and has no variants, or no reference mathematics, fails `test_every_class_is_covered`.
"""

from __future__ import annotations

import math

import pytest
import torch
from contract import every, exact, injected, outputs, parameters64, quiet, roundings, same, train, update
from reference import DELTAS, within
from snapshot import assert_same, snapshot, values
from variant import map_floats
from variants import VARIANTS
from variants_quantized import Quantized, library_weight

import lora_inject as li
from lora_inject.registry import registered

pytestmark = quiet


def test_every_class_is_covered():
    kinds = {variant.kind for variant in VARIANTS}
    assert {known.kind for known in registered()} <= kinds, "add variants of the new class to tests/variants.py"
    assert {known.kind for known in registered() if known.mergeable} <= set(DELTAS), "add its mathematics"


@every
def test_1_identity_at_injection(variant, dtype):
    """torch picks kernels by `requires_grad`: what reads a weight is compared with one that reads a trained weight."""
    model, x = variant.model(dtype), variant.x(dtype)
    with torch.no_grad():
        quietly = {mode: outputs(model.train(mode), x) for mode in (True, False)}
    if not variant.linear:
        weight = model.get_parameter(variant.path if variant.parameter else f"{variant.path}.weight")
        weight.requires_grad_(True)
    before = {mode: outputs(model.train(mode), x) for mode in (True, False)}
    variant.inject(model)
    for mode, wanted in before.items():
        assert same(outputs(model.train(mode), x), wanted)
        with torch.no_grad():
            assert same(outputs(model, x), quietly[mode])


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
    model, x = variant.thawed(dtype), variant.x(dtype)
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
        assert within(got, want, size, roundings(variant, dtype))
    assert not within(base[0], wanted[0], sizes[0], roundings(variant, dtype)), (
        "the reference could not tell them apart"
    )


@every
def test_3_delta_is_what_the_mathematics_say(variant, dtype):
    model = injected(variant, dtype)
    (ref,) = li.adapters(model)
    found = ref.adapter.delta(ref.module)
    if not ref.adapter.mergeable:
        assert found == {}
        return
    p = parameters64(model)
    wanted = update(variant, variant.plain(dtype), p)
    sizes = update(variant, variant.plain(dtype), {k: t.abs() for k, t in p.items()})
    assert found.keys() == wanted.keys()
    for name, delta in found.items():
        assert delta.dtype in (torch.float32, torch.float64)
        assert delta.shape == wanted[name].shape
        assert within(delta, wanted[name], sizes[name], 64)


@every
def test_3_no_element_of_an_update_exceeds_its_bound(variant, dtype):
    model = injected(variant, dtype)
    (ref,) = li.adapters(model)
    for name, delta in (
        update(variant, variant.plain(dtype), parameters64(model)).items() if ref.adapter.mergeable else ()
    ):
        # A quarter for roundings: what is decided by a bound leaves room for twice of it.
        assert delta.abs().max() <= 1.25 * ref.adapter.bound(name)
        adapted = ref.adapter.updates and name == ref.adapter.updates[0]
        assert math.isfinite(ref.adapter.bound(name)) == (adapted and variant.kind != "full")


@every
def test_4_merge_rounds_each_weight_once(variant, dtype):
    model, x = injected(variant, dtype), variant.x(dtype)
    if isinstance(variant, Quantized):
        merges_when_asked_and_tells_its_error(variant, dtype, model, x)
        return
    if variant.kind == "block":
        with pytest.raises(li.LoraInjectError, match="site"):
            li.merge(model)
        return
    base = variant.model(dtype)
    wanted_update = update(variant, base, parameters64(model))
    li.merge(model)
    for name, delta in wanted_update.items():
        old = base.get_submodule(variant.at)._parameters[name]
        wanted = delta if old is None else old.double() + delta
        got = model.get_submodule(variant.at)._parameters[name]
        assert got.dtype == dtype
        # Half a unit in the last place for the one rounding, and float32's own for the sum before it.
        slack = 1e-5 if dtype != torch.float64 else 1e-13
        limit = torch.finfo(dtype).eps / 2 * wanted.abs() + slack * (delta.abs().max() + 1)
        assert ((got.double() - wanted).abs() <= limit).all()
    wanted, sizes = exact(variant, model, dtype)
    for got, want, size in zip(outputs(model, x), wanted, sizes, strict=True):
        assert within(got, want, size, roundings(variant, dtype))


def merges_when_asked_and_tells_its_error(variant, dtype, model, x):
    """A quantized weight is refused until the caller asks for the rounding to its format; the report says what it took.

    What comes out is compared with W + delta, both in float64, by the library's own forward.
    """
    before, unmerged = snapshot(model), outputs(model, x)
    with pytest.raises(li.UnsupportedError, match=r"site\.weight is quantized.*requantize=True.*keep the adapter unm"):
        li.merge(model)
    assert_same(before, model)
    plain = variant.plain(dtype)
    base, change = plain.site, update(variant, plain, parameters64(model))
    wanted = base.weight + change["weight"]
    rows = {row.path: row for row in li.merge(model, requantize=True)}
    assert rows.keys() == {f"site.{name}" for name in change} and rows["site.weight"].requantized
    stored = library_weight(model.site, dtype)
    # What the library's forward rounds in reading W out again.
    reading = max(torch.finfo(dtype).eps, variant.keeps) * wanted.abs().amax(1, keepdim=True)
    moved = (stored - wanted).abs()
    assert (moved <= variant.step * wanted.abs().amax(variant.scales or (0, 1), keepdim=True) + 2 * reading).all()
    assert rows["site.weight"].error > 0 and abs(rows["site.weight"].error - moved.max()) <= 2 * reading.max()
    assert moved.norm() < change["weight"].norm() / 2, "most of the update is there"
    if "bias" in change:
        bias = change["bias"] if base.bias is None else base.bias + change["bias"]
        assert torch.allclose(model.site.bias.double(), bias, rtol=torch.finfo(dtype).eps, atol=1e-6)
    merged = variant.plain_of(model, dtype).double()
    exact_x = map_floats(torch.Tensor.double, x)
    found, (size,) = outputs(merged, exact_x), exact(variant, injected(variant, dtype), dtype)[1]
    assert within(outputs(model, x)[0], found[0], size, roundings(variant, dtype))
    li.unmerge(model)
    assert_same(before, model)
    assert same(outputs(model, x), unmerged)


@every
def test_5_the_base_comes_back_bit_for_bit_after_any_history(variant, dtype):
    model = variant.model(dtype)
    before = snapshot(model)
    variant.inject(model)
    mergeable = next(li.adapters(model)).adapter.mergeable
    for step in range(3):
        train(model, seed=step)
        with li.scaled(model, 3.0), li.disabled(model):
            model(*variant.x(dtype))
        if mergeable:
            variant.merge(model)
            with li.disabled(model):
                model(*variant.x(dtype))
            li.unmerge(model)
        kept = {k: v for k, v in values(model).items() if ".adapters." not in k}
        assert list(kept.items()) == before["values"]
    if mergeable:
        variant.merge(model)
    li.uninject(model)
    assert_same(before, model)
