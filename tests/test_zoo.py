"""A quick part of the zoo: one small model of each of many families lives the whole life of its adapters."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_inject as li
from tests.zoo.agreeing import AGREEING
from tests.zoo.called import CALLED
from tests.zoo.catalog import architectures, config_class
from tests.zoo.exceptions import EXCEPTIONS
from tests.zoo.given import GIVEN
from tests.zoo.lifecycle import Failure, live
from tests.zoo.pool import examine
from tests.zoo.shrink import shrink
from tests.zoo.specimen import Missing, Specimen, find, runs
from tests.zoo.table import MEANINGS, render

FAMILIES = {
    "text": ["bert", "gpt2", "llama", "gemma3_text", "deberta-v2", "bloom", "phi3"],
    "mixture of experts": ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "phimoe"],
    "state space": ["mamba", "jamba", "nemotron_h"],
    "encoder-decoder": ["t5", "bart"],
    "vision": ["vit", "swin", "dinov2", "convnext"],
    "audio": ["whisper", "hubert"],
    "own backward pass": ["reformer"],
    "multimodal": ["clip", "llava", "qwen2_vl", "paligemma"],
}
CASES = [pytest.param(name, id=f"{kind}-{name}") for kind, names in FAMILIES.items() for name in names]


@pytest.fixture(scope="module")
def by_name():
    return {architecture.name: architecture for architecture in architectures()}


@pytest.mark.zoo
@pytest.mark.parametrize("name", CASES)
def test_adapters_live_and_leave_no_trace(name, by_name):
    found = examine(by_name[name])
    assert found["state"] == "pass", found
    assert found["sites"] >= 5
    assert len(found["silent"]) < found["sites"] / 2, found["silent"]
    assert found["refused"] == {}


@pytest.mark.parametrize("table", [AGREEING, CALLED, EXCEPTIONS, GIVEN])
def test_the_tables_name_architectures_that_there_are(table, by_name):
    assert set(table) <= set(by_name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", AGREEING)
def test_a_field_that_is_set_is_one_that_the_config_has(name, by_name):
    """A misspelt field would be kept by the config and read by nobody."""
    fields = config_class(by_name[name])().to_dict()
    for path in AGREEING[name]:
        place = fields
        for part in path.removesuffix(".mrope_section").split("."):  # which the code reads by a default of its own
            assert part in place, path
            place = place[part]


class ReadsByHand(nn.Module):
    """Takes the weight from where no adapter can be seen, so that the adapters of the child have no effect."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.child = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.first(x), self.child._parameters["weight"], self.child.bias)


class KeepsState(ReadsByHand):
    """Gives other outputs every time."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.child(self.first(x)) * self.calls


@pytest.mark.parametrize(("model", "step"), [(ReadsByHand, "alive"), (KeepsState, "base")])
def test_a_model_that_breaks_the_promise_is_found(model, step):
    with pytest.raises(Failure) as failure:
        live(model().double().eval(), {"x": torch.randn(3, 4, dtype=torch.float64)})
    assert failure.value.step == step


class EmptyReport(list):
    """What a merge reports that merged nothing."""

    untied = ()


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.outer = nn.Linear(6, 4)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("step", ["merge", "unmerge", "uninject", "disabled"])
def test_a_step_that_does_nothing_is_found(step, monkeypatch):
    """Each of the toolkit's operations in turn is replaced by one that leaves the model as it is."""
    idle = {"merge": lambda *_: EmptyReport(), "disabled": lambda *_: contextlib.nullcontext()}
    monkeypatch.setattr(li, step, idle.get(step, lambda *_: None))
    with pytest.raises(Failure) as failure:
        live(Named().double().eval(), {"x": torch.randn(3, 4, dtype=torch.float64)})
    assert failure.value.step == step


def test_shrinking_keeps_one_layer_of_every_kind():
    kinds = ["slide", "slide", "full", "slide", "slide", "full"]
    small = shrink({"num_hidden_layers": 6, "layer_types": kinds, "hidden_size": 1024, "num_attention_heads": 16})
    assert small == {
        "num_hidden_layers": 2,
        "layer_types": ["slide", "full"],
        "hidden_size": 64,
        "num_attention_heads": 4,
    }


def test_shrinking_keeps_what_single_layers_change():
    """Numbers of layers are written with a leading zero in what transformers calls the config of a layer."""
    kinds = ["slide", "slide", "slide", "full"]
    small = shrink({"num_hidden_layers": 4, "layer_types": kinds, "per_layer_config": {"03": {"head_dim": 512}}})
    assert small["layer_types"] == ["slide", "full"]
    assert small["per_layer_config"] == {"1": {"head_dim": 16}}


class HoldsMore(Named):
    """Holds a module that it does not call."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Bilinear(4, 4, 4)


def test_a_whole_counts_only_where_it_calls_the_part():
    specimen = Specimen(HoldsMore(), {"x": torch.randn(3, 4)})
    assert runs(specimen, {nn.Linear})
    assert not runs(specimen, {nn.Bilinear})


@pytest.mark.zoo
def test_a_part_without_a_class_of_its_own_lives_in_a_whole(by_name):
    assert find(by_name["sam_mask_decoder"]).whole == "sam"


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["gemma4_unified_audio", "sapiens2_head", "vibevoice_diffusion"])
def test_adapters_live_in_a_part_that_only_a_whole_calls(name, by_name):
    found = examine(by_name[name])
    assert found["state"] == "pass", found
    assert found["whole"] == name.rpartition("_")[0]


CONTRADICTORY = [name for name, exception in EXCEPTIONS.items() if exception.contradiction[0]]


@pytest.mark.zoo
@pytest.mark.parametrize("name", CONTRADICTORY)
def test_what_transformers_rules_out_still_fails_as_told(name, by_name):
    with pytest.raises(Missing) as missing:
        find(by_name[name])
    assert missing.value.problems[0] == EXCEPTIONS[name].contradiction[1]


@pytest.mark.zoo
def test_another_error_than_the_one_told_is_not_explained_away(by_name, monkeypatch):
    exception = EXCEPTIONS["nougat"]
    monkeypatch.setitem(EXCEPTIONS, "nougat", replace(exception, contradiction=("another error", "why")))
    with pytest.raises(Missing, match="default config fails, too"):
        find(by_name["nougat"])


@pytest.mark.zoo
def test_no_model_takes_the_config_of_nougat(by_name):
    """Its parts are named, since the default name of one, donut_swin, is none that transformers knows."""
    from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel

    config = config_class(by_name["nougat"])(encoder={"model_type": "donut-swin"}, decoder={"model_type": "mbart"})
    assert not isinstance(config, VisionEncoderDecoderConfig)
    with pytest.raises(ValueError, match=r"donut_swin|has to be of type"):
        VisionEncoderDecoderModel(config)


def test_the_table_has_every_architecture_and_its_reason():
    passed = {"state": "pass", "model": "A", "parameters": 9, "sites": 3, "merge_error": 2e-16, "dtype": "float64"}
    lists = {"silent": ["x"], "computed": [], "untied": ["y", "z"], "refused": {}}
    rows = {
        "alpha": passed | lists,
        "beta": {"state": "not built", "why": "BetaModel: TooLarge: 90 M parameters"},
        "gamma": {"state": "not built", "why": "ImportError: Gamma requires the timm library but it was not found"},
        "delta": {"state": "fail", "step": "merge", "why": "a | b"},
    }
    page = render(rows)
    assert "| alpha | A | 9 | 3 | 1 silent, 2 untied | 2e-16 (float64) |" in page
    assert "| beta | not built | BetaModel has 90 M parameters even when shrunk; the limit is 40 M |" in page
    assert "| gamma | not built | needs the package timm, which is not among those of the zoo |" in page
    assert r"| delta | fail | merge: a \| b |" in page
    for state, count in {"pass": 1, "fail": 1, "not run": 0, "not built": 2}.items():
        assert f"| {state} | {count} | {MEANINGS[state]} |" in page
