"""Disabled, scaled and activate: what acts, for how long, and what is refused."""

from __future__ import annotations

import pytest
import torch
from models import TOKENS, fill, text
from snapshot import assert_same, snapshot
from torch import nn

import lora_inject as li


@pytest.fixture
def layer():
    """A linear with adapters a and b, in float64, and its parts by hand."""
    made = nn.Linear(6, 5).double().eval()
    for seed, name in enumerate("ab"):
        li.inject(made, "", rank=2, alpha=3, name=name, seed=seed)
        fill(made, seed, name, size=1.0)
    return made


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_hand(layer: nn.Module, a: float, b: float) -> torch.Tensor:
    weight = layer._parameters["weight"].detach()
    for name, factor in (("a", a), ("b", b)):
        adapter = layer.adapters[name]
        weight = weight + factor * 1.5 * (adapter.lora_B @ adapter.lora_A).detach()
    return X @ weight.T + layer._parameters["bias"].detach()


def acts(layer: nn.Module, a: float, b: float) -> bool:
    """Says whether calling the layer, and reading its weight, both show the given strengths."""
    read = torch.nn.functional.linear(X, layer.weight, layer.bias)
    wanted = by_hand(layer, a, b)
    return torch.allclose(layer(X), wanted, rtol=1e-10) and torch.allclose(read, wanted, rtol=1e-10)


def test_all_that_were_injected_act(layer):
    assert acts(layer, 1, 1)


@pytest.mark.parametrize(("names", "a", "b"), [((), 0, 0), (("a",), 0, 1), (("b",), 1, 0), (("a", "b"), 0, 0)])
def test_disabled(layer, names, a, b):
    with li.disabled(layer, *names):
        assert acts(layer, a, b)
    assert acts(layer, 1, 1)


def test_disabled_gives_the_base_bit_for_bit(layer):
    plain = nn.Linear(6, 5).double().requires_grad_(False)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "adapters" not in k})
    with li.disabled(layer):
        assert torch.equal(layer(X), plain(X))
        assert layer.weight is layer._parameters["weight"], "the Parameter itself where nothing is active"


def test_disabled_nests_and_overlaps(layer):
    with li.disabled(layer, "a"):
        with li.disabled(layer):
            assert acts(layer, 0, 0)
        assert acts(layer, 0, 1)
    assert acts(layer, 1, 1)


def test_disabled_ends_with_an_error_too(layer):
    with pytest.raises(ZeroDivisionError), li.disabled(layer), li.scaled(layer, 2.0):
        raise ZeroDivisionError
    assert acts(layer, 1, 1)


@pytest.mark.parametrize("factor", [0, 0.5, -1, 3, 1e-3])
def test_scaled(layer, factor):
    with li.scaled(layer, factor):
        assert acts(layer, factor, factor)
    with li.scaled(layer, factor, "b"):
        assert acts(layer, 1, factor)
    assert acts(layer, 1, 1)


def test_nested_factors_multiply(layer):
    with li.scaled(layer, 2.0), li.scaled(layer, 3.0, "a"), li.scaled(layer, 0.5):
        assert acts(layer, 3, 1)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), "2", None, True, torch.ones(2)])
def test_a_factor_must_be_a_finite_number(layer, factor):
    with pytest.raises(li.ConfigError, match="factor"), li.scaled(layer, factor):
        pass
    assert acts(layer, 1, 1)


@pytest.mark.parametrize(("names", "a", "b"), [(("a",), 1, 0), (("b",), 0, 1), ((), 0, 0), (("b", "a"), 1, 1)])
def test_activate_is_a_switch_and_a_context(layer, names, a, b):
    with li.activate(layer, *names):
        assert acts(layer, a, b)
    assert acts(layer, 1, 1)
    li.activate(layer, *names)
    assert acts(layer, a, b)


def test_an_unknown_name_switches_nothing(layer):
    with pytest.raises(li.StateError, match="'c'"):
        li.activate(layer, "a", "c")
    with pytest.raises(li.StateError, match="'c'"), li.disabled(layer, "a", "c"):
        pass
    assert acts(layer, 1, 1)


def test_a_name_that_went_between_the_call_and_the_block_is_an_error_too(layer):
    contexts = [li.disabled(layer, "a"), li.scaled(layer, 2.0, "a")]
    li.uninject(layer, "a")
    for context in contexts:
        with pytest.raises(li.StateError, match="'a'"), context:
            pass


def test_switched_off_adapters_get_no_gradient_and_scaled_ones_get_theirs(layer):
    with li.disabled(layer, "a"), li.scaled(layer, 3.0, "b"):
        layer(X).sum().backward()
    assert layer.adapters["a"].lora_B.grad is None
    exact = 3 * 1.5 * torch.ones(4, 5, dtype=torch.float64).T @ (X @ layer.adapters["b"].lora_A.T)
    assert torch.allclose(layer.adapters["b"].lora_B.grad, exact)


def test_disabled_on_a_merged_model_gives_the_base_inside_and_the_merge_after(layer):
    base = {k: v.clone() for k, v in layer.state_dict().items() if "adapters" not in k}
    li.merge(layer)
    merged = snapshot(layer)
    with li.disabled(layer):
        assert all(torch.equal(layer.state_dict()[k], v) for k, v in base.items())
        assert torch.equal(layer(X), X @ base["weight"].T + base["bias"]) or acts(layer, 0, 0)
    assert_same(merged, layer)


def test_disabling_one_of_two_merged_leaves_the_other(layer):
    want_b, both = by_hand(layer, 0, 1), by_hand(layer, 1, 1)
    li.merge(layer)
    with li.disabled(layer, "a"):
        assert torch.allclose(layer(X), want_b, rtol=1e-10)
    assert torch.allclose(layer(X), both, rtol=1e-10)


def test_disabled_on_a_merged_tied_model_keeps_it_untied_afterwards():
    model = text().eval()
    li.inject(model, "head", rank=2)
    fill(model)
    before = snapshot(model)
    li.merge(model)
    wanted = model(TOKENS)
    with li.disabled(model):
        assert torch.equal(model(TOKENS), text().eval().requires_grad_(False)(TOKENS))
    assert torch.equal(model(TOKENS), wanted)
    li.unmerge(model)
    assert_same(before, model)


def test_scaling_what_is_merged_is_refused(layer):
    li.merge(layer, "a")
    with pytest.raises(li.StateError, match=r"merged"), li.scaled(layer, 2.0):
        pass
    with li.scaled(layer, 2.0, "b"):
        pass


@pytest.mark.parametrize(
    "context",
    [
        lambda m: [li.scaled(m, 2.0)],
        lambda m: [li.disabled(m)],
        lambda m: [li.scaled(m, 2.0), li.scaled(m, 0.5)],
        lambda m: [li.scaled(m, 1.0)],
        lambda m: [li.scaled(m, 2.0, "a")],
    ],
    ids=["scaled", "disabled", "back-to-one", "by-one", "one-of-two"],
)
def test_merging_inside_a_context_is_refused(layer, context):
    before = snapshot(layer)
    opened = context(layer)
    for entered in opened:
        entered.__enter__()
    with pytest.raises(li.StateError, match=r"context|inside"):
        li.merge(layer)
    for entered in reversed(opened):
        entered.__exit__(None, None, None)
    assert_same(before, layer)
    assert acts(layer, 1, 1)


def test_switching_what_is_merged_is_refused(layer):
    li.merge(layer)
    with pytest.raises(li.StateError, match="unmerge"):
        li.activate(layer, "a")
    li.unmerge(layer)
    assert acts(layer, 1, 1)


def test_merge_without_names_takes_what_is_switched_on(layer):
    wanted = by_hand(layer, 1, 0)
    li.activate(layer, "a")
    li.merge(layer)
    assert torch.allclose(layer(X), wanted, rtol=1e-10)
    with pytest.raises(li.StateError, match="switched off"):
        li.merge(layer, "b")


def test_uninject_inside_a_context_ends_quietly(layer):
    with li.disabled(layer, "a"), li.scaled(layer, 2.0):
        li.uninject(layer, "a")
        assert [ref.name for ref in li.adapters(layer)] == ["b"]
    adapter = layer.adapters["b"]
    wanted = X @ (layer._parameters["weight"] + 1.5 * adapter.lora_B @ adapter.lora_A).T + layer._parameters["bias"]
    assert torch.allclose(layer(X), wanted, rtol=1e-10)
