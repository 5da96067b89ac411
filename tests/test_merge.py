"""Merge and unmerge on whole models: one rounding, ties, biases that are made, refusals that change nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import TOKENS, Text, fill, picture, text
from snapshot import assert_same, raw, snapshot, values
from torch import nn

import lora_inject as li

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def injected(dtype: torch.dtype = torch.float32, tied: bool = True, targets="*", **options) -> Text:
    model = text(tied, dtype).eval()
    li.inject(model, targets, rank=2, **options)
    fill(model)
    return model


def by_hand(model: nn.Module, *names: str) -> dict[str, torch.Tensor]:
    """W + the sum of s B A in float64, rounded once."""
    wanted = {}
    for ref in li.adapters(model):
        if ref.name in names:
            a, b = ref.adapter.lora_A.double(), ref.adapter.lora_B.double()
            update = b @ a
            if ref.path == "embed":
                update[0] = 0
            key = f"{ref.path}.weight"
            wanted[key] = wanted.get(key, ref.module._parameters["weight"].detach().double()) + update
    return wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge_many_times_is_bit_identical(dtype):
    model = injected(dtype)
    before = snapshot(model)
    for _ in range(5):
        li.merge(model)
        assert snapshot(model)["values"] != before["values"]
        li.unmerge(model)
        assert_same(before, model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_one_by_one_equals_merging_together(dtype):
    models = [injected(dtype, name="a") for _ in range(2)]
    for model in models:
        li.inject(model, "*", rank=3, name="b")
        fill(model, 9, "b", size=0.01)
    wanted = by_hand(models[0], "a", "b")
    li.merge(models[0], "a")
    li.merge(models[0], "b")
    li.merge(models[1], "a", "b")
    assert values(models[0]) == values(models[1])
    for key, exact in wanted.items():
        limit = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
        assert ((models[0].state_dict()[key].double() - exact).abs() <= limit).all(), key


def test_merge_unties_reports_it_and_unmerge_ties_again():
    model = injected(targets=["head"])
    before, embed = snapshot(model), raw(model.embed.weight)
    wanted = by_hand(model, "default")["head.weight"].float()
    report = li.merge(model)
    assert report.untied == ("head.weight",)
    assert "untied" in str(report)
    assert model.head.weight is not model.embed.weight
    assert raw(model.embed.weight) == embed, "the other user keeps W"
    assert torch.allclose(model.head.weight, wanted, atol=1e-6)
    li.unmerge(model)
    assert_same(before, model)


@pytest.mark.parametrize("targets", ["embed", "head", ["embed", "head"]])
def test_untied_merges_are_right_whoever_is_adapted(targets):
    model = injected(targets=targets)
    wanted = model(TOKENS)
    before = snapshot(model)
    li.merge(model)
    assert torch.allclose(model(TOKENS), wanted, atol=1e-5)
    li.unmerge(model)
    assert_same(before, model)


def test_keep_merged_leaves_plain_merged_weights():
    model = injected(targets=["up", "head"])
    wanted, keys = model(TOKENS), list(text().state_dict())
    li.merge(model)
    merged = values(model)
    li.uninject(model, keep_merged=True)
    assert list(model.state_dict()) == keys
    assert values(model) == {key: merged[key] for key in keys}
    assert [type(m) for m in model.modules()] == [type(m) for m in text().modules()]
    assert torch.allclose(model(TOKENS), wanted, atol=1e-5)
    assert model.head.weight is not model.embed.weight, "merged into one user only, so it stays untied"


@pytest.mark.parametrize("bias", [False, True])
def test_keep_merged_gives_every_parameter_its_flag_back(bias):
    model = text()
    model.up.weight.requires_grad_(False)
    li.inject(model, ["up", "down", "head"], rank=2, bias=bias)
    fill(model)
    li.merge(model)
    li.uninject(model, keep_merged=True)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    assert flags.pop("up.weight") is False
    assert all(flags.values()), {key for key, flag in flags.items() if not flag}


def test_keep_merged_on_an_unmerged_model_is_an_error():
    model = injected()
    before = snapshot(model)
    with pytest.raises(li.StateError, match="merge"):
        li.uninject(model, keep_merged=True)
    assert_same(before, model)


def test_one_of_two_merged_names_leaves_and_the_other_stays_merged():
    model = injected(targets=["up"], name="a")
    li.inject(model, "up", rank=2, name="b")
    fill(model, 9, "b")
    base = model.up._parameters["weight"].detach().clone()
    only_b = by_hand(model, "b")["up.weight"]
    li.merge(model)
    li.uninject(model, "a")
    assert torch.allclose(model.up.weight.double(), only_b, atol=1e-6)
    li.unmerge(model)
    assert raw(model.up._parameters["weight"]) == raw(base)


def test_a_bias_is_made_where_the_base_has_none_and_removed_again():
    model = injected(targets=["down"], bias=True)
    before, wanted = snapshot(model), model(TOKENS)
    adapter = model.down.adapters["default"]
    exact = adapter.lora_B.double() @ adapter.lora_A_bias.double() + adapter.lora_B_bias.double()
    report = li.merge(model)
    assert [row.path for row in report if row.created] == ["down.bias"]
    assert torch.allclose(model.down.bias.double(), exact, atol=1e-6)
    assert "down.bias" in model.state_dict()
    assert torch.allclose(model(TOKENS), wanted, atol=1e-5)
    li.unmerge(model)
    assert model.down._parameters["bias"] is None
    assert_same(before, model)


def test_merging_twice_and_unmerging_what_is_not_merged():
    model = injected()
    with pytest.raises(li.StateError, match="nothing is merged"):
        li.unmerge(model)
    li.merge(model)
    before = snapshot(model)
    for names in ((), ("default",)):
        with pytest.raises(li.StateError, match="merged already"):
            li.merge(model, *names)
    assert_same(before, model)
    li.unmerge(model)
    with pytest.raises(li.StateError, match="nothing is merged"):
        li.unmerge(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_merge_that_would_write_nan_changes_nothing(value):
    model = injected()
    with torch.no_grad():
        model.head.adapters["default"].lora_B[3, 1] = value
    before = snapshot(model)
    with pytest.raises(li.LoraInjectError, match=r"head\.weight.*NaN"):
        li.merge(model)
    assert_same(before, model)
    assert not any(ref.adapter.merged for ref in li.adapters(model))


def test_an_update_that_overflows_the_stored_dtype_is_refused():
    model = injected(torch.float16, targets="up")
    with torch.no_grad():
        model.up.adapters["default"].lora_A.fill_(300.0)
        model.up.adapters["default"].lora_B.fill_(300.0)
    before = snapshot(model)
    with pytest.raises(li.LoraInjectError, match=r"up\.weight.*float16"):
        li.merge(model)
    assert_same(before, model)


def test_values_that_only_bytes_can_tell_apart_survive():
    model = injected(targets="up")
    with torch.no_grad():
        model.up._parameters["weight"][0, :3] = torch.tensor([-0.0, float("inf"), 1e-42])
    before = snapshot(model)
    li.merge(model)
    li.unmerge(model)
    assert_same(before, model)


def test_delta_does_not_depend_on_the_state():
    model = injected(targets="up")
    adapter = model.up.adapters["default"]
    wanted = adapter.delta(model.up)["weight"]
    with li.disabled(model), li.scaled(model, 5.0):
        assert torch.equal(adapter.delta(model.up)["weight"], wanted)
    li.merge(model)
    assert torch.equal(adapter.delta(model.up)["weight"], wanted)
    with li.disabled(model):
        assert torch.equal(adapter.delta(model.up)["weight"], wanted)


def test_training_on_after_unmerge_and_merging_the_new_weights():
    model = injected(targets="up")
    before = raw(model.up._parameters["weight"])
    li.merge(model)
    fill(model, 11)
    li.unmerge(model)
    assert raw(model.up._parameters["weight"]) == before
    wanted = by_hand(model, "default")["up.weight"]
    li.merge(model)
    assert torch.allclose(model.up.weight.double(), wanted, atol=1e-6)


@pytest.mark.parametrize("targets", ["up", "head"])
def test_casting_a_merged_model_is_never_silently_wrong(targets):
    model = injected(targets=targets)
    li.merge(model)
    merged = {k: v.detach().clone() for k, v in model.state_dict().items() if ".adapters." not in k}
    model.to(torch.bfloat16)
    assert all(torch.equal(model.state_dict()[k], v.to(torch.bfloat16)) for k, v in merged.items())
    li.unmerge(model)
    fresh = text().to(torch.bfloat16)
    for key, value in fresh.state_dict().items():
        assert raw(model.state_dict()[key]) == raw(value), key
    assert model.head._parameters["weight"] is model.embed._parameters["weight"]


def test_loading_base_weights_while_merged_is_refused():
    model, state = injected(targets="up"), text().state_dict()
    li.merge(model)
    with pytest.raises(li.StateError, match=r"up\.weight.*unmerge"):
        model.load_state_dict(state, strict=False)
    li.unmerge(model)
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_merged_model_can_go_back_on_its_own(copied):
    model = injected()
    original = [v for k, v in values(model).items() if ".adapters." not in k]
    li.merge(model)
    merged, twin = values(model), copied(model)
    assert values(twin) == merged
    li.uninject(twin)
    assert list(values(twin).values()) == original
    assert twin.head.weight is twin.embed.weight
    assert values(model) == merged


def test_a_merged_model_refuses_new_adapters_at_its_merged_sites():
    model = injected(targets="up")
    li.merge(model)
    before = snapshot(model)
    with pytest.raises(li.LoraInjectError, match=r"up.*unmerge"):
        li.inject(model, "up", name="other")
    assert_same(before, model)
    li.inject(model, "down", name="other")


def test_a_shared_module_is_merged_once():
    model = picture().eval()
    li.inject(model, "mix", rank=2)
    fill(model)
    x = torch.randn(2, 3, 6, 6)
    wanted, before = model(x), snapshot(model)
    assert len(li.merge(model)) == 1
    assert torch.allclose(model(x), wanted, atol=1e-5)
    li.unmerge(model)
    assert_same(before, model)


def test_the_report_measures_the_update():
    model = injected(torch.bfloat16, targets="up")
    a, b = (model.up.adapters["default"].get_parameter(f"lora_{x}").detach().double() for x in "AB")
    w = model.up._parameters["weight"].detach().clone().double()
    (row,) = li.merge(model)
    stored = model.up.weight.detach().double()
    assert row.path == "up.weight" and row.adapters == ("default",)
    assert row.relative == pytest.approx(float((b @ a).norm() / w.norm()), rel=1e-4)
    assert row.error == pytest.approx(float((stored - w - b @ a).abs().max()), rel=1e-2)
    assert 0.99 < row.survives <= 1
