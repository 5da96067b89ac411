"""Weights that are computed from other parameters: weight_norm, old and new, and parametrizations in general."""

from __future__ import annotations

import pytest
import torch
from models import fill
from snapshot import assert_same, raw, snapshot
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lora_inject as li

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lora_inject.RoundingWarning"),
]


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T

    def right_inverse(self, weight):
        return weight.triu()


class OneWay(nn.Module):
    def forward(self, weight):
        return weight.tanh()


def with_steps(module: nn.Module, *steps: nn.Module) -> nn.Module:
    for step in steps:
        parametrize.register_parametrization(module, "weight", step)
    return module


EXACT = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 5)), (3, 6)),
    "weight_norm-columns": (lambda: parametrizations.weight_norm(nn.Linear(6, 5), dim=1), (3, 6)),
    "weight_norm-whole": (lambda: parametrizations.weight_norm(nn.Linear(6, 5), dim=None), (3, 6)),
    "weight_norm-conv": (lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, padding=1)), (2, 4, 7)),
    "weight_norm-transposed": (lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3), dim=0), (2, 4, 7)),
    "old": (lambda: nn.utils.weight_norm(nn.Linear(6, 5)), (3, 6)),
    "old-columns": (lambda: nn.utils.weight_norm(nn.Linear(6, 5), dim=1), (3, 6)),
    "old-conv": (lambda: nn.utils.weight_norm(nn.Conv2d(4, 6, 3), dim=2), (2, 4, 5, 5)),
    "half": (lambda: with_steps(nn.Linear(6, 5), Half()), (3, 6)),
    "chain": (lambda: with_steps(parametrizations.weight_norm(nn.Linear(6, 5)), Half()), (3, 6)),
}
INEXACT = {
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(5, 5)), "the nearest that they can be set to is"),
    "cayley": (
        lambda: parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="cayley"),
        "the nearest that they can be set to is|right_inverse of _Orthogonal fails",
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(5, 5)),
        "the nearest that they can be set to is",
    ),
    "symmetric": (lambda: with_steps(nn.Linear(5, 5), Symmetric()), "the nearest that they can be set to is"),
    "one-way": (lambda: with_steps(nn.Linear(5, 5), OneWay()), "OneWay has no right_inverse"),
}


def made(make, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(make().to(dtype)).eval()


def delta(model: nn.Module) -> torch.Tensor:
    return model[0].adapters["default"].delta(model[0])["weight"].detach().double()


def weight_of(model: nn.Module) -> torch.Tensor:
    """Returns the weight as the base computes it, in float64."""
    with li.disabled(model):
        return model[0].weight.detach().double().clone()


@pytest.mark.parametrize("keep", ["residual", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_merging_sets_what_the_weight_is_computed_from(case, dtype, keep):
    make, shape = case
    model, x = made(make, dtype), torch.randn(shape).to(dtype)
    plain = model(x)
    before = snapshot(model)
    li.inject(model, "0", rank=2)
    assert torch.equal(model(x), plain)
    fill(model)
    base, unmerged, injected = weight_of(model), model(x), snapshot(model)
    wanted = base + delta(model)
    eps = torch.finfo(dtype).eps
    for _ in range(2):
        report = li.merge(model, keep=keep)
        assert [row.path for row in report] == ["0.weight"]
        found = model[0].weight.detach().double()
        assert torch.allclose(found, wanted, rtol=0, atol=float(8 * eps * wanted.abs().max()))
        assert report.rows[0].error == pytest.approx(float((found - wanted).abs().max()), rel=0.05, abs=1e-8)
        assert report.kept > 0 and not report.rows[0].created
        scale = float(unmerged.detach().abs().max())
        assert torch.allclose(model(x), unmerged, rtol=0, atol=40 * eps * scale)
        assert not torch.allclose(model(x), plain, rtol=0, atol=40 * eps * scale)
        with li.disabled(model):
            assert torch.equal(model(x), plain)
        assert torch.allclose(model(x), unmerged, rtol=0, atol=40 * eps * scale)
        li.unmerge(model)
        assert_same(injected, model)
        assert torch.equal(model(x), unmerged)
    li.merge(model, keep=keep)
    li.uninject(model)
    assert_same(before, model)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("case", INEXACT.values(), ids=INEXACT)
def test_what_cannot_hold_the_sum_is_refused_and_left_as_it_was(case, train):
    make, message = case
    model, x = made(make), torch.randn(3, 5)
    before = snapshot(model)
    li.inject(model, "0", rank=2)
    fill(model)
    base = weight_of(model)
    wanted = torch.nn.functional.linear(x.double(), base + delta(model), model[0].bias.double())
    assert torch.allclose(model(x).double(), wanted, atol=1e-5), "it is adapted all the same"
    model.train(train)
    injected = snapshot(model)
    with pytest.raises(li.UnsupportedError, match=rf"0\.weight is computed.*({message}).*keep the adapter unmerged"):
        li.merge(model)
    assert_same(injected, model)
    model.eval()
    assert torch.allclose(model(x).double(), wanted, atol=1e-5)
    report = li.verify(model, x)
    assert report.ok and report.merge_error is None
    li.uninject(model)
    assert_same(before, model)


def test_verify_proves_the_merge_of_a_normed_weight():
    model = made(EXACT["weight_norm"][0])
    li.inject(model, "0", rank=2)
    report = li.verify(model, torch.randn(2, 6))
    assert report.ok and report.merge_error is not None and report.merge_error < 1e-5


def test_kept_merged_and_cast_while_merged():
    for name in ("weight_norm", "old"):
        make, shape = EXACT[name]
        model, x = made(make), torch.randn(shape)
        li.inject(model, "0", rank=2)
        fill(model)
        wanted = model(x)
        before = {key: raw(value) for key, value in model.double().state_dict().items()}
        model.float()
        li.merge(model)
        model.double()
        li.unmerge(model)
        assert {key: raw(value) for key, value in model.state_dict().items()} == before
        li.merge(model.float())
        li.uninject(model, keep_merged=True)
        assert torch.allclose(model(x), wanted, atol=1e-5) and next(li.adapters(model), None) is None


def test_base_weights_cannot_be_loaded_while_merged():
    for name, key in (("weight_norm", "parametrizations.weight.original0"), ("old", "weight_g")):
        model = made(EXACT[name][0])
        li.inject(model, "0", rank=2)
        fill(model)
        state = {f"0.{key}": model.state_dict()[f"0.{key}"].clone()}
        li.merge(model)
        with pytest.raises(li.StateError, match=rf"0\.{key}.*unmerge"):
            model.load_state_dict(state, strict=False)
        li.unmerge(model)
        model.load_state_dict(state, strict=False)


def test_parameters_that_others_hold_too_are_not_written():
    model = nn.ModuleDict({name: parametrizations.weight_norm(nn.Linear(6, 5)) for name in ("a", "b")})
    model["b"].parametrizations.weight.original1 = model["a"].parametrizations.weight.original1
    li.inject(model, "a", rank=2)
    fill(model)
    before = snapshot(model)
    with pytest.raises(li.UnsupportedError, match=r"a\.weight is computed from parameters that other modules hold too"):
        li.merge(model)
    assert_same(before, model)


def test_a_merge_that_fails_later_takes_a_computed_weight_back():
    model = nn.ModuleDict({"a": parametrizations.weight_norm(nn.Linear(6, 5)), "b": nn.Linear(6, 5)})
    li.inject(model, "*", rank=2)
    fill(model)
    with torch.no_grad():
        model["b"].adapters["default"].lora_B.fill_(float("inf"))
    before = snapshot(model)
    with pytest.raises(li.StateError, match=r"b\.weight"):
        li.merge(model)
    assert_same(before, model)
    with torch.no_grad():
        model["a"].adapters["default"].lora_B.fill_(float("nan"))
    before = snapshot(model)
    with pytest.raises(li.StateError, match=r"a\.weight.*not finite"):
        li.merge(model)
    assert_same(before, model)


def test_an_adapter_class_that_does_not_serve_the_module_is_refused():
    with pytest.raises(li.UnsupportedError, match="adapter 'linear' does not serve Conv1d"):
        li.plan(nn.Sequential(nn.Conv1d(3, 4, 2)), li.Target("0", adapter="linear"))
