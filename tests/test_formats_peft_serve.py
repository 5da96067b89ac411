"""profile="serve": one rank, no scale, no gaps; and what rounding takes is what it says."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_inject as li

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def llama(dtype=torch.float32) -> nn.Module:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(base: nn.Module, targets, **options) -> nn.Module:
    model = copy.deepcopy(base)
    li.inject(model, targets, **{"rank": 3, "alpha": 5, **options})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


MIXED = [
    "*.q_proj",
    li.Target("*.1.self_attn.q_proj", rank=5, alpha=1),
    li.Target("*.0.self_attn.v_proj", rank=2, rslora=True),
]


def updates(folder, r):
    """B A of every pair in float64, by hand from the file, with the one scale that a server takes."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    assert config["lora_alpha"] / config["r"] == 1
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    assert len(tensors) == 2 * len(names)
    assert all(tensors[f"{n}.lora_A.weight"].shape[0] == r for n in names)
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"].double()
        @ tensors[f"{name}.lora_A.weight"].double()
        for name in names
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_server_gets_the_same_updates_to_one_rounding_of_each_factor(dtype, tmp_path):
    base = llama()
    model = adapted(base, MIXED)
    folder = li.export(model, tmp_path / "out", format="peft", profile=li.Serve(dtype=dtype))
    found = updates(folder, 5)
    wanted = {ref.path: ref.adapter.delta(ref.module)["weight"].double() for ref in li.adapters(model)}
    layers = {name for name, _ in base.named_modules() if name.endswith(("q_proj", "v_proj"))}
    assert found.keys() == layers
    assert all(not found[path].any() for path in layers - wanted.keys())
    for path, update in wanted.items():
        error = (found[path] - update).norm() / update.norm()
        assert 0 < error < 2 * torch.finfo(dtype).eps, path


def test_the_config_says_nothing_that_a_server_could_overlook(tmp_path):
    folder = li.export(adapted(llama(), MIXED), tmp_path / "out", format="peft", profile="serve")
    config = json.loads((folder / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert not config["use_rslora"] and not config["use_dora"] and not config["lora_bias"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["bias"] == "none" and config["modules_to_save"] is None and config["target_parameters"] is None
    for reader in ("vllm", "sglang", "tgi", "peft"):
        report = li.check_adapter(folder, reader, model=llama())
        without_stacks = [one for one in report.findings if one.rule != "stacks"]
        assert not without_stacks, (reader, str(report))


def test_peft_reads_it_and_computes_the_same(tmp_path):
    base = llama()
    model = adapted(base, MIXED, dtype=torch.float32)
    folder = li.export(model, tmp_path / "out", format="peft", profile="serve")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    ids = torch.randint(0, 40, (2, 7))
    with torch.no_grad():
        ours, base_out, found = model(ids).logits, base(ids).logits, theirs(ids).logits
    assert (found - ours).abs().max() < 0.01 * (ours - base_out).abs().max()


def test_what_is_exact_stays_exact(tmp_path):
    """A scale that is a power of two, factors in half precision already: nothing is rounded."""
    model = adapted(llama(torch.bfloat16), ["*.q_proj"], rank=2, alpha=8, dtype=torch.bfloat16)
    folder = li.export(model, tmp_path / "out", format="peft", profile=li.Serve(rank=7))
    assert {tensor.dtype for tensor in load_file(folder / TENSORS).values()} == {torch.bfloat16}
    found = updates(folder, 7)
    for ref in li.adapters(model):
        wanted = 4 * ref.adapter.lora_B.double() @ ref.adapter.lora_A.double()
        assert torch.equal(found[ref.path], wanted.detach())


def test_the_dtype_is_the_bases_or_the_one_that_loses_less(tmp_path):
    def dtype(base, scale):
        model = adapted(base, ["*.q_proj"], dtype=torch.float32)
        for ref in li.adapters(model):
            ref.adapter.lora_A.data *= scale
        folder = li.export(model, tmp_path / "out", format="peft", profile="serve")
        return next(iter(load_file(folder / TENSORS).values())).dtype

    assert dtype(llama(torch.bfloat16), 1) == torch.bfloat16
    assert dtype(llama(torch.float16), 1) == torch.float16
    assert dtype(llama(), 1) == torch.float16
    assert dtype(llama(), 1e6) == torch.bfloat16


def test_rounding_is_reported_where_it_takes_much(tmp_path):
    model = adapted(llama(), ["*.q_proj"])
    next(iter(li.adapters(model))).adapter.lora_A.data *= 1e-7
    with pytest.warns(li.RoundingWarning, match=r"float16 takes \d+\.\d% of the update of model\.layers\.0"):
        li.export(model, tmp_path / "out", format="peft", profile=li.Serve(dtype=torch.float16))
    next(iter(li.adapters(model))).adapter.lora_A.data *= 1e14
    with pytest.raises(li.UnsupportedError, match="overflow float16"):
        li.export(model, tmp_path / "other", format="peft", profile=li.Serve(dtype=torch.float16))
    assert not (tmp_path / "other").exists()


def test_the_transposed_layers_of_gpt2_are_served_too(tmp_path):
    base = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=16)).eval()
    model = adapted(base, ["transformer.h.0.attn.c_attn"])
    folder = li.export(model, tmp_path / "out", format="peft", profile="serve")
    found = updates(folder, 3)
    assert [path for path, update in found.items() if update.any()] == ["transformer.h.0.attn.c_attn"]
    assert found["transformer.h.1.attn.c_attn"].shape == (24, 8)
    PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize(
    "targets, options, said",
    [
        (["*.q_proj"], {"bias": True}, "q_proj: a bias"),
        (["*.q_proj", "*.embed_tokens"], {}, "embed_tokens: embedding"),
        (["*.q_proj", li.Target("*.norm.weight", adapter="full")], {}, "model.norm.weight: trained as a whole"),
    ],
)
def test_what_some_server_would_not_read_is_refused_by_name(targets, options, said, tmp_path):
    with pytest.raises(li.UnsupportedError, match=said):
        li.export(adapted(llama(), targets, **options), tmp_path / "out", format="peft", profile="serve")
    assert not list(tmp_path.iterdir())


def test_segments_that_mean_other_layers_too_are_refused(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    li.inject(model, ["0.0"], rank=1)
    with pytest.raises(li.UnsupportedError, match="no linear layers:\n  0\n"):
        li.export(model, tmp_path / "out", format="peft", profile="serve")


def test_the_profile_needs_its_format_its_name_and_the_model(tmp_path):
    model = adapted(llama(), ["*.q_proj"])
    for arguments in ({"profile": "serve"}, {"format": "peft", "profile": "server"}):
        with pytest.raises(li.ConfigError, match="profile='serve' for format='peft' alone"):
            li.export(model, tmp_path / "out", **arguments)
    with pytest.raises(li.ConfigError, match="float16 and bfloat16"):
        li.Serve(dtype=torch.float32)
    with pytest.raises(li.ConfigError, match="rank=2: the adapter has pairs of rank 3"):
        li.export(model, tmp_path / "out", format="peft", profile=li.Serve(rank=2))
    li.export(model, tmp_path / "a.safetensors")
    with pytest.raises(li.UnsupportedError, match="only the model tells"):
        li.convert(tmp_path / "a.safetensors", tmp_path / "out", "peft", profile="serve")


def test_from_file_to_file(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    li.export(adapted(base, MIXED), tmp_path / "a.safetensors")
    done = li.convert(tmp_path / "a.safetensors", tmp_path / "out", "peft", model=tmp_path / "base", profile="serve")
    assert len(updates(tmp_path / "out", 5)) == 6
    assert any("rounded to float16: takes at most" in note for note in done.notes)
