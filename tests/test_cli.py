"""The command line: `main(argv)` in this process, and a few slow runs of the real entry point."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_inject as li
from lora_inject.cli import main, one_line
from lora_inject.cli.output import bytes_bar
from lora_inject.safefile import read_header, read_tensors

ROOT = Path(li.__file__).resolve().parents[1]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RANK", raising=False)


def filled(model, targets, **options):
    li.inject(model, targets, seed=0, **options)
    torch.manual_seed(1)
    for parameter in li.adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    return model


def save(model, folder):
    """Saves a model in bits as `save_pretrained` does, after taking all adapters out."""
    li.uninject(model)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny model on disk and an adapter for it."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=61, num_key_value_heads=1, tie_word_embeddings=False, **SMALL)
    model = filled(transformers.LlamaForCausalLM(config), ["*.q_proj", "*.down_proj"], rank=3, alpha=6)
    li.export(model, folder / "adapter.safetensors")
    save(model, folder / "base")
    return folder


@pytest.fixture
def run(capfd):
    """Runs a command in this process; capfd also sees what C code writes."""

    def call(*argv):
        code = main([str(argument) for argument in argv])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def entry_point(*argv, **options):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lora_inject", *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env, text=True, **pipes | options)


def assert_one_line(err, *words):
    assert re.fullmatch(r"lora-inject: error: [^\n]+\n", err), err
    assert [word for word in words if word not in err] == []


# plan


def test_plan_needs_nothing_but_the_config(run, llama, tmp_path):
    (tmp_path / "config.json").write_bytes((llama / "base" / "config.json").read_bytes())
    code, out, _ = run("plan", tmp_path, "--target", "*.q_proj", "--target", "*.gate_proj", "--rank", 4, "--json")
    plan = json.loads(out)
    assert code == 0
    sizes = {site["path"]: site["parameters"] for site in plan["sites"]}
    layers = [f"model.layers.{i}" for i in range(2)]
    assert sizes == {
        path: size
        for layer in layers
        for path, size in ((f"{layer}.self_attn.q_proj", 4 * (16 + 16)), (f"{layer}.mlp.gate_proj", 4 * (16 + 32)))
    }
    assert plan["hits"] == {"*.q_proj": 2, "*.gate_proj": 2}


def test_plan_hands_every_option_on(run, llama):
    options = ["--alpha", 8, "--rslora", "--bias", "--name", "mine", "--exclude", "*.1.*"]
    code, out, _ = run("plan", llama / "base", "-t", "*.q_proj", "--rank", 4, *options, "--json")
    plan = json.loads(out)
    assert (code, plan["name"], len(plan["sites"])) == (0, "mine", 1)
    assert plan["sites"][0]["scaling"] == 8 / 4**0.5
    assert plan["sites"][0]["parameters"] == 4 * (16 + 16) + 4 + 16
    assert [skip["why"] for skip in plan["skipped"]] == ["excluded"]


def test_plan_prints_a_table(run, llama):
    code, out, _ = run("plan", llama / "base", "-t", "*.q_proj")
    assert code == 0
    assert re.search(r"^model\.layers\.1\.self_attn\.q_proj +Linear +16 x 16 +linear +8 +256 ", out, re.MULTILINE)
    assert "2 sites, 512 parameters" in out


@pytest.mark.parametrize("by_path", [True, False], ids=["path", "preset"])
def test_plan_takes_a_recipe(run, llama, tmp_path, by_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("targets: ['*.q_proj', '*.k_proj']\nrank: 2\n")
    code, out, _ = run("plan", llama / "base", "--recipe", recipe if by_path else "llama", "--rank", 5, "--json")
    sites = json.loads(out)["sites"]
    assert code == 0
    assert {site["rank"] for site in sites} == {5}
    assert len(sites) == (4 if by_path else 14)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "BASE"], ["--recipe", "--target", "lora-inject plan --help"]),
        (["plan", "BASE", "-t", "*", "-r", "llama"], ["either --recipe or"]),
        (["plan", "BASE", "-t", "*.qproj"], ["*.qproj", "q_proj"]),
        (["plan", "BASE", "-t", "*.q_proj", "--rank", "0"], ["rank=0"]),
        (["plan", "BASE", "-t", "*.q_proj", "--rank", "many"], ["--rank", "integer"]),
        (["plan", "BASE", "-t", "*.q_proj", "--name", "a.b"], ["a.b"]),
        (["plan", "BASE", "-t", "re:("], ["re:("]),
        (["plan", "BASE", "-r", "lama"], ["lama", "llama"]),
        (["plan", "BASE", "-r", "./no.yaml"], ["no.yaml"]),
        (["plan", "./nowhere", "-t", "*"], ["./nowhere", "no such folder"]),
        (["plan", "EMPTY", "-t", "*"], ["config.json"]),
        (["plan", "BASE", "--ranks", "3"], ["--ranks", "--rank"]),
        (["plan"], ["MODEL", "plan --help"]),
        (["plann"], ["plann", "plan"]),
        (["inspect", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["inspect", "BASE/model.safetensors"], ["model.safetensors", "not an adapter of a known format"]),
        (["inspect", "BASE/config.json"], ["config.json", "not a safetensors file"]),
        (["inspect", "BASE"], ["a folder with no adapter"]),
        (["verify", "BASE", "--adapter", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["verify", "BASE", "--adapter", "ADAPTER", "--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["verify", "BASE", "--adapter", "ADAPTER", "--inputs", "ADAPTER"], ["forward fails", "lora_A"]),
        (["verify", "BASE"], ["--adapter"]),
        (["merge", "BASE", "OUT"], ["ADAPTER"]),
        (["merge", "BASE", "ADAPTER:nan", "OUT"], ["finite"]),
        (["merge", "BASE", "OUT", "--adapter", "ADAPTER:nan"], ["finite"]),
        (["merge", "BASE", "ADAPTER", "OUT", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["merge", "BASE", "ADAPTER", "OUT", "--via-model", "--dtype", "float32"], ["via_model"]),
        (["merge", "BASE", "ADAPTER", "OUT", "--threads", "0"], ["--threads"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_with_exit_code_2(run, llama, tmp_path, argv, words):
    places = {"BASE": llama / "base", "ADAPTER": llama / "adapter.safetensors", "EMPTY": tmp_path}
    pattern = re.compile("|".join(places))
    code, out, err = run(*[pattern.sub(lambda hit: str(places[hit[0]]), argument) for argument in argv])
    assert (code, out) == (2, "")
    assert_one_line(err, *words)
    assert not (tmp_path / "OUT").exists()


def test_a_config_that_transformers_cannot_use_is_told(run, llama, tmp_path):
    config = json.loads((llama / "base" / "config.json").read_text())
    path = tmp_path / "config.json"
    for change, words in [
        ({"model_type": "no_such_type"}, ["no config", "no_such_type"]),
        ({"architectures": ["LlamaForTelepathy"]}, ["LlamaForTelepathy", "upgrade transformers"]),
        ({"hidden_size": -1}, ["no config", "hidden size (-1)"]),
        ({"hidden_act": "telepathy"}, ["cannot build", "telepathy"]),
    ]:
        path.write_text(json.dumps(config | change))
        code, out, err = run("plan", tmp_path, "-t", "*")
        assert (code, out) == (2, "")
        assert_one_line(err, str(tmp_path), *words)
    path.write_text("{")
    assert run("plan", tmp_path, "-t", "*")[0] == 2


def test_a_model_that_names_no_architecture_is_the_bare_one(run, tmp_path):
    transformers.BertConfig(vocab_size=30, **SMALL).save_pretrained(tmp_path)
    code, out, _ = run("plan", tmp_path, "-t", "*.query", "--json")
    assert code == 0
    assert [site["path"] for site in json.loads(out)["sites"]] == [
        f"encoder.layer.{i}.attention.self.query" for i in range(2)
    ]


# inspect


class Kinds(nn.Module):
    """One module of every layout that the factors of an adapter have in a file."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.table = nn.Embedding(11, 6)
        self.line = nn.Conv1d(4, 6, 3)
        self.image = nn.Conv2d(4, 6, (3, 2), groups=2)
        self.back = nn.ConvTranspose1d(3, 4, 3)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))


PRODUCTS = {
    "linear": "or,ri->oi",
    "table": "or,ri->oi",
    "line": "orz,rik->oik",
    "image": "oryz,rikl->oikl",
    "back": "irk,roz->iok",
    "experts": "eor,eri->eoi",
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("factorization", ["pointwise", "balanced"])
def test_norms_are_those_of_the_full_update(run, tmp_path, factorization, rslora):
    path = tmp_path / "kinds.safetensors"
    targets = ["linear", "table", "line", "experts", li.Target("back", factorization="pointwise")]
    targets.append(li.Target("image", factorization=factorization))
    model = filled(Kinds(), targets, rank=3, alpha=5, rslora=rslora)
    li.export(model, path)
    header = read_header(path)
    tensors = {key: tensor.double() for key, tensor in read_tensors(header, header.tensors).items()}
    code, out, _ = run("inspect", path, "--json")
    found = json.loads(out)
    assert code == 0
    total = 0.0
    for site in found["sites"]:
        a, b = tensors[f"{site['path']}.lora_A"], tensors[f"{site['path']}.lora_B"]
        product = PRODUCTS[site["path"]]
        if site["path"] == "image" and factorization == "balanced":
            product = "orky,rizl->oikl"
        update = torch.einsum(product, b, a) * 5 / (3**0.5 if rslora else 3)
        assert update.shape == tuple(site["shape"])
        assert site["norm_delta"] == pytest.approx(float(update.square().sum() ** 0.5), rel=1e-12)
        assert site["norm_a"] == pytest.approx(float(a.square().sum() ** 0.5), rel=1e-12)
        assert site["norm_b"] == pytest.approx(float(b.square().sum() ** 0.5), rel=1e-12)
        assert (site["rank"], site["parameters"]) == (3, a.numel() + b.numel())
        total += float(update.square().sum())
    assert len(found["sites"]) == len(PRODUCTS)
    assert found["norm_delta"] == pytest.approx(total**0.5, rel=1e-12)
    assert found["size"] == path.stat().st_size


def test_the_norm_keeps_its_digits_where_the_product_nearly_cancels():
    from lora_inject.report.spectra import core

    # B A = b a - (b + e c) a = -e c a, all of it exact in binary.
    b, c = torch.tensor([3.0, -1.0, 2.0, 5.0]).double(), torch.tensor([1.0, 4.0, -2.0, 2.0]).double()
    a, e = torch.tensor([2.0, -3.0, 6.0]).double(), 2.0**-32
    norm = float(core(torch.stack([a, -a]), torch.stack([b, b + e * c], dim=1)).norm())
    assert norm == pytest.approx(e * 5 * 7, rel=1e-4)


def test_a_dense_update_and_biases_are_told(run, tmp_path):
    model = filled(Kinds(), "linear", rank=4, alpha=2, bias=True, dense=True)
    li.export(model, tmp_path / "dense.safetensors")
    update = model.linear.adapters["default"].lora_dense.detach().double()
    code, out, _ = run("inspect", tmp_path / "dense.safetensors", "--json")
    (site,) = json.loads(out)["sites"]
    assert code == 0
    assert site["norm_delta"] == pytest.approx(float(update.square().sum() ** 0.5) / 2, rel=1e-12)
    assert (site["norm_a"], site["norm_b"], site["parameters"]) == (None, None, 5 * 7 + 5)
    assert site["options"]["bias"] is True
    code, out, _ = run("inspect", tmp_path / "dense.safetensors")
    assert "bias, dense" in out


def test_the_base_of_a_site_is_the_one_in_the_file(run, llama):
    written = json.loads(read_header(llama / "adapter.safetensors").metadata["base"])["sites"]
    found = json.loads(run("inspect", llama / "adapter.safetensors", "--json")[1])
    assert {site["path"]: {"shape": site["shape"], "hash": site["base"]} for site in found["sites"]} == written


def test_tensors_that_do_not_fit_are_told_site_by_site(run, llama, tmp_path):
    header = read_header(llama / "adapter.safetensors")
    tensors = read_tensors(header, header.tensors)
    q, down = "model.layers.{}.self_attn.q_proj.", "model.layers.{}.mlp.down_proj."
    tensors[q.format(0) + "lora_A"][0, 0] = float("nan")
    del tensors[q.format(1) + "lora_B"]
    tensors[down.format(0) + "lora_A"] = torch.zeros(2, 32)
    tensors["model.norm.lora_A"] = torch.zeros(2, 2)
    path = tmp_path / "broken.safetensors"
    save_file(tensors, str(path), dict(header.metadata))
    code, out, _ = run("inspect", path, "--json")
    found = json.loads(out)
    problems = {site["path"]: site["problem"] for site in found["sites"]}
    assert code == 0
    assert problems == {
        "model.layers.0.self_attn.q_proj": "NaN or infinity in lora_A",
        "model.layers.1.self_attn.q_proj": "lora_B missing",
        "model.layers.0.mlp.down_proj": "A (2, 32) and B (16, 3) do not fit rank 3",
        "model.layers.1.mlp.down_proj": "",
    }
    assert [site["norm_delta"] is None for site in found["sites"]] == [bool(problem) for problem in problems.values()]
    assert next(s["norm_a"] for s in found["sites"] if s["path"].endswith("0.self_attn.q_proj")) is None
    assert found["strays"] == ["model.norm.lora_A"]
    assert "tensors that belong to no site: model.norm.lora_A" in run("inspect", path)[1]


def test_a_truncated_adapter_is_an_error(run, llama, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes((llama / "adapter.safetensors").read_bytes()[:-1])
    code, out, err = run("inspect", path)
    assert (code, out) == (2, "")
    assert_one_line(err, str(path), "truncated")


# verify


def test_verify_passes_a_model_whose_adapters_all_act(run, llama):
    code, out, _ = run("verify", llama / "base", "--adapter", llama / "adapter.safetensors", "--json")
    report = json.loads(out)
    assert (code, report["ok"]) == (0, True)
    assert len(report["adapters"]) == 4 and all(adapter["alive"] for adapter in report["adapters"])


def test_verify_runs_on_tensors_of_ones_own(run, llama, tmp_path):
    save_file({"input_ids": torch.tensor([[5, 7, 9]])}, str(tmp_path / "inputs.safetensors"))
    argv = ("verify", llama / "base", "--adapter", llama / "adapter.safetensors", "--json")
    effects = [
        [adapter["effect"] for adapter in json.loads(run(*argv, *more)[1])["adapters"]]
        for more in ((), ("--inputs", tmp_path / "inputs.safetensors"))
    ]
    assert all(effects[1]) and effects[0] != effects[1]


def test_verify_reports_a_dead_adapter_by_exit_code_1(run, tmp_path):
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=16, **SMALL)
    text = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, **SMALL)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    torch.manual_seed(0)
    model = filled(transformers.LlavaForConditionalGeneration(config), "*.v_proj", rank=2)
    li.export(model, tmp_path / "adapter.safetensors")
    save(model, tmp_path / "base")
    code, out, _ = run("verify", tmp_path / "base", "-a", tmp_path / "adapter.safetensors", "--json")
    alive = {adapter["path"]: adapter["alive"] for adapter in json.loads(out)["adapters"]}
    assert code == 1
    # Text alone never runs the vision tower.
    assert alive == {path: "language_model" in path for path in alive}
    assert set(alive.values()) == {True, False}


def test_verify_refuses_another_base_unless_told(run, llama, tmp_path):
    torch.manual_seed(5)
    transformers.LlamaForCausalLM.from_pretrained(llama / "base").apply(
        lambda module: nn.init.normal_(module.weight) if isinstance(module, nn.Linear) else None
    ).save_pretrained(tmp_path / "other")
    argv = ("verify", tmp_path / "other", "--adapter", llama / "adapter.safetensors")
    code, _, err = run(*argv)
    assert code == 2
    assert "made for other base weights" in err
    assert run(*argv, "--no-check-base")[0] == 0


# merge


def weights(folder):
    header = read_header(folder / "model.safetensors")
    return read_tensors(header, header.tensors)


@pytest.mark.parametrize("more", [[], ["--via-model"], ["--threads", 2]], ids=lambda more: " ".join(map(str, more)))
def test_merge_writes_what_from_pretrained_loads(run, llama, tmp_path, more):
    adapter = f"{llama / 'adapter.safetensors'}:-0.5"
    argv = ("merge", llama / "base", llama / "adapter.safetensors", adapter, tmp_path / "out", *more)
    code, out, _ = run(*argv, "--dry-run", "--json")
    assert code == 0 and json.loads(out)
    assert not (tmp_path / "out").exists()
    code, out, err = run(*argv, "--json")
    assert code == 0 and json.loads(out), err

    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    header = read_header(llama / "adapter.safetensors")
    factors, sites = read_tensors(header, header.tensors), {key.rpartition(".")[0] for key in header.tensors}
    for key, before in weights(llama / "base").items():
        site = key.removesuffix(".weight")
        if site in sites:
            update = factors[f"{site}.lora_B"].double() @ factors[f"{site}.lora_A"].double()
            expected = before.double() + 0.5 * (6 / 3) * update
            torch.testing.assert_close(loaded[key].double(), expected, rtol=1e-6, atol=1e-6)
            assert not torch.equal(loaded[key], before)
        else:
            assert torch.equal(loaded[key], before)


def test_merge_stores_what_changes_in_another_dtype_and_takes_adapters_by_name(run, llama, tmp_path):
    adapter = llama / "adapter.safetensors"
    code, _, err = run("merge", llama / "base", tmp_path / "out", "--adapter", f"{adapter}:3", "--dtype", "float64")
    assert code == 0, err
    changed = {key for key in read_header(adapter).tensors if key.endswith("lora_B")}
    dtypes = {key: tensor.dtype for key, tensor in weights(tmp_path / "out").items()}
    wider = {key for key, dtype in dtypes.items() if dtype == torch.float64}
    assert wider == {key.replace(".lora_B", ".weight") for key in changed} and len(wider) < len(dtypes)
    by_place = ("merge", llama / "base", f"{adapter}:2", tmp_path / "two", "--adapter", adapter, "--dtype", "float64")
    assert run(*by_place)[0] == 0
    for key, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "out")[key], rtol=1e-6, atol=1e-6)


def test_merge_replaces_an_output_only_when_told(run, llama, tmp_path):
    argv = ("merge", llama / "base", llama / "adapter.safetensors", tmp_path / "out")
    assert run(*argv)[0] == 0
    before = weights(tmp_path / "out")
    twice = ("merge", llama / "base", f"{llama / 'adapter.safetensors'}:2", tmp_path / "out")
    code, out, err = run(*twice)
    assert (code, out) == (2, "")
    assert_one_line(err, str(tmp_path / "out"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(tmp_path / "out").items())
    assert run(*twice, "--overwrite")[0] == 0
    assert not all(torch.equal(tensor, before[key]) for key, tensor in weights(tmp_path / "out").items())


# recipes


def test_presets_and_their_schema_are_listed(run):
    presets = json.loads(run("presets", "--json")[1])["presets"]
    assert {"llama", "bert"} <= presets.keys() and all(presets.values())
    assert all(name in run("presets")[1] for name in presets)
    assert "targets" in json.loads(run("schema")[1])["properties"]


# what all commands share


@pytest.mark.parametrize("argv", [["--debug", "inspect", "none"], ["inspect", "none", "--debug"]])
def test_a_traceback_comes_only_with_debug(run, argv):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert "Traceback" in err and "FormatError" in err
    assert err.splitlines()[-1].startswith("lora-inject: error: none: ")


def test_an_unexpected_error_is_one_line_too(run, llama, monkeypatch):
    def fail(path, **options):
        raise ValueError("two\nlines")

    monkeypatch.setattr("lora_inject.inspection.inspect_adapter", fail)
    code, out, err = run("inspect", llama / "adapter.safetensors")
    assert (code, out) == (2, "")
    assert_one_line(err, "ValueError: two lines", "--debug")


def test_only_rank_0_prints(run, llama, monkeypatch):
    argv = ("inspect", llama / "adapter.safetensors")
    monkeypatch.setenv("RANK", "0")
    assert run(*argv)[1] != ""
    monkeypatch.setenv("RANK", "3")
    assert run(*argv) == (0, "", "")
    assert_one_line(run("inspect", "none")[2], "rank 3: none")


def test_no_command_means_help(run):
    code, out, _ = run()
    assert code == 0
    assert all(command in out for command in ("plan", "inspect", "merge", "verify"))
    assert run("--version") == (0, f"lora-inject {li.__version__}\n", "")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("plain", "plain"),
        ("two wrong:\n  a: x\n  b: y\nFix them.", "two wrong: a: x; b: y. Fix them."),
        ("two wrong:\n  a is.\n\nFix it.\nSoon.", "two wrong: a is. Fix it. Soon."),
    ],
)
def test_a_message_of_several_lines_becomes_one(message, line):
    assert one_line(message) == line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_whole_lines(llama, monkeypatch):
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["inspect", str(llama / "adapter.safetensors")]) == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    (row,) = [line for line in plain.splitlines() if line.startswith("model.layers.1.mlp.down_proj")]
    assert row.split()[:2] == ["model.layers.1.mlp.down_proj", "linear"] and len(row) > 80
    (header,) = [line for line in screen.getvalue().splitlines() if "|dW|" in line and "scaling" in line]
    assert header.startswith("\x1b[1mpath ")


def test_the_bar_shows_on_a_terminal_only(monkeypatch, capsys):
    with bytes_bar("merging") as progress:
        assert progress is None
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with bytes_bar("merging") as progress:
        progress(512, 1024, "model.safetensors")
    assert "merging model.safetensors" in screen.getvalue() and "0.5/1.0 kB" in screen.getvalue()


# the real entry point


def test_the_entry_point_is_main():
    assert 'lora-inject = "lora_inject.cli:main"' in (ROOT / "pyproject.toml").read_text()


def test_the_entry_point_prints_json_alone(llama):
    out, err = (process := entry_point("plan", llama / "base", "-t", "*.q_proj", "--json")).communicate()
    # transformers imports torchao where it is installed, which may complain about its own libraries.
    ours = [line for line in err.splitlines() if "torchao" not in line and "/_pytree.py:" not in line]
    assert (process.returncode, ours) == (0, [])
    assert len(json.loads(out)["sites"]) == 2
    out, err = (process := entry_point("inspect", "none")).communicate()
    assert (process.returncode, out) == (2, "")
    assert_one_line(err, "none")


def test_help_imports_none_of_the_heavy_packages():
    program = "import sys; from lora_inject.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert not {"transformers", "pydantic", "yaml"} & set(done.stderr.split())


BUSY = """
import runpy, sys, time, lora_inject.inspection
def at_work(*_, **__):
    print("at work", flush=True)
    time.sleep(60)
lora_inject.inspection.inspect_adapter = at_work
sys.argv = ["lora-inject", "inspect", "adapter.safetensors"]
runpy.run_module("lora_inject", run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_with_130_and_no_traceback():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", BUSY], env=env, text=True, **pipes) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_leaves_ends_the_command_quietly(llama):
    read, write = os.pipe()
    os.close(read)
    process = entry_point("inspect", llama / "adapter.safetensors", stdout=write)
    os.close(write)
    assert process.communicate()[1] == ""
    assert process.returncode == 1


# the page about it


def test_the_commands_of_the_documentation_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    names, printed, commands = {}, "", 0
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(text, names)
        elif language == "text":
            assert printed == text
        for command in text.splitlines() if language == "sh" else ():
            program, *argv = shlex.split(command)
            code, printed, _ = run(*argv)
            assert (program, code) == ("lora-inject", 0), command
            commands += 1
    assert commands > 10
    assert transformers.AutoModelForCausalLM.from_pretrained("merged").config.architectures == ["LlamaForCausalLM"]


def test_names_that_no_terminal_can_show_are_printed_as_escapes(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    li.inject(model, "0", rank=1)
    path = li.export(model, tmp_path / "adapter.safetensors")
    with safe_open(path, "pt") as file:
        meta = {key: text.replace('"0"', '"\\ud800"') for key, text in file.metadata().items()}
    save_file(load_file(path), path, meta)
    out, err = (process := entry_point("inspect", path)).communicate()
    assert process.returncode == 0, err
    assert "\\ud800" in out
