"""mlx-lm's folders: written for its names and layouts, read back to the bit, compared with its own arithmetic."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from causal_models import (
    ATTENTION,
    MLP,
    PACKED,
    TOKENS,
    adapted,
    assert_bits,
    causal,
    changed,
    logits,
    state,
)
from safetensors.torch import load_file, save_file

import lora_inject as li
from lora_inject.formats import read_adapter, write_adapter

LINEARS = [*ATTENTION, *MLP, "lm_head"]
NAMES = {
    "mixtral": "mlp.experts block_sparse_moe.switch_mlp",
    "qwen3_moe": "mlp.experts mlp.switch_mlp",
    "gpt_oss": "mlp.experts mlp.experts",
}


def read_folder(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(folder / "adapters.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], config: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def settings(rank: int = 2, scale: float = 3.0, **more: object) -> dict:
    return {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": rank, "scale": scale, **more}}


def by_mlx(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """Returns what mlx-lm's `fuse` would add to transformers' parameters, from the file alone."""
    tensors, config = read_folder(folder)
    scale, found = config["lora_parameters"]["scale"], {}
    ours, theirs = NAMES.get(family, " ").split(" ")
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        a, b = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
        if a.dim() == 2:
            found[f"{name}.weight"] = scale * (a @ b if "embed" in name else b.T @ a.T)
        else:
            found[name.replace(theirs, ours)] = scale * b @ a
    for owner in {path.rpartition(".")[0] for path in found if path.endswith(".gate_proj") and "experts" in path}:
        gate, up = found.pop(f"{owner}.gate_proj"), found.pop(f"{owner}.up_proj")
        if family == "gpt_oss":
            both = torch.stack([gate, up], 2).flatten(1, 2)
            found[f"{owner}.gate_up_proj"] = both.transpose(1, 2)
            found[f"{owner}.down_proj"] = found[f"{owner}.down_proj"].transpose(1, 2)
        else:
            found[f"{owner}.gate_up_proj"] = torch.cat([gate, up], 1)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_mlx_adds_what_the_adapter_adds(family, tmp_path):
    packed = PACKED if family in NAMES else MLP
    model = adapted(causal(family), [*ATTENTION, *packed, "lm_head", "*.embed_tokens"], torch.float64)
    folder = li.export(model, tmp_path / "adapter", format="mlx")
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapters.safetensors"]
    torch.testing.assert_close(logits(changed(causal(family), by_mlx(folder, family))), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_a_round_trip_keeps_every_bit(family, dtype, tmp_path):
    packed = PACKED if family in NAMES else MLP
    model = adapted(causal(family), [*ATTENTION, *packed, "lm_head", "*.embed_tokens"], dtype, alpha=6, dropout=0.25)
    folder = li.export(model, tmp_path / "adapter", format="mlx")
    again = causal(family)
    li.load(again, folder)
    assert_bits(state(model), state(again))
    configs = {ref.path: ref.adapter.config for ref in li.adapters(again)}
    for ref in li.adapters(model):
        assert configs[ref.path].scaling == ref.adapter.config.scaling == 1.5
        assert configs[ref.path].dropout == 0.25


def test_the_files_are_what_mlx_writes(tmp_path):
    model = adapted(causal("mixtral"), ["*.q_proj", *PACKED, "*.embed_tokens"], rank=2, alpha=5, dropout=0.5)
    tensors, config = read_folder(li.export(model, tmp_path / "a", format="mlx"))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".1." not in name} == {
        "model.embed_tokens.lora_a": (29, 2),
        "model.embed_tokens.lora_b": (2, 24),
        "model.layers.0.self_attn.q_proj.lora_a": (24, 2),
        "model.layers.0.self_attn.q_proj.lora_b": (2, 24),
        "model.layers.0.block_sparse_moe.switch_mlp.gate_proj.lora_a": (3, 2, 24),
        "model.layers.0.block_sparse_moe.switch_mlp.gate_proj.lora_b": (3, 20, 2),
        "model.layers.0.block_sparse_moe.switch_mlp.up_proj.lora_a": (3, 2, 24),
        "model.layers.0.block_sparse_moe.switch_mlp.up_proj.lora_b": (3, 20, 2),
        "model.layers.0.block_sparse_moe.switch_mlp.down_proj.lora_a": (3, 2, 20),
        "model.layers.0.block_sparse_moe.switch_mlp.down_proj.lora_b": (3, 24, 2),
    }
    keys = sorted({name.rpartition(".")[0] for name in tensors})
    parameters = {"rank": 2, "scale": 2.5, "dropout": 0.5, "keys": keys}
    assert config == {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}


def test_scales_and_ranks_that_differ_are_rewritten(tmp_path):
    targets = [
        li.Target("*.q_proj", rank=4, alpha=8),
        li.Target("*.k_proj", rank=2, alpha=16),
        li.Target("*.v_proj", rank=3, alpha=7),
        li.Target("*.o_proj", rank=6, alpha=5, rslora=True),
        li.Target("*.up_proj", rank=4, alpha=8),
    ]
    model = adapted(causal("llama"), targets, torch.bfloat16)
    folder = li.export(model, tmp_path / "adapter", format="mlx")
    config = read_folder(folder)[1]
    assert config["lora_parameters"]["rank"] == 6 and config["lora_parameters"]["scale"] == 2.0
    again = causal("llama")
    li.load(again, folder)
    exact = {path: ref.adapter for ref in li.adapters(again) if (path := ref.path)}
    for ref in li.adapters(model):
        ours, theirs = ref.adapter, exact[ref.path]
        same = ours.config.scaling in (2.0, 8.0)
        assert theirs.lora_B.dtype == (torch.bfloat16 if same else torch.float32)
        wanted = (ours.lora_B.double() @ ours.lora_A.double() * ours.config.scaling).detach()
        found = (theirs.lora_B.double() @ theirs.lora_A.double() * 2.0).detach()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.0 if same else 1e-7 * float(wanted.abs().max()))


def test_updates_of_gate_alone_and_of_unlike_halves_are_packed(tmp_path):
    torch.manual_seed(1)
    stem, tensors = "model.layers.{}.block_sparse_moe.switch_mlp.{}.lora_{}", {}
    for layer, piece in [(0, "gate_proj"), (1, "gate_proj"), (1, "up_proj")]:
        tensors[stem.format(layer, piece, "a")] = torch.randn(3, 2, 24).double()
        tensors[stem.format(layer, piece, "b")] = torch.randn(3, 20, 2).double()
    folder = write_folder(tmp_path / "adapter", tensors, settings())
    model = causal("mixtral")
    li.load(model, folder)
    assert {ref.path: ref.adapter.config.rank for ref in li.adapters(model)} == {
        "model.layers.0.mlp.experts.gate_up_proj": 2,
        "model.layers.1.mlp.experts.gate_up_proj": 4,
    }
    wanted = {}
    for layer in (0, 1):
        whole = torch.zeros(3, 40, 24, dtype=torch.float64)
        for half, piece in enumerate(("gate_proj", "up_proj")):
            if stem.format(layer, piece, "a") in tensors:
                a, b = (tensors[stem.format(layer, piece, end)].double() for end in "ab")
                whole[:, 20 * half : 20 * half + 20] = 3.0 * b @ a
        wanted[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = whole
    torch.testing.assert_close(logits(model), logits(changed(causal("mixtral"), wanted)))


def test_a_tied_embedding_acts_on_the_head_too(tmp_path):
    torch.manual_seed(1)
    tensors = {"model.embed_tokens.lora_a": torch.randn(29, 2), "model.embed_tokens.lora_b": torch.randn(2, 24)}
    folder = write_folder(tmp_path / "adapter", tensors, settings())
    model, tied = causal("llama", tie_word_embeddings=True), causal("llama", tie_word_embeddings=True)
    li.load(model, folder)
    assert [ref.path for ref in li.adapters(model)] == ["model.embed_tokens", "lm_head"]
    update = 3.0 * tensors["model.embed_tokens.lora_a"].double() @ tensors["model.embed_tokens.lora_b"].double()
    wanted = logits(changed(tied, {"model.embed_tokens.weight": update}))
    torch.testing.assert_close(logits(model), wanted)
    again = li.export(model, tmp_path / "again", format="mlx")
    assert_bits(read_folder(again)[0], tensors)


MIXED = ["*.embed_tokens", li.Target("lm_head", dtype=torch.bfloat16)]


@pytest.mark.parametrize("targets", [["*.embed_tokens"], ["lm_head"], ["*.embed_tokens", "lm_head"], MIXED], ids=str)
def test_ends_that_are_tied_and_differ_are_refused(targets, tmp_path):
    model = adapted(causal("llama", tie_word_embeddings=True), targets)
    with pytest.raises(li.UnsupportedError, match="ties them"):
        li.export(model, tmp_path / "adapter", format="mlx")
    assert not list(tmp_path.iterdir())


def test_from_file_to_file_without_a_model(tmp_path):
    model = adapted(causal("llama"), [*ATTENTION, "lm_head"], alpha=6)
    folder = li.export(model, tmp_path / "mlx", format="mlx")
    native = write_adapter(read_adapter(folder, None), tmp_path / "native.safetensors", "lora_inject", None)
    again = causal("llama")
    li.load(again, native)
    assert_bits(state(model), state(again))
    back = write_adapter(read_adapter(folder, None), tmp_path / "back", "mlx", None)
    assert_bits(read_folder(back)[0], read_folder(folder)[0])


@pytest.mark.parametrize("stem", ["model.embed_tokens", "model.layers.0.mlp.switch_mlp.up_proj"])
def test_what_a_file_alone_does_not_tell_needs_the_model(stem, tmp_path):
    axes = (3,) if "switch" in stem else ()
    pair = {f"{stem}.lora_a": torch.randn(*axes, 2, 2), f"{stem}.lora_b": torch.randn(*axes, 2, 2)}
    with pytest.raises(li.UnsupportedError, match="--model"):
        read_adapter(write_folder(tmp_path / "adapter", pair, settings()), None)


def test_an_older_folder_is_replaced_whole(tmp_path):
    model = adapted(causal("llama"), ["*.q_proj"])
    old = write_folder(tmp_path / "adapter", {"x": torch.ones(1)}, settings())
    (old / "note.txt").write_text("old")
    li.export(model, old, format="mlx")
    assert sorted(os.listdir(old)) == ["adapter_config.json", "adapters.safetensors"]
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("options", [{"bias": True}, {}], ids=str)
def test_what_mlx_cannot_hold_is_named(options, tmp_path):
    if options:
        model = adapted(causal("llama"), ["*.q_proj"], **options)
    else:
        model = adapted(causal("mixtral"), ["*.mlp.gate.weight"])
    with pytest.raises(li.UnsupportedError, match=r"layers\.0\.self_attn\.q_proj: a bias|layers\.0\.mlp\.gate\.weight"):
        li.export(model, tmp_path / "adapter", format="mlx")
    assert not list(tmp_path.iterdir())


PAIR = {"model.layers.0.self_attn.q_proj.lora_a": (24, 2), "model.layers.0.self_attn.q_proj.lora_b": (2, 24)}
BROKEN = {
    "no scale": (PAIR, settings() | {"lora_parameters": {"rank": 2, "alpha": 4}}, "scale: must be a finite number"),
    "scale a string": (PAIR, settings(scale="20"), "scale: must be"),
    "scale true": (PAIR, settings(scale=True), "scale: must be"),
    "scale huge": (PAIR, '{"lora_parameters": {"rank": 2, "scale": 1e999}}', "scale: must be"),
    "scale a big integer": (PAIR, settings(scale=10**400), "scale: must be"),
    "rank of a million": (PAIR, settings(rank=10**6), "rank: must be"),
    "rank 0": (PAIR, settings(rank=0), "rank: must be"),
    "another rank": (PAIR, settings(rank=4), "rank 2 in its tensors, 4"),
    "dropout 1": (PAIR, settings(dropout=1.0), "dropout: must be"),
    "no parameters": (PAIR, {"fine_tune_type": "lora"}, "lora_parameters: must be an object, is missing"),
    "parameters a list": (PAIR, {"fine_tune_type": "lora", "lora_parameters": [1]}, "lora_parameters: must be"),
    "config a list": (PAIR, "[1]", "must hold a JSON object"),
    "config deep": (PAIR, "[" * 100_000, "not valid JSON"),
    "key twice": (PAIR, '{"lora_parameters": 1, "lora_parameters": 2}', "stands twice"),
    "dora": (PAIR, settings() | {"fine_tune_type": "dora"}, "'dora'"),
    "full": ({"model.norm.weight": (24,)}, settings() | {"fine_tune_type": "full"}, "'full'"),
    "magnitude": (PAIR | {"model.layers.0.self_attn.q_proj.m": (24,)}, settings(), "DoRA"),
    "stray": (PAIR | {"model.norm.weight": (24,)}, settings(), "model.norm.weight: no part of a pair"),
    "half": ({"x.lora_a": (24, 2)}, settings(), "x.lora_a: its other factor is missing"),
    "vector": ({"x.lora_a": (2,), "x.lora_b": (2,)}, settings(), "no matrices"),
    "empty": ({"x.lora_a": (0, 2), "x.lora_b": (2, 3)}, settings(), "no matrices"),
    "four axes": ({"x.lora_a": (1, 1, 2, 2), "x.lora_b": (1, 1, 2, 2)}, settings(), "no matrices"),
    "elsewhere": ({"../x.lora_a": (24, 2), "../x.lora_b": (2, 24)}, settings(), r"no module for 1 of 1"),
    "other shape": ({name: (2, 2) for name in PAIR}, settings(), "tensors do not fit"),
    "experts of a dense model": ({"a.lora_a": (2, 2, 3), "a.lora_b": (2, 3, 2)}, settings(), "experts of llama"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_and_the_model_stays(case, tmp_path):
    shapes, config, message = BROKEN[case]
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    folder = write_folder(tmp_path / "adapter", tensors, config)
    model = causal("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(li.LoraInjectError, match=message):
        li.load(model, folder)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value, tmp_path):
    tensors = {name: torch.full(shape, value) for name, shape in PAIR.items()}
    with pytest.raises(li.FormatError, match="NaN or infinity"):
        li.load(causal("llama"), write_folder(tmp_path / "adapter", tensors, settings()))


def test_a_folder_without_its_config_is_refused(tmp_path):
    folder = write_folder(tmp_path / "adapter", {name: torch.ones(shape) for name, shape in PAIR.items()}, settings())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(li.FormatError, match="holds the scale"):
        li.load(causal("llama"), folder)


def test_experts_of_another_size_are_refused(tmp_path):
    stem = "model.layers.0.block_sparse_moe.switch_mlp.up_proj.lora_"
    tensors = {f"{stem}a": torch.randn(4, 2, 24), f"{stem}b": torch.randn(4, 20, 2)}
    with pytest.raises(li.MismatchError, match=r"\(3, 20, 24\)"):
        li.load(causal("mixtral"), write_folder(tmp_path / "adapter", tensors, settings()))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_mlx_itself_computes_the_same(family, tmp_path):
    """The real mlx-lm, where it is installed, loads the folder and gives our logits; we load what it writes."""
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    model = causal(family, torch.float32)
    theirs = mlx_model(mx, model, family)
    torch.testing.assert_close(mlx_logits(mx, theirs), logits(model), rtol=1e-4, atol=1e-4)
    packed = PACKED if family in NAMES else MLP
    adapted(model, [*ATTENTION, *packed, "lm_head", "*.embed_tokens"], alpha=16)
    folder = li.export(model, tmp_path / "adapter", format="mlx")
    utils.load_adapters(theirs, str(folder))
    torch.testing.assert_close(mlx_logits(mx, theirs.eval()), logits(model), rtol=1e-3, atol=1e-3)

    flat = utils.tree_flatten(theirs.parameters())
    trained = {name: array for name, array in flat if name.endswith(("lora_a", "lora_b"))}
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    again = causal(family, torch.float32)
    li.load(again, folder)
    assert_bits(state(model), state(again))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_mlx_itself_uses_a_tied_embedding_twice(family, tmp_path):
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    torch.manual_seed(1)
    tensors = {"model.embed_tokens.lora_a": torch.randn(29, 2), "model.embed_tokens.lora_b": torch.randn(2, 24)}
    folder = write_folder(tmp_path / "adapter", tensors, settings(scale=0.1, dropout=0.0, keys=["model.embed_tokens"]))
    model = causal(family, torch.float32, tie_word_embeddings=True)
    theirs, before = mlx_model(mx, model, family), logits(model)
    utils.load_adapters(theirs, str(folder))
    li.load(model, folder)
    assert (logits(model) - before).abs().max() > 0.1
    torch.testing.assert_close(mlx_logits(mx, theirs.eval()), logits(model), rtol=1e-4, atol=1e-4)


def mlx_model(mx, model, family):
    """Returns mlx-lm's model with the weights of a model of transformers."""
    from mlx_lm.utils import _get_classes

    rope = model.config.rope_parameters
    config = model.config.to_dict() | {"rope_theta": rope["rope_theta"]}
    config |= {"num_experts": getattr(model.config, "num_experts", None)}
    config |= {"rope_scaling": None if rope["rope_type"] == "default" else rope}
    model_class, args_class = _get_classes(config)
    found = model_class(args_class.from_dict(config))
    ours, theirs = NAMES.get(family, "- -").split()
    weights = {}
    for name, tensor in model.state_dict().items():
        if ours not in name:
            weights[name.replace("mlp.gate.", "block_sparse_moe.gate.") if family == "mixtral" else name] = tensor
            continue
        upright = tensor.transpose(1, 2) if family == "gpt_oss" and tensor.dim() == 3 else tensor
        parts = {name: upright}
        if "gate_up_proj" in name:
            halves = (upright[:, ::2], upright[:, 1::2]) if family == "gpt_oss" else upright.chunk(2, 1)
            parts = {
                name.replace("gate_up_proj", f"{p}_proj"): half for p, half in zip(("gate", "up"), halves, strict=True)
            }
        for part, value in parts.items():
            end = "" if part.endswith("_bias") else ".weight"
            weights[part.replace(ours, theirs).replace("_bias", ".bias") + end] = value
    arrays = {name: mx.array(tensor.detach().numpy()) for name, tensor in weights.items()}
    found.load_weights(list(found.sanitize(arrays).items()))
    found.eval()
    return found


def mlx_logits(mx, model) -> torch.Tensor:
    import numpy

    return torch.from_numpy(numpy.array(model(mx.array(TOKENS.numpy())).astype(mx.float32))).double()
