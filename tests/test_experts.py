"""Packed experts of mixture models, selected by the path of their parameter: every implementation gets W + delta."""

from __future__ import annotations

import copy

import pytest
import torch
from models import fill
from safetensors.torch import load_file, save_file
from snapshot import assert_same, raw, snapshot
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lora_inject as li

SMALL = {
    "vocab_size": 17,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 8, "intermediate_size": 8}
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "intermediate_size": 8}),
    "qwen2-moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, QWEN | {"shared_expert_intermediate_size": 8}),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN | {"head_dim": 8}),
    "gpt-oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4, "intermediate_size": 8, "head_dim": 8}),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
TARGETS = ["*.experts.gate_up_proj", "*.experts.down_proj"]
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
families = pytest.mark.parametrize("family", FAMILIES)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def tiny(family: str, implementation: str = "eager") -> nn.Module:
    model_class, config_class, own = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SMALL, **own)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.config._experts_implementation = implementation
    return model


def experts(model: nn.Module) -> nn.Module:
    (found,) = [module for path, module in model.named_modules() if path.endswith("mlp.experts")]
    return found


def by_hand(model: nn.Module, adapted: nn.Module) -> nn.Module:
    """Returns a copy of the base whose experts hold W + B A, one product per expert."""
    made = copy.deepcopy(model)
    for ref in li.adapters(adapted):
        weight = experts(made)._parameters[ref.path.rpartition(".")[2]]
        with torch.no_grad():
            for expert in range(4):
                a, b = (ref.adapter.get_parameter(f"lora_{x}")[expert].double() for x in "AB")
                weight[expert] = (weight[expert].double() + b @ a).float()
    return made


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@families
@implementations
@pytest.mark.parametrize("grad", [True, False])
def test_every_implementation_reads_the_sum(family, implementation, grad):
    base, model = tiny(family, implementation), tiny(family, implementation)
    assert experts(model).config._experts_implementation == implementation
    before = snapshot(model)
    with torch.set_grad_enabled(grad):
        plain = logits(model)
        assert len(li.inject(model, TARGETS, rank=2)) == 2
        assert torch.allclose(logits(model), plain, atol=1e-5)
        fill(model)
        wanted = logits(by_hand(base, model))
        assert torch.allclose(logits(model), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain, wanted, atol=1e-2)
        li.merge(model)
        assert torch.allclose(logits(model), wanted, rtol=1e-4, atol=1e-4)
        li.uninject(model)
        assert_same(before, model)
        assert torch.allclose(logits(model), plain, atol=1e-6)


@families
@implementations
def test_each_expert_has_a_pair_of_its_own_and_its_gradient(family, implementation):
    model = tiny(family, implementation)
    li.inject(model, TARGETS, rank=2)
    fill(model)
    hand = by_hand(tiny(family, implementation), model).requires_grad_(True)
    logits(model).square().sum().backward()
    logits(hand).square().sum().backward()
    for ref in li.adapters(model):
        name = ref.path.rpartition(".")[2]
        weight, a, b = experts(model)._parameters[name], ref.adapter.lora_A, ref.adapter.lora_B
        assert a.shape == (4, 2, weight.shape[2]) and b.shape == (4, weight.shape[1], 2)
        whole = experts(hand)._parameters[name].grad
        scale = float(whole.abs().max())
        assert torch.allclose(a.grad, torch.einsum("eor,eoi->eri", b, whole), rtol=1e-3, atol=1e-4 * scale)
        assert torch.allclose(b.grad, torch.einsum("eoi,eri->eor", whole, a), rtol=1e-3, atol=1e-4 * scale)
        assert weight.grad is None and b.grad.abs().sum((1, 2)).count_nonzero() >= 2


@families
def test_a_file_carries_the_pairs_under_the_parameter_s_path(family, tmp_path):
    model = tiny(family)
    li.inject(model, TARGETS, rank=2)
    fill(model)
    path = "model.layers.0.mlp.experts"
    names = {f"{path}.{w}.lora_{x}" for w in ("gate_up_proj", "down_proj") for x in "AB"}
    assert set(li.adapter_state(model)) == names
    fresh = tiny(family)
    li.load(fresh, li.export(model, tmp_path / "experts.safetensors"))
    assert torch.equal(logits(fresh), logits(model))


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_come_back_bit_for_bit(family, dtype):
    model = tiny(family).to(dtype)
    before = [raw(p) for p in model.parameters()]
    li.inject(model, [*TARGETS, "*.q_proj"], rank=2)
    fill(model, size=0.05)
    li.merge(model)
    assert [raw(p) for p in experts(model)._parameters.values()] != before
    li.uninject(model)
    assert [raw(p) for p in model.parameters()] == before


@families
def test_verify_finds_all_alive(family):
    model = tiny(family)
    li.inject(model, [*TARGETS, "*.self_attn.*_proj"], rank=2)
    report = li.verify(model, input_ids=TOKENS)
    assert report.ok and len(list(report)) == 6, str(report)


@families
def test_rank_decides_what_is_trained_and_its_optimizer_holds(family):
    model = tiny(family)
    plan = li.inject(model, TARGETS, rank=1)
    weights = [experts(model)._parameters[name] for name in ("gate_up_proj", "down_proj")]
    assert plan.parameters == sum(4 * (w.shape[1] + w.shape[2]) for w in weights)
    assert plan.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def packed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(torch.randn(3, 4, 5))
    return model


@pytest.mark.parametrize("order", [("pairs", "whole"), ("whole", "pairs")])
@pytest.mark.parametrize("keep", ["residual", "copy"])
def test_pairs_and_a_whole_update_of_one_packed_parameter_are_merged_in_memory_and_on_disk(order, keep, tmp_path):
    model = packed()
    base, before = model.experts.up.detach().double(), snapshot(model)
    save_file({"experts.up": model.experts.up.detach().clone()}, tmp_path / "model.safetensors")
    for name in order:
        adapter = "full" if name == "whole" else "parameter"
        li.inject(model, li.Target("experts.up", adapter=adapter), name=name, rank=2, alpha=6)
    fill(model)
    p = {key.split("@up.")[1]: value.detach().double() for key, value in li.adapter_parameters(model).items()}
    wanted = base + 3 * (p["lora_B"] @ p["lora_A"] + p["lora_dense"])
    files = [li.export(model, tmp_path / name, name=name) for name in order]
    li.merge(model, keep=keep)
    found = model.experts._parameters["up"]
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    li.merge_checkpoint(tmp_path / "model.safetensors", files, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["experts.up"], found)
    li.uninject(model)
    assert_same(before, model)


def test_a_convolutions_pair_and_stacked_pairs_of_its_kernel_are_merged_together():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(4, 6, 3)), torch.randn(2, 4, 9)
    before = snapshot(model)
    li.inject(model, "0", name="conv", rank=2)
    li.inject(model, li.Target("0.weight", adapter="parameter"), name="stack", rank=2)
    fill(model)
    p = {key: value.detach().double() for key, value in li.adapter_parameters(model).items()}
    conv = p["0.adapters.conv.lora_B"].flatten(1) @ p["0.adapters.conv.lora_A"].flatten(1)
    stack = p["0.adapters.stack@weight.lora_B"] @ p["0.adapters.stack@weight.lora_A"]
    wanted = model[0]._parameters["weight"].double() + conv.reshape(6, 4, 3) + stack
    output = model(x)
    li.merge(model)
    assert torch.allclose(model[0]._parameters["weight"].double(), wanted, atol=1e-5)
    assert torch.allclose(model(x), output, atol=1e-4)
    li.uninject(model)
    assert_same(before, model)
