"""Merged models that are trained, cast, copied, stored wider or interrupted: the original always comes back."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from models import fill, text
from snapshot import assert_same, raw, snapshot
from torch import nn
from weights import layer, original, scale_to

import lora_inject as li
from lora_inject import keeping, residual

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore::lora_inject.RoundingWarning")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("keep", ["residual", "copy"])
def test_an_adapter_that_is_trained_while_merged_changes_nothing(small_blocks, dtype, keep):
    made = layer(dtype)
    before = original(made)
    li.merge(made, keep=keep)
    merged = original(made)
    with torch.no_grad():
        for parameter in made.adapters["default"].parameters():
            parameter.normal_()
    assert original(made) == merged
    made.adapters["default"].scaling = 7.0
    li.unmerge(made)
    assert original(made) == before


@pytest.mark.parametrize("keep", ["residual", "copy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_casting_while_merged_casts_the_original_too(small_blocks, keep, dtype):
    made = layer()
    wanted = raw(layer()._parameters["weight"].to(dtype))
    li.merge(made, keep=keep)
    merged = raw(made._parameters["weight"].to(dtype))
    made.to(dtype)
    assert original(made) == merged
    li.unmerge(made)
    assert original(made) == wanted


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("keep", ["residual", "copy"])
@every_dtype
def test_copies_of_a_merged_model_go_back_on_their_own(small_blocks, copied, keep, dtype):
    made = layer(dtype)
    before = original(made)
    li.merge(made, keep=keep)
    twin, merged = copied(made), original(made)
    li.unmerge(twin)
    assert original(twin) == before and original(made) == merged
    li.unmerge(made)
    assert original(made) == before


def test_a_wider_dtype_takes_what_would_be_lost_and_goes_again(small_blocks):
    made = layer(torch.bfloat16, relative=1e-4)
    weight, adapter = made._parameters["weight"], made.adapters["default"]
    wanted = weight.double() + adapter.lora_B.double() @ adapter.lora_A.double()
    before = snapshot(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = li.merge(made, dtype=torch.float32)
    assert row.widened and row.survives > 0.999 and row.kept == weight.nbytes
    assert made._parameters["weight"].dtype == torch.float32
    assert torch.allclose(made._parameters["weight"].double(), wanted, rtol=1e-6, atol=1e-9)
    li.unmerge(made)
    assert made._parameters["weight"] is weight
    assert_same(before, made)
    scale_to(made, 1.0)
    (row,) = li.merge(made, dtype=torch.float32)
    assert not row.widened and made._parameters["weight"].dtype == torch.bfloat16, "only where it is needed"


@pytest.mark.parametrize(("relative", "warned"), [(1e-4, True), (0.5, False)])
def test_a_warning_says_how_much_of_the_update_is_lost(relative, warned):
    made = layer(torch.bfloat16, relative=relative)
    adapter = made.adapters["default"]
    update = adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
    w = made._parameters["weight"].detach().double()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = li.merge(made)
    stored = made._parameters["weight"].detach().double() - w
    survives = min(1.0, float((stored * update).sum() / update.square().sum()))
    (row,) = report
    assert row.survives == pytest.approx(survives, abs=1e-3) and (survives < 0.9) is warned
    assert [w.category for w in seen] == [li.RoundingWarning] * warned
    assert bool(report.lossy) is warned
    assert all("weight only" in str(w.message) and "dtype=torch.float32" in str(w.message) for w in seen)


@every_dtype
@pytest.mark.parametrize("keep", ["residual", "copy"])
def test_every_kind_of_parameter_goes_back(small_blocks, dtype, keep):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.turned = nn.Conv2d(8, 8, 3, bias=False), nn.ConvTranspose1d(8, 8, 3)
            self.last = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
            self.experts = nn.Parameter(torch.randn(3, 30, 25))
            self.text = text()
            self.rnn = nn.LSTM(8, 8)

    torch.manual_seed(0)
    model = Net().to(dtype)
    before = snapshot(model)
    targets = ["conv", "turned", "last", "experts", "text.*", "rnn"]
    li.inject(model, [t if t not in ("conv", "last") else li.Target(t, bias=True) for t in targets], rank=2)
    injected = snapshot(model)
    fill(model)
    trained = snapshot(model)
    for _ in range(2):
        report = li.merge(model, keep=keep)
        assert {"conv.bias"} == {row.path for row in report if row.created}
        assert report.untied == ("text.embed.weight", "text.head.weight")
        li.unmerge(model)
        assert_same(trained, model)
    li.merge(model, keep=keep)
    li.uninject(model)
    assert_same(before, model)
    assert injected["modules"] != before["modules"]


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("keep", ["residual", "copy"])
@pytest.mark.parametrize("call", ["merge", "unmerge"])
def test_an_exception_between_two_blocks_takes_all_back(small_blocks, monkeypatch, stop, keep, call):
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(2)))
    li.inject(model, "*", rank=2)
    fill(model)
    if call == "unmerge":
        li.merge(model, keep=keep)
    before, writes = snapshot(model), []
    writer, write = (residual.InPlace, residual.InPlace.write) if keep == "residual" else (None, keeping.overwrite)

    def failing(*args):
        writes.append(1)
        if len(writes) == stop:
            raise MemoryError("no room")
        write(*args)

    if writer is not None:
        monkeypatch.setattr(writer, "write", failing)
    else:
        monkeypatch.setattr(keeping, "overwrite", failing)
        monkeypatch.setattr("lora_inject.merge_ways.overwrite", failing)
    if keep == "copy" and stop == 3:
        getattr(li, call)(model)
        return
    with pytest.raises(MemoryError):
        li.merge(model, keep=keep) if call == "merge" else li.unmerge(model)
    assert len(writes) >= stop
    assert_same(before, model)
    assert all(ref.adapter.merged is (call == "unmerge") for ref in li.adapters(model))
    monkeypatch.undo()


@pytest.mark.parametrize(
    "option", [{"keep": "all"}, {"accumulate": torch.float16}, {"dtype": torch.int8}, {"keep": None}]
)
def test_an_option_that_cannot_be_used_is_named(option):
    made = layer()
    before = snapshot(made)
    with pytest.raises(li.ConfigError, match=next(iter(option))):
        li.merge(made, **option)
    assert_same(before, made)


@pytest.mark.parametrize("keep", ["residual", "copy", "nothing"])
@pytest.mark.parametrize("how", ["expanded", "windows"])
def test_a_weight_whose_elements_overlap_in_memory_gets_memory_of_its_own(keep, how):
    """In place, one write would reach many elements: torch refuses some, and takes others without a word."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    strange = torch.randn(1, 8).expand(8, 8) if how == "expanded" else torch.randn(15).as_strided((8, 8), (1, 1))
    model[1].weight = nn.Parameter(strange)
    parameter, before = model[1].weight, snapshot(model)
    li.inject(model, "*", rank=2)
    fill(model)
    p = {key: value.detach().double() for key, value in li.adapter_parameters(model).items()}
    wanted = strange.double() + p["1.adapters.default.lora_B"] @ p["1.adapters.default.lora_A"]
    output = model(x)
    report = li.merge(model, keep=keep)
    assert report.untied == ("1.weight",)
    assert torch.allclose(model[1]._parameters["weight"].double(), wanted, atol=1e-6)
    assert torch.allclose(model(x), output, atol=1e-5)
    if keep != "nothing":
        li.uninject(model)
        assert model[1].weight is parameter and parameter.stride() == strange.stride()
        assert_same(before, model)


def test_every_step_is_taken_back_though_one_of_them_fails():
    from lora_inject.commit import all_or_nothing

    back = []
    warned = pytest.warns(RuntimeWarning, match="1 of 3 steps.*no memory")
    with warned, pytest.raises(KeyError, match="the cause"), all_or_nothing() as undo:
        undo(lambda: back.append("first"))
        undo(_fails)
        undo(lambda: back.append("last"))
        raise KeyError("the cause")
    assert back == ["last", "first"]


def _fails():
    raise MemoryError("no memory")


@pytest.mark.parametrize("keep", ["residual", "copy", "nothing"])
@pytest.mark.parametrize("sizes", [(4, 0), (0, 4)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_of_no_rows_or_no_columns_is_merged_cast_and_given_back(keep, sizes):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(*sizes)) if sizes[0] else nn.Sequential(nn.Linear(*sizes))
    x, base = torch.randn(3, model[0].in_features), copy.deepcopy(model)
    li.inject(model, "*", rank=2, bias=True)
    fill(model)
    output = model(x)
    assert output.shape == base(x).shape
    output.sum().backward()
    report = li.merge(model, keep=keep)
    assert len(report) == 2 * len(model) and torch.allclose(model(x), output, atol=1e-5)
    if keep == "nothing":
        return
    model.double()
    li.uninject(model)
    for key, value in base.double().state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def held(model: nn.Module) -> dict[str, tuple[object, object]]:
    """Returns dtype, bits and way back of every merged parameter."""
    return {
        f"{path}.{key}": (module._parameters[key].dtype, raw(module._parameters[key]), type(way))
        for path, module in model.named_modules()
        if hasattr(module, "lora_names")
        for key, way in module.adapters.kept.items()
    }


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float32}, {"accumulate": torch.float64}, {"keep": "copy"}],
    ids=["wider", "accumulate", "copy"],
)
@pytest.mark.parametrize("how", ["disabled", "uninject", "uninject-keep", "copied"])
def test_what_merges_again_does_so_by_the_options_of_the_merge(options, how):
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(300, 40).to(torch.bfloat16 if "dtype" in options else torch.float32))
    model, alone = fresh, copy.deepcopy(fresh)
    for name in ("a", "b"):
        li.inject(model, "0", name=name, rank=3)
        fill(model, 3)
    with torch.no_grad():
        for adapter in model[0].adapters.children():
            adapter.lora_A.mul_(2e-4)
    li.inject(alone, "0", name="a", rank=3)
    alone[0].adapters["a"].load_state_dict(model[0].adapters["a"].state_dict())
    li.merge(alone, **options)
    li.merge(model, **options)
    wanted = held(model)
    if how == "disabled":
        with li.disabled(model):
            assert not held(model)
    elif how == "copied":
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        with li.disabled(model, "a"):
            assert not held(model)
    elif how == "uninject":
        li.uninject(model, "b")
        wanted = held(alone)
    else:
        li.uninject(model, "b", keep_merged=True)
        assert model[0]._parameters["weight"].dtype == wanted["0.weight"][0]
        assert model[0].adapters.merged_names() == ["a"]
        return
    assert held(model) == wanted
    if "dtype" in options:
        assert wanted["0.weight"][0] == torch.float32
