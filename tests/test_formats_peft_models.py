"""PEFT's files on whole models of transformers: the small real one, GPT-2, mixtures of experts, heads, embeddings."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import lora_inject as li
from demo_model import packaged_model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def fill(parameters) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)


def injected(base: nn.Module, targets, **options) -> nn.Module:
    model = copy.deepcopy(base)
    li.inject(model, targets, **{"rank": 2, "alpha": 3, **options})
    fill(li.adapter_parameters(model).values())
    for ref in li.adapters(model):
        padding = getattr(ref.module, "padding_idx", None)
        if padding is not None and ref.adapter.kind == "embedding":
            ref.adapter.lora_B.data[padding] = 0
    return model.eval()


def peft_model(base: nn.Module, **config) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT has to say about our choice of options
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, **config))
    fill(p for p in model.parameters() if p.requires_grad)
    for module in model.modules():
        if getattr(getattr(module, "base_layer", None), "padding_idx", None) is not None:
            module.lora_embedding_A["default"].data[:, module.base_layer.padding_idx] = 0
    return model.eval()


def saved(model: PeftModel, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def loaded_by_peft(base: nn.Module, folder) -> PeftModel:
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    result = set_peft_model_state_dict(model, load_file(folder / TENSORS))
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    assert result.unexpected_keys == []
    return model.eval()


def output(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        experts = any("experts" in name for name, _ in model.named_modules())  # they have no kernel for float64
        found = (model if experts else copy.deepcopy(model).double()).eval()(ids)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def both_ways(base: nn.Module, ids: torch.Tensor, targets, config, tmp_path, atol: float = 1e-5) -> None:
    """Ours read by PEFT, PEFT's read by us, and PEFT's tensors bit for bit after the round trip."""
    ours = injected(base, targets)
    folder = li.export(ours, tmp_path / "ours", format="peft")
    plain, wanted = output(base, ids), output(ours, ids)
    assert (wanted - plain).abs().max() > 100 * atol
    assert torch.allclose(output(loaded_by_peft(base, folder), ids), wanted, rtol=0, atol=atol)
    theirs = peft_model(base, **config)
    model = copy.deepcopy(base)
    li.load(model, saved(theirs, tmp_path / "theirs"))
    assert torch.allclose(output(model, ids), output(theirs, ids), rtol=0, atol=atol)
    again = load_file(li.export(model, tmp_path / "again", format="peft") / TENSORS)
    first = load_file(tmp_path / "theirs" / TENSORS)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


IDS = torch.arange(12).reshape(2, 6) % 20


def test_the_small_real_model(tmp_path):
    base = transformers.AutoModel.from_pretrained(packaged_model()).eval()
    targets = ["*.query", "*.value", li.Target("*.3.attention.self.query", rank=5, alpha=9), "*.word_embeddings"]
    both_ways(
        base,
        IDS + 1000,
        targets,
        {
            "target_modules": ["query", "value", "word_embeddings"],
            "rank_pattern": {"3.attention.self.query": 5},
            "alpha_pattern": {r"layer\.[12]\..*query": 7},
            "use_rslora": True,
        },
        tmp_path,
    )


def test_gpt2_with_its_transposed_layers(tmp_path):
    config = transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    base = transformers.GPT2LMHeadModel(config).eval()
    both_ways(
        base, IDS, ["*.c_attn", "*.c_fc"], {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, tmp_path
    )


def mixtral(**options) -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        **options,
    )
    return transformers.MixtralForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["full_attention", "full_attention"],
    )
    return transformers.GptOssForCausalLM(config).eval()


@pytest.mark.parametrize("build", [mixtral, gpt_oss])
def test_packed_experts_of_transformers(build, tmp_path):
    """(E, out, in) and (E, in, out); square, so that shapes tell nothing."""
    base = build()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    both_ways(
        base,
        IDS,
        ["*.q_proj", "*.experts.gate_up_proj", "*.experts.down_proj"],
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        tmp_path,
        atol=1e-5,
    )


def test_some_experts_alone(tmp_path):
    base = mixtral()
    both_ways(
        base, IDS, ["*.experts.down_proj"], {"target_modules": [], "target_parameters": ["experts.down_proj"]}, tmp_path
    )


def glm() -> nn.Module:
    """Packed experts beside shared and dense layers of the names that experts once had."""
    config = transformers.Glm4MoeConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )
    return transformers.Glm4MoeForCausalLM(config).eval()


def test_layers_that_peft_would_take_for_experts(tmp_path):
    base = glm()
    targets = [
        "*.q_proj",
        "*.down_proj",
        "*.shared_experts.up_proj",
        li.Target("*.0.self_attn.q_proj", rank=3, alpha=1),
    ]
    model = injected(base, targets)
    folder = li.export(model, tmp_path / "out", format="peft")
    assert (output(model, IDS) - output(base, IDS)).abs().max() > 1e-3
    assert torch.allclose(output(loaded_by_peft(base, folder), IDS), output(model, IDS), rtol=0, atol=1e-6)
    again = copy.deepcopy(base)
    li.load(again, folder)
    assert torch.equal(output(again, IDS), output(model, IDS))
    assert [(r.path, r.adapter.kind) for r in li.adapters(again)] == [
        (r.path, r.adapter.kind) for r in li.adapters(model)
    ]
    linear = injected(base, ["*.q_proj", "*.shared_experts.down_proj"])
    served = li.export(linear, tmp_path / "served", format="peft", profile="serve")
    assert json.loads((served / CONFIG).read_text())["target_modules"] == ["down_proj", "q_proj"]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning")
def test_parameters_of_several_ranks(tmp_path):
    """PEFT says that it ignores the patterns, and does not."""
    base = glm()
    targets = ["*.experts.gate_up_proj", li.Target("*.experts.down_proj", rank=5, alpha=7, rslora=True)]
    model = injected(base, [*targets, li.Target("*.0.mlp.up_proj", rank=3, alpha=1)])
    folder = li.export(model, tmp_path / "out", format="peft")
    assert torch.allclose(output(loaded_by_peft(base, folder), IDS), output(model, IDS), rtol=0, atol=1e-6)
    again = copy.deepcopy(base)
    li.load(again, folder)
    assert torch.allclose(output(again, IDS), output(model, IDS), rtol=0, atol=1e-7)


def bert_classifier() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def test_the_head_that_the_task_adds(tmp_path):
    base = bert_classifier()
    both_ways(
        base,
        IDS,
        ["*.query", li.Target("classifier.*", adapter="full")],
        {"target_modules": ["query"], "task_type": TaskType.SEQ_CLS},
        tmp_path,
    )


def test_embeddings_saved_along_with_their_update(tmp_path):
    base = bert_classifier()
    theirs = peft_model(base, target_modules=["query", "word_embeddings"])
    with torch.no_grad():
        theirs.get_submodule("base_model.model.bert.embeddings.word_embeddings").base_layer.weight += 0.5
    folder = saved(theirs, tmp_path / "theirs", save_embedding_layers=True)
    assert any("word_embeddings.base_layer.weight" in name for name in load_file(folder / TENSORS))
    model = copy.deepcopy(base)
    plan = li.load(model, folder)
    assert "bert.embeddings.word_embeddings.weight" in [site.path for site in plan.sites]
    assert torch.allclose(output(model, IDS), output(theirs, IDS), rtol=0, atol=1e-5)
    again = li.export(model, tmp_path / "again", format="peft")
    first, second = load_file(folder / TENSORS), load_file(again / TENSORS)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.allclose(output(loaded_by_peft(base, again), IDS), output(theirs, IDS), rtol=0, atol=1e-5)


def test_wrappers_and_levels_before_the_paths_are_said(tmp_path):
    base = bert_classifier()
    theirs = peft_model(base.bert, target_modules=["query"])
    folder = saved(theirs, tmp_path / "theirs")
    tensors = load_file(folder / TENSORS)
    for before in ("", "module.", "_orig_mod."):
        changed = {name.replace("base_model.model.", f"base_model.model.{before}"): t for name, t in tensors.items()}
        save_file(changed, folder / TENSORS)
        if before:
            plan = li.load(copy.deepcopy(base.bert), folder)
            assert any(before in note for note in plan.notes)
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    save_file(plain, folder / TENSORS)
    assert li.load(copy.deepcopy(base.bert), folder).notes == ()


def test_from_file_to_file_with_and_without_the_model(tmp_path):
    base = mixtral()
    base.save_pretrained(tmp_path / "base")
    model = injected(base, ["*.q_proj", "*.experts.gate_up_proj", "*.experts.down_proj", "model.embed_tokens"])
    file = li.export(model, tmp_path / "a.safetensors")
    li.convert(file, tmp_path / "peft", "peft", model=tmp_path / "base")
    li.convert(tmp_path / "peft", tmp_path / "b.safetensors", "lora_inject", model=tmp_path / "base")
    first, second = load_file(file), load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    again = copy.deepcopy(base)
    li.load(again, tmp_path / "b.safetensors")
    assert torch.equal(output(again, IDS), output(model, IDS))

    plain = injected(base, ["*.q_proj", "model.embed_tokens"])
    file = li.export(plain, tmp_path / "c.safetensors")
    li.convert(file, tmp_path / "plain", "peft")
    li.convert(tmp_path / "plain", tmp_path / "d.safetensors", "lora_inject")
    first, second = load_file(file), load_file(tmp_path / "d.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "plain" / CONFIG).read_text())["r"] == 2
