"""torchtune's files: rows of q and k where it keeps them, names and scale, against its own converter where it is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from causal_models import ATTENTION, MLP, adapted, assert_bits, causal, changed, logits, state, turned
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_inject as li
from lora_inject.formats import read_adapter, write_adapter

NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
HEADS = {"q_proj": 6, "k_proj": 2}
LINEARS = [*ATTENTION, *MLP, "lm_head"]
ROTARY, PLAIN = ["llama", "mistral", "gemma", "gemma2"], ["qwen2"]


def read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["lora_config"])


def by_torchtune(path: Path, rotary: bool) -> dict[str, torch.Tensor]:
    """Returns what the adapter adds to transformers' parameters, from the file alone."""
    tensors, options = read_file(path)
    found = {}
    for ours, theirs in NAMES.items():
        for layer in range(2):
            stem = f"layers.{layer}.{theirs}"
            if f"{stem}.lora_a.weight" in tensors:
                a, b = (tensors[f"{stem}.lora_{end}.weight"].double() for end in "ab")
                delta = options["lora_alpha"] / options["r"] * b @ a
                heads = HEADS.get(ours.rpartition(".")[2]) if rotary else None
                found[f"model.layers.{layer}.{ours}.weight"] = delta if heads is None else turned(delta, heads)
    if "output.lora_a.weight" in tensors:
        b, a = tensors["output.lora_b.weight"].double(), tensors["output.lora_a.weight"].double()
        found["lm_head.weight"] = options["lora_alpha"] / options["r"] * b @ a
    return found


@pytest.mark.parametrize("family", [*ROTARY, *PLAIN])
def test_torchtune_adds_what_the_adapter_adds(family, tmp_path):
    targets = LINEARS if "gemma" not in family else [*ATTENTION, *MLP]
    model = adapted(causal(family), targets)
    path = li.export(model, tmp_path / "adapter.safetensors", format="torchtune")
    added = by_torchtune(path, family in ROTARY)
    assert len(added) == len(list(li.adapters(model)))
    torch.testing.assert_close(logits(changed(causal(family), added)), logits(model))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_meta_order_is_another_order(family, tmp_path):
    """A plain renaming would be wrong in silence: the file's rows are not the model's."""
    model = adapted(causal(family), ["*.q_proj", "*.k_proj"])
    path = li.export(model, tmp_path / "adapter.safetensors", format="torchtune")
    wrong = logits(changed(causal(family), by_torchtune(path, rotary=False)))
    assert (wrong - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [*ROTARY, *PLAIN, "phi3"])
def test_a_round_trip_keeps_every_bit(family, dtype, tmp_path):
    targets = ["*.qkv_proj", "*.o_proj", "*.gate_up_proj", "*.down_proj"] if family == "phi3" else [*ATTENTION, *MLP]
    model = adapted(causal(family), [*targets, *([] if "gemma" in family else ["lm_head"])], dtype, alpha=6)
    path = li.export(model, tmp_path / "adapter.safetensors", format="torchtune")
    again = causal(family)
    li.load(again, path)
    assert_bits(state(model), state(again))
    assert all(ref.adapter.config.scaling == 1.5 for ref in li.adapters(again))
    back = li.export(again, tmp_path / "back.safetensors", format="torchtune")
    assert read_file(back)[1] == read_file(path)[1]
    assert_bits(read_file(back)[0], read_file(path)[0])


def test_the_names_and_shapes_are_torchtunes(tmp_path):
    model = adapted(causal("llama"), LINEARS, rank=2, alpha=5)
    tensors, options = read_file(li.export(model, tmp_path / "a.safetensors", format="torchtune"))
    assert options == {"r": 2, "lora_alpha": 5.0}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "layers.1." not in name}
    sizes = {"attn.k_proj": (24, 8), "attn.v_proj": (24, 8), "mlp.w1": (24, 20), "mlp.w2": (20, 24), "mlp.w3": (24, 20)}
    wanted = {"output.lora_a.weight": (2, 24), "output.lora_b.weight": (29, 2)}
    for part in NAMES.values():
        inner, outer = sizes.get(part, (24, 24))
        wanted |= {f"layers.0.{part}.lora_a.weight": (2, inner), f"layers.0.{part}.lora_b.weight": (outer, 2)}
    assert shapes == wanted


def test_the_fused_rows_of_phi3_are_split_and_joined(tmp_path):
    torch.manual_seed(1)
    tensors, rows = {}, {"attn.q_proj": (0, 24), "attn.k_proj": (24, 8), "attn.v_proj": (32, 8)}
    rows |= {"mlp.w1": (0, 20), "mlp.w3": (20, 20)}
    for part in ("attn.q_proj", "attn.v_proj", "mlp.w1", "mlp.w3"):
        tensors[f"layers.1.{part}.lora_a.weight"] = torch.randn(2, 24).double()
        tensors[f"layers.1.{part}.lora_b.weight"] = torch.randn(rows[part][1], 2).double()
    model = causal("phi3")
    li.load(model, write_file(tmp_path, tensors))
    ranks = {ref.path: ref.adapter.config.rank for ref in li.adapters(model)}
    assert ranks == {"model.layers.1.self_attn.qkv_proj": 4, "model.layers.1.mlp.gate_up_proj": 4}
    wanted = {
        name: torch.zeros(size, 24).double() for name, size in (("self_attn.qkv_proj", 40), ("mlp.gate_up_proj", 40))
    }
    for part, (start, size) in rows.items():
        if f"layers.1.{part}.lora_a.weight" in tensors:
            a, b = (tensors[f"layers.1.{part}.lora_{end}.weight"] for end in "ab")
            name = "self_attn.qkv_proj" if "attn" in part else "mlp.gate_up_proj"
            wanted[name][start : start + size] = 2.0 * b @ a
    updates = {f"model.layers.1.{name}.weight": update for name, update in wanted.items()}
    torch.testing.assert_close(logits(model), logits(changed(causal("phi3"), updates)))


def write_file(folder: Path, tensors: dict[str, torch.Tensor], config: object = None, pickled: bool = False) -> Path:
    config = {"r": 2, "lora_alpha": 4} if config is None else config
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    path = folder / ("adapter_0.pt" if pickled else "adapter_model.safetensors")
    torch.save(tensors, path) if pickled else save_file(tensors, path)
    return path


def test_a_pickle_of_torchtune_is_converted_when_that_is_allowed(tmp_path):
    model = adapted(causal("llama"), ATTENTION, rank=2, alpha=4)
    tensors, _ = read_file(li.export(model, tmp_path / "a.safetensors", format="torchtune"))
    path = write_file(tmp_path, tensors, pickled=True)
    with pytest.raises(li.FormatError, match="can run code"):
        li.load(causal("llama"), path)
    bundle = read_adapter(path, causal("llama"), allow_pickle=True)
    again = causal("llama")
    li.load(again, write_adapter(bundle, tmp_path / "native.safetensors", "lora_inject", again))
    assert_bits(state(model), state(again))


def test_scales_and_ranks_that_differ_are_rewritten(tmp_path):
    targets = [li.Target("*.q_proj", rank=4, alpha=8), li.Target("*.k_proj", rank=2, alpha=16, rslora=False)]
    model = adapted(causal("llama"), [*targets, li.Target("*.v_proj", rank=6, alpha=3)], torch.bfloat16)
    path = li.export(model, tmp_path / "a.safetensors", format="torchtune")
    assert read_file(path)[1] == {"r": 6, "lora_alpha": 12.0}
    again = causal("llama")
    li.load(again, path)
    found = {ref.path: ref.adapter for ref in li.adapters(again)}
    for ref in li.adapters(model):
        one, other = ref.adapter, found[ref.path]
        wanted = one.lora_B.double() @ one.lora_A.double() * one.config.scaling
        assert torch.equal(other.lora_B.double() @ other.lora_A.double() * 2.0, wanted)
        assert other.lora_A.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "targets", "options", "why"),
    [
        ("llama", ["*.embed_tokens"], {}, "model.embed_tokens: torchtune has no LoRA there"),
        ("llama", ["*.q_proj"], {"bias": True}, "self_attn.q_proj: a bias"),
        ("mixtral", ["*.q_proj"], {}, "family 'mixtral'"),
    ],
)
def test_what_torchtune_cannot_hold_is_named(family, targets, options, why, tmp_path):
    model = adapted(causal(family), targets, **options)
    with pytest.raises(li.UnsupportedError, match=why):
        li.export(model, tmp_path / "a.safetensors", format="torchtune")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("gemma", False), ("gemma2", True)])
def test_a_tied_head_is_named(family, tied, tmp_path):
    model = adapted(causal(family, tie_word_embeddings=tied), ["lm_head"])
    with pytest.raises(li.UnsupportedError, match="lm_head: torchtune has no LoRA there"):
        li.export(model, tmp_path / "a.safetensors", format="torchtune")


Q = {"layers.0.attn.q_proj.lora_a.weight": (2, 24), "layers.0.attn.q_proj.lora_b.weight": (24, 2)}
K = {"layers.0.attn.k_proj.lora_a.weight": (2, 24), "layers.0.attn.k_proj.lora_b.weight": (9, 2)}
BROKEN = {
    "no config": (Q, "[]", "must hold a JSON object"),
    "config without r": (Q, {"lora_alpha": 4}, "r: must be a whole number"),
    "r of another kind": (Q, {"r": "2", "lora_alpha": 4}, "r: must be a whole number"),
    "r of a million": (Q, {"r": 10**6, "lora_alpha": 4}, "r: must be a whole number"),
    "another r": (Q, {"r": 4, "lora_alpha": 4}, "rank 2 in its tensors, r = 4"),
    "alpha missing": (Q, {"r": 2}, "lora_alpha: must be a finite number"),
    "rslora": (Q, {"r": 2, "lora_alpha": 4, "use_rslora": True}, "use_rslora"),
    "magnitude": (Q | {"layers.0.attn.q_proj.magnitude": (24,)}, None, "DoRA"),
    "stray": (Q | {"norm.scale": (24,)}, None, "norm.scale: no part of a pair"),
    "half": ({"layers.0.attn.q_proj.lora_a.weight": (2, 24)}, None, "its other factor is missing"),
    "no heads": (K, None, "9 rows, which are not 2 rotary heads"),
    "wrong columns": (dict(zip(Q, [(2, 23), (24, 2)], strict=True)), None, r"shape \(24, 23\)"),
    "wrong rows": (dict(zip(Q, [(2, 24), (36, 2)], strict=True)), None, r"shape \(36, 24\)"),
    "unknown module": ({name.replace("q_proj", "x"): shape for name, shape in Q.items()}, None, "layers.0.attn.x"),
    "layer 9": ({name.replace("s.0", "s.9"): shape for name, shape in Q.items()}, None, "layers.9.attn.q_proj"),
    "embedding": ({f"tok_embeddings.lora_{x}.weight": (2, 2) for x in "ab"}, None, "tok_embeddings"),
    "path": ({f"../x.lora_{x}.weight": (2, 2) for x in "ab"}, None, r"\.\./x"),
    "cube": ({name: (2, 2, 2) for name in Q}, None, "no matrices"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_and_the_model_stays(case, tmp_path):
    shapes, config, message = BROKEN[case]
    path = write_file(tmp_path, {name: torch.ones(shape) for name, shape in shapes.items()}, config)
    model = causal("llama")
    with pytest.raises(li.LoraInjectError, match=message):
        li.load(model, path)
    assert not list(li.adapters(model))


def test_a_file_without_a_scale_or_a_model_is_refused(tmp_path):
    save_file({name: torch.ones(shape) for name, shape in Q.items()}, tmp_path / "a.safetensors")
    with pytest.raises(li.FormatError, match="how strong the adapter is"):
        li.load(causal("llama"), tmp_path / "a.safetensors")
    path = write_file(tmp_path, {name: torch.ones(shape) for name, shape in Q.items()})
    with pytest.raises(li.UnsupportedError, match="--model"):
        read_adapter(path, None)


@pytest.fixture(scope="module")
def converter():
    """torchtune's module of conversions, by its file: the package itself asks for much that it does not need here."""
    package = importlib.util.find_spec("torchtune")
    if package is None:
        pytest.skip("torchtune is not installed")
    file = Path(package.origin).parent / "models" / "convert_weights.py"
    spec = importlib.util.spec_from_file_location("torchtune_convert_weights", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_torchtunes_own_converter_gives_our_factors(family, converter, tmp_path):
    model = adapted(causal(family), [*ATTENTION, *MLP])
    tensors, _ = read_file(li.export(model, tmp_path / "a.safetensors", format="torchtune"))
    config = model.config
    theirs = converter.tune_to_peft_adapter_weights(
        tensors, config.num_attention_heads, config.num_key_value_heads, config.hidden_size, config.head_dim
    )
    ours = {
        f"base_model.model.{key.replace('.lora_A', '.lora_A.weight').replace('.lora_B', '.lora_B.weight')}": tensor
        for key, tensor in state(model).items()
    }
    assert_bits(ours, theirs)


def test_torchtunes_own_weights_have_the_order_of_our_rows(converter, tmp_path):
    """Its conversion of a whole model, for the base and for the base with the update added, differs by our update."""
    for family in ("llama", "mistral"):
        model = adapted(causal(family), ["*.q_proj", "*.k_proj"])
        tensors, options = read_file(li.export(model, tmp_path / f"{family}.safetensors", format="torchtune"))
        config = model.config
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.hidden_size, config.head_dim)
        base = converter.hf_to_tune(causal(family).state_dict(), *sizes)
        li.merge(model)
        after = {name: tensor for name, tensor in model.state_dict().items() if ".adapters." not in name}
        merged = converter.hf_to_tune(after, *sizes)
        for part in ("attn.q_proj", "attn.k_proj"):
            stem = f"layers.0.{part}"
            b, a = tensors[f"{stem}.lora_b.weight"].double(), tensors[f"{stem}.lora_a.weight"].double()
            update = options["lora_alpha"] / options["r"] * b @ a
            torch.testing.assert_close(merged[f"{stem}.weight"] - base[f"{stem}.weight"], update)
