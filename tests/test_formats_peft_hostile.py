"""PEFT's folders that are broken, hostile, or more than low-rank pairs: a clear error, soon, and nothing changed."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from snapshot import assert_same, snapshot
from torch import nn

import lora_inject as li
from lora_inject.formats.peft_patterns import Patterns, anchored

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q"]}


def model() -> nn.Module:
    return nn.ModuleDict({"q": nn.Linear(4, 3), "e": nn.Embedding(5, 4, padding_idx=1)})


def pair(path: str = "q", rank: int = 2) -> dict[str, torch.Tensor]:
    place = f"base_model.model.{path}"
    return {f"{place}.lora_A.weight": torch.randn(rank, 4), f"{place}.lora_B.weight": torch.randn(3, rank)}


def folder(path: Path, config=PLAIN, tensors=None) -> Path:
    path = path / "adapter"
    path.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (path / CONFIG).write_text(text)
    save_file(pair() if tensors is None else tensors, path / TENSORS)
    return path


def refused(path: Path, kind, said: str) -> None:
    """Loading fails in good time with that message, and the model is as it was."""
    target = model()
    before = snapshot(target)
    start = time.perf_counter()
    with pytest.raises(kind, match=said):
        li.load(target, path)
    assert time.perf_counter() - start < 2
    assert_same(before, target)


def test_patterns_mean_what_pefts_own_rule_makes_of_them():
    keys = [r"a\.q", "x.q", "q", "^b.q", "layers.1.q", r"layers\.2\.q", "l.*3", "-q", "a-b", r"^c\.q", "layers.1.k"]
    paths = ["q", "a.q", "a_q", "x.q", "xyq", "m.x.q", "m.xyq", "b.q", "m.b.q", "bq", "layers.1.q", "layersx1yq"]
    paths += ["m.layers.1.q", "mlayers.1.q", "layers_2.q", "m.layers.2.q", "c.q", "m.c.q", "a-b", "x.a-b", "lx3", "k"]
    paths += ["layers.1.k", "layers.1xk", "", "."]
    generator = random.Random(0)
    for _ in range(50):
        values = {key: n for n, key in enumerate(generator.sample(keys, generator.randint(0, len(keys))))}
        ours = Patterns(values, "here")
        for path in paths:
            first = next((key for key in values if re.match(rf"(.*\.)?({key})$", path)), None)
            assert ours.of(path, -1) == (-1 if first is None else values[first]), (path, values)


@pytest.mark.parametrize("name", ["model.layers.{}.q_proj", r"model\.layers\.{}\.q_proj", "m{}"])
def test_a_hundred_thousand_plain_patterns_are_looked_up(name):
    start = time.process_time()
    ours = Patterns({name.format(n): n for n in range(100_000)}, "here")
    for n in range(0, 100_000, 1000):
        assert ours.of(name.replace("\\", "").format(n), -1) == n
    assert time.process_time() - start < 4


def test_names_with_dots_in_every_place_are_refused():
    names = ["".join("." if number >> place & 1 else "a" for place in range(12)) for number in range(4096)]
    with pytest.raises(li.FormatError, match="too costly to match"):
        Patterns(dict.fromkeys(names, 1), "here")


def test_a_plain_one_loads(tmp_path):
    target = model()
    li.load(target, folder(tmp_path))
    assert [ref.path for ref in li.adapters(target)] == ["q"]


FEATURES = [
    ("use_dora", True, "DoRA"),
    ("use_qalora", True, "QA-LoRA"),
    ("layer_replication", [[0, 2], [1, 3]], "repeated"),
    ("megatron_config", {"a": 1}, "Megatron"),
    ("trainable_token_indices", [3], "rows of an embedding"),
    ("trainable_token_indices", {"e": [3]}, "rows of an embedding"),
    ("alora_invocation_tokens", [1, 2], "activated LoRA"),
    ("velora_config", {"rank": 1}, "VeLoRA"),
    ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
    ("arrow_config", {"top_k": 1}, "Arrow"),
    ("kasa_config", {"beta": 1}, "KaSA"),
    ("monteclora_config", {"n": 1}, "MonteCLoRA"),
    ("ensure_weight_tying", True, "share"),
    ("init_lora_weights", "pissa", "changes the base's weights"),
    ("init_lora_weights", "pissa_niter_16", "changes the base's weights"),
    ("init_lora_weights", "PiSSA", "changes the base's weights"),
    ("init_lora_weights", "olora", "changes the base's weights"),
    ("init_lora_weights", "corda", "changes the base's weights"),
    ("init_lora_weights", "loftq", "changes the base's weights"),
    ("init_lora_weights", "lora_ga", "changes the base's weights"),
    ("peft_type", "LOHA", "no LoRA"),
    ("peft_type", "PROMPT_TUNING", "no LoRA"),
    ("peft_type", "ADALORA", "no LoRA"),
    ("something_new", 3, "does not know"),
    ("something_new", True, "does not know"),
]


@pytest.mark.parametrize("key, value, said", FEATURES, ids=lambda value: str(value)[:30])
def test_what_changes_the_function_is_refused_by_name(key, value, said, tmp_path):
    refused(folder(tmp_path, PLAIN | {key: value}), li.UnsupportedError, f"{key} .*{said}")


HARMLESS = {
    "auto_mapping": {"base_model_class": "Evil", "parent_library": "os; import this"},
    "base_model_name_or_path": "http://example.invalid/../../etc/passwd",
    "revision": "../x",
    "init_lora_weights": "gaussian",
    "something_new": None,
    "other_new": [],
    "third_new": False,
    "eva_config": {"rho": 2.0},
    "runtime_config": {"ephemeral_gpu_offload": True},
    "lora_dropout": 0.1,
    "task_type": "CAUSAL_LM",
    "layers_to_transform": [0],
    "inference_mode": False,
}


def test_names_and_paths_in_the_config_are_never_followed(tmp_path):
    target = model()
    li.load(target, folder(tmp_path, PLAIN | HARMLESS))
    assert next(iter(li.adapters(target))).adapter.config.dropout == 0.1


WRONG = [
    ({"r": 0}, "r = 0: must be a whole number"),
    ({"r": "8"}, "r = 8: must be a whole number"),
    ({"r": True}, "r = True: must be"),
    ({"r": 10**30}, "must be a whole number"),
    ({"r": None}, "r missing"),
    ({"lora_alpha": "1e9"}, "lora_alpha = 1e9: must be a number"),
    ({"lora_alpha": None}, "lora_alpha missing"),
    ({"lora_dropout": 1.5}, "lora_dropout = 1.5"),
    ({"use_rslora": "yes"}, "use_rslora = yes: must be true or false"),
    ({"rank_pattern": [1]}, "rank_pattern"),
    ({"rank_pattern": {"q": -1}}, "rank_pattern"),
    ({"alpha_pattern": {"q": "x"}}, "alpha_pattern"),
    ({"alpha_pattern": {"q[": 1.0}}, "no regular expression"),
    ({"bias": "some"}, "bias = some"),
    ({"target_parameters": "a.b"}, "target_parameters"),
    ({"modules_to_save": "head"}, "modules_to_save"),
    ({"peft_version": 3}, "peft_version"),
    ({"r": 4}, r"q: A \(2, 4\) has rank 2, and .*adapter_config.json says 4"),
    ({"rank_pattern": {"q": 3}}, "has rank 2, and .* says 3"),
]


@pytest.mark.parametrize("change, said", WRONG, ids=lambda value: str(value)[:40])
def test_wrong_types_and_ranges_name_the_file_and_the_key(change, said, tmp_path):
    refused(folder(tmp_path, PLAIN | change), li.FormatError, said)


TEXTS = [
    ("", "JSON"),
    ("[]", "must hold a JSON object"),
    ('{"peft_type": "LORA", "r": 2, "r": 3, "lora_alpha": 1}', "'r' stands twice"),
    ('{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', "NaN is not a number"),
    ('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}', "lora_alpha"),
    ("[" * 100_000, "nested|JSON"),
]


@pytest.mark.parametrize("text, said", TEXTS, ids=lambda value: str(value)[:30])
def test_texts_that_are_no_config(text, said, tmp_path):
    refused(folder(tmp_path, text), li.FormatError, said)


A, B = pair().values()
Q = "base_model.model.q"
KEYS = [
    ({f"{Q}.lora_A.weight": A}, li.FormatError, "q: lora_A.weight make no pair"),
    ({**pair(), f"{Q}.lora_C.weight": A}, li.FormatError, r"1 tensors that belong to no low-rank pair.*\n.*lora_C"),
    ({**pair(), f"{Q}.lora_A.default.weight": A}, li.FormatError, "lora_A.default.weight"),
    ({**pair(), f"{Q}.lora_magnitude_vector": A}, li.UnsupportedError, r"DoRA.*\n.*lora_magnitude_vector"),
    ({**pair(), "lora_A.weight": A}, li.FormatError, "lora_A.weight"),
    ({**pair(), f"{Q}.base_layer.base_layer.lora_A.weight": A}, li.FormatError, "q"),
    ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B[:, :1].clone()}, li.FormatError, "do not share a rank"),
    ({f"{Q}.lora_A.weight": A[0], f"{Q}.lora_B.weight": B}, li.FormatError, "rank"),
    ({f"{Q}.lora_A.weight": A.int(), f"{Q}.lora_B.weight": B}, li.FormatError, "dtype torch.int32"),
    ({f"{Q}.lora_A.weight": A / 0, f"{Q}.lora_B.weight": B}, li.FormatError, "NaN or infinity"),
    ({f"{Q}.lora_A.weight": A[:, :3].clone(), f"{Q}.lora_B.weight": B}, li.MismatchError, "shape"),
    ({**pair(), f"{Q}.bias": torch.ones(3), f"{Q}.base_layer.bias": torch.ones(3)}, li.FormatError, "q.bias"),
    ({**pair(), "base_model.model.q.nothing": A}, li.MismatchError, "no such parameter"),
    ({**pair(), "base_model.model.h.modules_to_save.weight": A}, li.FormatError, "h.weight.*two values"),
    (pair("../../x"), li.MismatchError, "no module"),
    ({k: v for k, v in pair("nowhere").items()}, li.MismatchError, "nowhere"),
    (
        {
            "base_model.model.e.lora_embedding_A": torch.ones(2, 5),
            "base_model.model.e.lora_embedding_B": torch.ones(4, 2),
        },
        li.UnsupportedError,
        "updates row 1, the padding row",
    ),
    ({}, li.FormatError, "no adapter|holds no"),
]


@pytest.mark.parametrize("tensors, kind, said", KEYS, ids=[str(number) for number in range(len(KEYS))])
def test_every_tensor_is_accounted_for_or_named(tensors, kind, said, tmp_path):
    refused(folder(tmp_path, tensors=tensors), kind, said)


def test_a_missing_config_is_named(tmp_path):
    path = folder(tmp_path)
    (path / CONFIG).unlink()
    refused(path, li.FormatError, "adapter_config.json: missing: without it nobody knows alpha")
    refused(path / TENSORS, li.FormatError, "adapter_config.json: missing")


def test_the_file_alone_is_read_with_the_config_beside_it(tmp_path):
    target = model()
    li.load(target, folder(tmp_path) / TENSORS)
    assert len(list(li.adapters(target))) == 1


BOMBS = ["(a+)+$", "(a|a)*b", "(.*)*x", "a{1,9999}{1,9999}", "((((a?)?)?)?)*", r"(a)\1+", "(?=.*)x", "a?" * 40 + "b"]


@pytest.mark.parametrize("pattern", BOMBS)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_would_take_ages_are_refused(pattern, key, tmp_path):
    refused(folder(tmp_path, PLAIN | {key: {pattern: 2}}), li.FormatError, "too costly|no regular expression")


def test_many_patterns_on_many_names_end_in_time():
    patterns = Patterns({f".*a.*b{number}.*" + "x": 1 for number in range(3000)}, "here")
    start = time.perf_counter()
    with pytest.raises(li.FormatError, match="too long to match"):
        for _ in range(10_000):
            patterns.of("a" * 200 + ".b" * 50, 0)
    assert time.perf_counter() - start < 10


def test_thousands_of_layers_with_patterns_of_their_own_are_fast():
    paths = [f"model.layers.{number}.q-proj_x" for number in range(5000)]
    patterns = Patterns(
        {anchored(path): number for number, path in enumerate(paths)} | {r".*\.0\.q-proj_x": -1}, "here"
    )
    start = time.perf_counter()
    assert [patterns.of(path, -2) for path in paths] == list(range(5000))
    assert patterns.of("x.model.layers.7.q-proj_x", -2) == -2
    assert patterns.of("x.model.layers.0.q-proj_x", -2) == -1
    assert Patterns({".*q": 1, anchored("a.q"): 2}, "here").of("a.q", 0) == 1
    assert time.perf_counter() - start < 2


def test_patterns_of_the_wild_are_accepted():
    wild = [
        "q_proj",
        "model.layers.0.self_attn.q_proj",
        r"^model\.layers\.0\.self_attn\.q_proj",
        r".*\.layers\.(0|1|2|10|11)\..*q_proj",
        r"layers\.\d+\.mlp\.(?:gate|up)_proj",
        r"layers\.[0-9]+\.self_attn\.(q|k|v|o)_proj",
        r".*\.gate_up_proj",
    ]
    assert len(Patterns(dict.fromkeys(wild, 1), "here")) == len(wild)


# Writing.


def exported(path: Path, target=None) -> Path:
    target = target or model()
    li.inject(target, "q", rank=2)
    return li.export(target, path, format="peft")


def test_an_older_adapter_is_replaced_and_other_files_are_not(tmp_path):
    path = exported(tmp_path / "out")
    exported(path)
    assert sorted(os.listdir(tmp_path)) == ["out"]
    (path / "thesis.txt").write_text("mine")
    before = {file: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(li.FormatError, match=r"(?s)holds more:\n  thesis.txt"):
        exported(path)
    assert {file: file.read_bytes() for file in path.iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(li.FormatError, match="file"):
        exported(tmp_path / "file")
    with pytest.raises(li.FormatError, match="cannot be written"):
        exported(tmp_path / "no" / "folder")


KILLED = """
import sys, torch, lora_inject as li
torch.set_num_threads(1)
model = torch.nn.ModuleDict({"q": torch.nn.Linear(300, 300)})
li.inject(model, "q", rank=64)
print("ready", flush=True)
number = 0
while True:
    number += 1
    for parameter in li.adapter_parameters(model).values():
        torch.nn.init.constant_(parameter, number)
    li.export(model, sys.argv[1], format="peft")
"""


def test_killed_at_any_moment_the_folder_is_the_old_or_the_new_one(tmp_path):
    for wait in (0.02, 0.05, 0.11):
        path = tmp_path / str(wait)
        command = [sys.executable, "-c", KILLED, str(path)]
        environment = {**os.environ, "PYTHONPATH": str(Path(li.__file__).parent.parent)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        while not path.exists():
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        process.wait()
        process.stdout.close()
        target = nn.ModuleDict({"q": nn.Linear(300, 300)})
        li.load(target, path, check_base=False)
        values = {float(p.detach().unique()) for p in li.adapter_parameters(target).values()}
        assert len(values) == 1 and values.pop() >= 1


@pytest.mark.parametrize(
    "build, target, said",
    [
        (lambda: nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, groups=2)}), "a", "groups=2"),
        (lambda: nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, dilation=2)}), "a", "dilation"),
        (lambda: nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")}), "a", "padding_mode"),
        (lambda: nn.ModuleDict({"a": nn.ConvTranspose2d(4, 4, 3)}), "a", "conv_transpose"),
        (lambda: nn.ModuleDict({"a": nn.EmbeddingBag(4, 4)}), "a", "embedding_bag"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, kdim=3)}), "a", "a.q_proj_weight: attention"),
        (lambda: nn.ModuleDict({"a": nn.LSTM(4, 4)}), "a", "a.weight_ih_l0: recurrent"),
        (lambda: nn.Linear(4, 4), "*", r"\(root\)"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_peft_cannot_hold_is_refused_by_name(build, target, said, tmp_path):
    made = build()
    li.inject(made, target, rank=1)
    for parameter in li.adapter_parameters(made).values():
        nn.init.normal_(parameter)
    with pytest.raises(li.UnsupportedError, match=said):
        li.export(made, tmp_path / "out", format="peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "targets, options, said",
    [
        (["q", li.Target("q.weight", adapter="full")], {}, "q: weight: trained as a whole beside"),
        (["q", "e"], {"bias": True}, "lora_bias for all layers or none.*\n  e"),
        (["e", li.Target("bn.weight", adapter="full")], {}, "buffers"),
        (["q", li.Target("n.weight", adapter="full")], {}, "would take these for it too:\n  bn"),
    ],
)
def test_combinations_that_peft_cannot_hold(targets, options, said, tmp_path):
    made = model()
    made["bn"] = nn.BatchNorm1d(3)
    made["n"] = nn.LayerNorm(3)
    li.inject(made, targets, rank=1, **options)
    with pytest.raises(li.UnsupportedError, match=f"(?s){said}"):
        li.export(made, tmp_path / "out", format="peft")


def test_without_a_model_what_needs_one_says_so(tmp_path):
    made = nn.ModuleDict({"c": nn.Conv2d(2, 2, 3), "x": nn.Module()})
    made["x"].w = nn.Parameter(torch.randn(3, 4, 5))
    for target in ("c", "x.w"):
        one = copy.deepcopy(made)
        li.inject(one, target, rank=1)
        file = li.export(one, tmp_path / f"{target}.safetensors")
        with pytest.raises(li.UnsupportedError, match=r"depends on the module: name the model \(--model DIR\)"):
            li.convert(file, tmp_path / "out", "peft")
        path = li.export(one, tmp_path / target, format="peft")
        if target == "x.w":
            with pytest.raises(li.UnsupportedError, match=r"only the model.*give one \(--model DIR\)"):
                li.convert(path, tmp_path / "back.safetensors", "lora_inject")
