"""check_adapter: each rule of each reader, met by an adapter that breaks it and by one that does not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn

import lora_inject as li
from lora_inject.cli import main
from lora_inject.formats.peft_patterns import selects

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
READERS = ["vllm", "sglang", "tgi", "llama.cpp", "diffusers", "peft", "mlx"]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(4, 4))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.norm = nn.LayerNorm(4)


def made(folder, targets=("*_proj",), format="peft", **options):
    model = Model()
    folder.mkdir(exist_ok=True)
    li.inject(model, list(targets), **{"rank": 2, "dtype": torch.float16, **options})
    for parameter in li.adapter_parameters(model).values():
        nn.init.normal_(parameter)
    return li.export(model, folder / "adapter", format=format)


def found(path, reader, **options):
    """The findings by rule: severity and sites."""
    report = li.check_adapter(path, reader, **options)
    return {one.rule: (one.severity, tuple(sorted(one.sites))) for one in report.findings}


@pytest.mark.parametrize("reader", ["vllm", "sglang", "tgi", "llama.cpp", "peft"])
def test_a_plain_adapter_of_peft_has_no_findings(reader, tmp_path):
    report = li.check_adapter(made(tmp_path), reader, model=Model())
    assert [one.rule for one in report.findings if one.rule != "conversion"] == []
    assert report.ok and bool(report) and "reads it as it was trained" in str(report)


def test_ranks_of_vllm(tmp_path):
    path = made(tmp_path, rank=20)
    severity, sites = found(path, "vllm")["rank"]
    assert severity == "refused" and len(sites) == 9 and "layers.0.q_proj: rank 20" in sites
    assert found(path, "vllm", max_rank=32) == {}


def test_patterns_that_are_ignored(tmp_path):
    path = made(tmp_path, ["*_proj", li.Target("layers.1.q_proj", rank=4, alpha=2)], alpha=2)
    config = json.loads((path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    wrong = ("mis-scaled", ("layers.1.q_proj: 1 instead of 0.5",))
    assert found(path, "vllm")["scale"] == wrong
    assert found(path, "tgi")["scale"] == wrong
    assert found(path, "tgi")["ranks"] == ("refused", ("layers.1.q_proj: rank 4, others 2",))
    assert found(path, "llama.cpp").keys() == set()
    assert found(path, "peft") == {}


def test_rslora_is_right_only_where_it_is_known(tmp_path):
    path = made(tmp_path, rank=4, alpha=6, rslora=True)
    assert found(path, "vllm") == found(path, "tgi") == found(path, "peft") == {}
    for reader in ("sglang", "llama.cpp"):
        severity, sites = found(path, reader)["scale"]
        assert severity == "mis-scaled" and len(sites) == 9
        assert "layers.0.q_proj: 1.5 instead of 3" in sites


def test_biases_embeddings_and_whole_parameters(tmp_path):
    biased = found(made(tmp_path / "a", bias=True), "vllm")
    assert biased["biases"][0] == "refused" and len(biased["biases"][1]) == 9
    embedded = found(made(tmp_path / "b", ["embed", "*_proj"]), "vllm")
    assert embedded == {"no linear layer": ("refused", ("embed: embedding",))}
    path = made(tmp_path / "c", ["*_proj", li.Target("norm.*", adapter="full")])
    assert found(path, "sglang") == {"whole parameters": ("refused", ("norm.bias", "norm.weight"))}
    assert "embedding" not in str(found(made(tmp_path / "d", ["embed"]), "llama.cpp"))


def test_stacks_and_gaps(tmp_path):
    path = made(tmp_path, ["*.q_proj", "*.v_proj"], exclude=["layers.1.v_proj"])
    severity, sites = found(path, "sglang")["stacks"]
    assert severity == "refused"
    assert set(sites) == {
        "layers.0: q_proj, v_proj without k_proj",
        "layers.1: q_proj without k_proj, v_proj",
        "layers.2: q_proj, v_proj without k_proj",
    }
    for model in (None, Model()):
        assert found(path, "tgi", model=model)["gaps"] == ("dropped", ("layers.1.v_proj",))
    first = made(tmp_path / "first", ["layers.0.q_proj"])
    assert found(first, "tgi") == {}
    assert found(first, "tgi", model=Model())["gaps"] == ("dropped", ("layers.1.q_proj", "layers.2.q_proj"))


def test_half_precision_is_only_mentioned(tmp_path):
    report = li.check_adapter(made(tmp_path, dtype=torch.float32), "vllm")
    assert [(one.rule, one.severity) for one in report.findings] == [("precision", "fine")]
    assert report.ok


def edited(path, tensors=None, **config):
    (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | config))
    if tensors is not None:
        save_file(tensors, path / TENSORS)
    return path


def test_what_the_config_does_not_select_is_dropped_by_peft(tmp_path):
    path = edited(made(tmp_path), target_modules=["q_proj", "v_proj"])
    severity, sites = found(path, "peft")["targets"]
    assert severity == "dropped" and sites == tuple(f"layers.{n}.k_proj" for n in range(3))
    assert len(found(edited(path, target_modules=["q_proj"]), "peft")["targets"][1]) == 6
    one = found(edited(path, target_modules=["q_proj", "k_proj", "v_proj"], exclude_modules=["0.q_proj"]), "peft")
    assert one["targets"] == ("dropped", ("layers.0.q_proj",))
    one = found(edited(path, exclude_modules=None, layers_to_transform=[0, 2], layers_pattern="layers"), "peft")
    assert one["targets"] == ("dropped", ("layers.1.k_proj", "layers.1.q_proj", "layers.1.v_proj"))
    one = found(edited(path, layers_to_transform=None, layers_pattern=None, target_modules=r".*\.[qk]_proj"), "peft")
    assert one["targets"] == ("dropped", tuple(f"layers.{n}.v_proj" for n in range(3)))
    assert found(path, "sglang")["targets"] == ("refused", (r"target_modules = '.*\\.[qk]_proj'",))
    assert found(edited(path, target_modules="all-linear"), "sglang") == found(path, "peft") == {}


SELECTIONS = [
    {"target_modules": ["q_proj", "1.k_proj"]},
    {"target_modules": ["layers.0.q_proj"], "exclude_modules": ["q_proj"]},
    {"target_modules": r".*q_proj|decoder\.layers\.1\..*", "exclude_modules": r".*\.1\.q_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
]


@pytest.mark.parametrize("config", SELECTIONS, ids=str)
def test_targets_are_those_of_peft(config):
    """PEFT's own function is the oracle."""
    paths = [
        f"{head}{number}.{tail}"
        for head in ("layers.", "decoder.layers.", "decoder.blocks.", "layers.3.experts.")
        for number in (0, 1, 11)
        for tail in ("q_proj", "k_proj", "self.q_proj", "xq_proj")
    ]
    theirs = {path for path in paths if check_target_module_exists(LoraConfig(**config), path)}
    assert {path for path in paths if selects(config, path, "here")} == theirs
    assert theirs or "exclude_modules" in config


def test_more_than_low_rank_is_named(tmp_path):
    path = made(tmp_path)
    tensors = load_file(path / TENSORS)
    name = "base_model.model.layers.0.q_proj.lora_magnitude_vector"
    path = edited(path, tensors | {name: torch.ones(4)}, use_dora=True)
    for reader in READERS:
        assert found(path, reader)["more than low rank"] == ("refused", (f"DoRA: {name}",))


@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_ours_is_judged_by_what_it_will_be(reader, tmp_path):
    path = made(tmp_path, format="lora_inject")
    assert found(path, reader)["format"] == ("fine", (f"{path}: format lora_inject",))


def test_a_file_of_another_program_is_refused(tmp_path):
    path = made(tmp_path, format="mlx")
    assert found(path, "vllm")["format"] == ("refused", (f"{path}: format mlx",))
    assert "format" not in found(path, "mlx")


def test_what_peft_cannot_hold_is_said_with_its_own_message(tmp_path):
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 2))
    li.inject(model, "0", rank=1)
    path = li.export(model, tmp_path / "a.safetensors")
    severity, (message,) = found(path, "peft")["conversion"]
    assert severity == "refused" and "conv_transpose" in message


def test_the_command(tmp_path, capsys):
    path = made(tmp_path, ["*_proj", li.Target("layers.1.q_proj", rank=4)])
    assert main(["check", str(path), "--for", "peft"]) == 0
    assert "peft reads it as it was trained" in capsys.readouterr().out
    assert main(["check", str(path), "--for", "tgi"]) == 1
    out = capsys.readouterr().out
    assert "refused: ranks" in out and "layers.1.q_proj: rank 4, others 2" in out and "profile serve" in out
    assert main(["check", str(path), "--for", "vllm", "--max-rank", "2", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and report["reader"] == "vllm"
    assert [one["rule"] for one in report["findings"]] == ["rank"]
    assert main(["check", str(path), "--for", "vlm"]) == 2
    assert "did you mean 'vllm'" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "nothing"), "--for", "vllm"]) == 2


def test_checking_changes_nothing(tmp_path):
    path, model = made(tmp_path), Model()
    before = {file: file.read_bytes() for file in path.iterdir()}, copy.deepcopy(model.state_dict())
    for reader in READERS:
        li.check_adapter(path, reader, model=model)
    assert {file: file.read_bytes() for file in path.iterdir()} == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in model.state_dict().items())
    assert not [m for m in model.modules() if hasattr(m, "adapters")]
