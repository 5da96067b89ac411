"""Fused and split projections: the same function as a float64 model with the update added by hand to its weights."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CodeGenConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    MptConfig,
    Phi3Config,
)

import lora_inject as li
from lora_inject.formats.factors import Factors
from lora_inject.formats.fused_names import refitted
from lora_inject.formats.fusions import FUSIONS, stand_ins
from lora_inject.formats.native import LoraInject
from lora_inject.formats.orient import outward
from lora_inject.formats.resolve import Parsed, resolve
from lora_inject.tree import walk

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
TINY = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = TINY | {
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA |= {"rms_norm_eps": 1e-5}


def causal(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def phi3():
    return causal(Phi3Config(**LLAMA))


def llama():
    return causal(LlamaConfig(**LLAMA))


def glm():
    return causal(GlmConfig(**LLAMA, head_dim=4))


def gpt2():
    return causal(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=4, n_positions=16))


def mpt():
    return causal(MptConfig(vocab_size=30, d_model=16, n_layers=2, n_heads=4, max_seq_len=16))


def modernbert():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ModernBertConfig(**TINY, intermediate_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        return AutoModel.from_config(config).eval()


def pair(path, rows, columns, seed, *, rank=2, alpha=4.0, dtype=torch.float32, **more):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    return Factors(path=path, a=a.to(dtype), b=b.to(dtype), alpha=alpha, **more)


def product(one):
    scaling = one.alpha / (one.a.shape[0] ** 0.5 if one.rslora else one.a.shape[0])
    return scaling * one.b.double() @ one.a.double()


def load(tmp_path, model, factors):
    """Loads factors of a file in another program's spelling, through the native format."""
    bundle = resolve(Parsed(path=Path("a file"), factors=factors), model)
    li.load(model, LoraInject().write(bundle, tmp_path / "a.safetensors", model))
    return bundle


def output(model):
    with torch.no_grad():
        return model(IDS)[0]


# Model, path of the owner, rows of the parts, columns, name of the fused projection.
FUSED = {
    "phi3-qkv": (phi3, "model.layers.1.self_attn", {"q_proj": 16, "k_proj": 8, "v_proj": 8}, 16, "qkv_proj"),
    "phi3-mlp": (phi3, "model.layers.1.mlp", {"gate_proj": 24, "up_proj": 24}, 16, "gate_up_proj"),
    "glm-mlp": (glm, "model.layers.0.mlp", {"gate_proj": 24, "up_proj": 24}, 16, "gate_up_proj"),
    "gpt2": (gpt2, "transformer.h.1.attn", {"q_proj": 16, "k_proj": 16, "v_proj": 16}, 16, "c_attn"),
    "mpt": (mpt, "transformer.blocks.1.attn", {"q_proj": 16, "k_proj": 16, "v_proj": 16}, 16, "Wqkv"),
    "modernbert": (modernbert, "layers.1.attn", {"q_proj": 16, "k_proj": 16, "v_proj": 16}, 16, "Wqkv"),
}


def split_forward(owner, name, parts, updates):
    """Hooks the fused projection so that each part's output gets its own update: the function of the split adapter."""
    module = owner._modules[name]

    def add(_, inputs, out):
        pieces = [inputs[0] @ updates[part].T if part in updates else inputs[0].new_zeros(1) for part in parts]
        sizes = [out[..., :rows] * 0 + piece for rows, piece in zip(parts.values(), pieces, strict=True)]
        return out + torch.cat(sizes, dim=-1)

    module.register_forward_hook(add)


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("scales", ["equal", "different"])
def test_split_factors_go_into_a_fused_projection(tmp_path, case, count, scales):
    make, owner, parts, columns, whole = FUSED[case]
    model = make()
    chosen = list(parts)[-count:]
    factors = []
    for number, name in enumerate(chosen):
        rank = 2 + number
        alpha = 2.0 * rank if scales == "equal" else 1.3 + number
        factors.append(pair(f"{owner}.{name}", parts[name], columns, number, rank=rank, alpha=alpha))
    exact = copy.deepcopy(model).double()
    updates = {one.path.rpartition(".")[2]: product(one) for one in factors}
    split_forward(exact.get_submodule(owner), whole, parts, updates)
    base = output(model)
    bundle = load(tmp_path, model, factors)
    assert list(bundle.sites) == [f"{owner}.{whole}"] and "fused from" in str(bundle.notes)
    assert (output(model) - base).abs().max() > 1e-3
    assert torch.allclose(output(model).double(), output(exact), atol=2e-4, rtol=1e-4)
    (ref,) = li.adapters(model)
    assert ref.adapter.config.rank == sum(one.a.shape[0] for one in factors)
    if scales == "equal":
        assert ref.adapter.scaling == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_that_differs_by_a_power_of_two_changes_no_digit(dtype):
    model = phi3()
    owner = "model.layers.0.self_attn"
    q = pair(f"{owner}.q_proj", 16, 16, 0, alpha=4.0, dtype=dtype)
    v = pair(f"{owner}.v_proj", 8, 16, 1, alpha=1.0, dtype=dtype)
    bundle = resolve(Parsed(path=Path("a file"), factors=[v, q]), model)
    tensors = bundle.entries[f"{owner}.qkv_proj"]
    config = bundle.sites[f"{owner}.qkv_proj"].config
    found = config.scaling * tensors["lora_B"].double() @ tensors["lora_A"].double()
    assert tensors["lora_B"].dtype == dtype
    assert torch.equal(found, torch.cat([product(q), torch.zeros(8, 16), product(v)]))


@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_pair_is_split_for_a_model_with_parts_and_comes_back(tmp_path, bias):
    """Llama has in parts what Phi-3 has in one piece; with equal weights they are one function."""
    fused, split = phi3(), llama()
    weights = fused.state_dict()
    for layer in range(2):
        start = f"model.layers.{layer}"
        cut = torch.split(weights.pop(f"{start}.self_attn.qkv_proj.weight"), [16, 8, 8])
        weights |= {f"{start}.self_attn.{name}_proj.weight": w for name, w in zip("qkv", cut, strict=True)}
        cut = torch.split(weights.pop(f"{start}.mlp.gate_up_proj.weight"), 24)
        weights |= {f"{start}.mlp.{name}_proj.weight": w for name, w in zip(("gate", "up"), cut, strict=True)}
    split.load_state_dict(weights)
    assert torch.allclose(output(split), output(fused), atol=1e-5)
    factors = [
        pair(f"model.layers.{layer}.{name}", rows, 16, layer, bias=torch.randn(rows) if bias else None)
        for layer in range(2)
        for name, rows in (("self_attn.qkv_proj", 32), ("mlp.gate_up_proj", 48))
    ]
    load(tmp_path, fused, factors)
    bundle = load(tmp_path, split, factors)
    assert len(bundle.sites) == 10 and "split into" in str(bundle.notes)
    assert torch.allclose(output(split), output(fused), atol=1e-5)
    parts = [outward(bundle, record) for record in bundle.sites.values()]
    back = resolve(Parsed(path=Path("a file"), factors=parts), phi3())
    for one in factors:
        tensors = back.entries[one.path]
        assert torch.equal(tensors["lora_A"], one.a) and torch.equal(tensors["lora_B"], one.b)
        assert back.sites[one.path].config.scaling == one.scaling
        assert not bias or torch.equal(tensors["lora_B_bias"], one.bias)


def test_the_packed_projection_of_attention_takes_parts(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    exact = copy.deepcopy(model).double()
    q, v = pair("attn.q_proj", 8, 8, 0, alpha=3.0), pair("attn.v_proj", 8, 8, 1, alpha=3.0)
    load(tmp_path, model, [q, v])
    with torch.no_grad():
        exact["attn"].in_proj_weight += torch.cat([product(q), torch.zeros(8, 8), product(v)])
    x = torch.randn(2, 5, 8)
    want = exact["attn"](x.double(), x.double(), x.double())[0]
    assert torch.allclose(model["attn"](x, x, x)[0].double(), want, atol=1e-5)


def test_the_table_names_classes_that_lay_their_rows_out_so():
    """Every owner in the table is a class of transformers, whose code cuts the output of the projection in order."""
    files = [file.read_text() for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")]
    cuts = {
        "qkv_proj": r"query_states = qkv\[\.\.\., :query_pos\]",
        "gate_up_proj": r"gate, up_states = up_states\.chunk\(2, dim=-1\)",
        "c_attn": r"c_attn\(\w+\)\.split\(self\.split_size, dim=2\)",
        "Wqkv": r"query_states, key_states, value_states = (mixed_qkv\.chunk\(3, dim=2\)|qkv\.unbind\(dim=-3\))",
    }
    for fusion in FUSIONS[:-1]:
        for owner in fusion.owners:
            (text,) = [text for text in files if re.search(rf"^class {owner}\(", text, re.MULTILINE)]
            code = re.split(r"^class ", text.partition(f"class {owner}(")[2], maxsplit=1, flags=re.MULTILINE)[0]
            assert re.search(cuts[fusion.whole], code), owner


@pytest.mark.parametrize(
    ("make", "path", "rows"),
    [
        (lambda: causal(GPTNeoXConfig(**TINY, intermediate_size=24)), "gpt_neox.layers.0.attention.q_proj", 16),
        (lambda: causal(CodeGenConfig(vocab_size=30, n_embd=16, n_layer=1, n_head=4, rotary_dim=4)),
         "transformer.h.0.attn.v_proj", 16),
        (llama, "model.layers.0.self_attn.query_key_value", 32),
    ],
)  # fmt: skip
def test_rows_in_an_unknown_order_are_refused(make, path, rows):
    with pytest.raises(li.MismatchError, match=f"{path}: the model has"):
        resolve(Parsed(path=Path("a file"), factors=[pair(path, rows, 16, 0)]), make())


@pytest.mark.parametrize(
    ("make", "path", "rows"),
    [
        (phi3, "model.layers.0.self_attn.q_proj", 15),
        (phi3, "model.layers.0.self_attn.k_proj", 16),
        (gpt2, "transformer.h.0.attn.q_proj", 8),
        (phi3, "model.layers.0.mlp.up_proj", 23),
        (llama, "model.layers.0.self_attn.qkv_proj", 48),
    ],
)
def test_rows_that_do_not_add_up_are_refused(make, path, rows):
    with pytest.raises(li.MismatchError, match="rows"):
        resolve(Parsed(path=Path("a file"), factors=[pair(path, rows, 16, 0)]), make())


def test_a_prefix_and_a_fusion_at_once(tmp_path):
    factors = [pair(f"base_model.model.model.layers.0.self_attn.{n}_proj", r, 16, 0) for n, r in (("q", 16), ("v", 8))]
    bundle = load(tmp_path, phi3(), factors)
    assert list(bundle.sites) == ["model.layers.0.self_attn.qkv_proj"]
    assert "base_model.model." in str(bundle.notes)


def test_the_whole_and_a_part_of_it_in_one_file_are_one_site_twice():
    owner = "model.layers.0.self_attn"
    factors = [pair(f"{owner}.qkv_proj", 32, 16, 0), pair(f"{owner}.q_proj", 16, 16, 1)]
    with pytest.raises(li.FormatError, match="stands twice"):
        resolve(Parsed(path=Path("a file"), factors=factors), phi3())


def test_parts_that_cannot_be_joined_are_refused():
    owner, model = "model.layers.0.self_attn", phi3()
    q, k = pair(f"{owner}.q_proj", 16, 16, 0), pair(f"{owner}.k_proj", 8, 12, 0)
    tall = Factors(path=q.path, a=q.a[:, :, None, None], b=q.b[:, :, None, None], alpha=1.0)
    for factors, why in (([q, k], "one and the same input"), ([tall], "must be matrices"), ([q, q], "stands twice")):
        with pytest.raises(li.FormatError, match=why):
            resolve(Parsed(path=Path("a file"), factors=factors), model)


def test_own_paths_of_the_model_are_left_alone():
    model = llama()
    known = stand_ins({path: node for node in walk(model) for path in node.paths})
    one = pair("model.layers.0.self_attn.q_proj", 16, 16, 0)
    assert one.path not in known
    assert refitted([one], known) == ([one], [])
