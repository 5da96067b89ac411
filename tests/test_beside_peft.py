"""The table "Beside a wrapper" of the README: each row is seen happening, in PEFT and here."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_inject as li

TARGETS = ["q_proj", "v_proj"]


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, **options)).eval()


def trained_peft(model: nn.Module, targets, value=None) -> nn.Module:
    """Returns PEFT's model with numbers in B, or with one value in all of them."""
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets)).eval()
    fill_b(adapted, value)
    return adapted


def trained_ours(model: nn.Module, targets, value=None) -> nn.Module:
    li.inject(model, targets, rank=4)
    fill_b(model, value)
    return model


def fill_b(model: nn.Module, value) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02) if value is None else parameter.fill_(value)


def test_base_keys():
    base = set(llama().state_dict())
    assert len(base) == 21
    wrapped = get_peft_model(llama(), LoraConfig(target_modules=TARGETS))
    assert len(base & set(wrapped.state_dict())) == 0
    assert len(base & set(wrapped.base_model.model.state_dict())) == 17
    model = llama()
    li.inject(model, [f"*.{name}" for name in TARGETS])
    assert len(base & set(model.state_dict())) == 21


def test_the_adapted_layer():
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    wrapped = get_peft_model(model, LoraConfig(target_modules=TARGETS))
    found = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    assert found is not layer and not isinstance(found, nn.Linear)
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    li.inject(model, ["*.q_proj"])
    found = model.model.layers[0].self_attn.q_proj
    assert found is layer and isinstance(found, nn.Linear) and type(found) is not nn.Linear


def test_one_of_two_patterns_matches_nothing():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "qproj"]))
    assert not [warning for warning in said if "qproj" in str(warning.message)]
    with pytest.raises(li.TargetError, match=r"qproj[\s\S]*q_proj"):
        li.inject(llama(), ["*.q_proj", "*.qproj"])


class Reader(nn.Module):
    """Uses the weight of its child by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(8, 8)

    def forward(self, x):
        return x @ self.child.weight.t()


def test_code_that_reads_the_weight():
    torch.manual_seed(0)
    base, x = Reader(), torch.randn(3, 8)
    wrapped = trained_peft(copy.deepcopy(base), ["child"])
    assert torch.equal(wrapped(x), base(x))
    assert not wrapped(x).requires_grad
    ours = trained_ours(copy.deepcopy(base), ["child"])
    adapter = ours.child.adapters["default"]
    weight = base.child.weight + adapter.scaling * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(ours(x), x @ weight.t())
    ours(x).sum().backward()
    assert adapter.lora_B.grad is not None


def test_the_fast_path_of_the_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    base, x = nn.Sequential(layer), torch.randn(2, 5, 16)
    wrapped = trained_peft(copy.deepcopy(base), ["linear1", "linear2"])
    ours = trained_ours(copy.deepcopy(base), ["*.linear1", "*.linear2"])
    with torch.no_grad():
        assert torch.equal(wrapped(x), base(x))
        assert not torch.equal(ours(x), base(x))


def changed(weights: dict, model: nn.Module) -> tuple[float, float]:
    """Returns which share of the adapted weights' elements differs, and by how much at most."""
    pairs = []
    for name, parameter in model.named_parameters():
        key = name.replace("base_model.model.", "").replace(".base_layer", "")
        if key in weights and re.search(r"[qv]_proj", key) and "lora" not in key:
            pairs.append((weights[key].double(), parameter.detach().double()))
    assert len(pairs) == 4
    distance = torch.cat([(a - b).abs().flatten() for a, b in pairs])
    return float((distance > 0).double().mean()), float(distance.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    weights = llama().to(dtype).state_dict()
    wrapped = trained_peft(llama().to(dtype), TARGETS)
    ours = trained_ours(llama().to(dtype), [f"*.{name}" for name in TARGETS])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.merge_adapter()
        wrapped.unmerge_adapter()
        li.merge(ours)
        li.unmerge(ours)
    share, once = changed(weights, wrapped)
    assert 0.1 < share < 0.5
    assert once < (1e-7 if dtype == torch.float32 else 1e-2)
    assert changed(weights, ours) == (0.0, 0.0)
    if dtype == torch.bfloat16:
        for _ in range(9):
            wrapped.merge_adapter()
            wrapped.unmerge_adapter()
        assert changed(weights, wrapped)[1] > once


def test_merge_with_nan():
    wrapped = trained_peft(llama(), TARGETS, float("nan"))
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    assert any(parameter.isnan().any() for name, parameter in wrapped.named_parameters() if "base_layer" in name)
    with pytest.raises(ValueError, match="NaN"):
        trained_peft(llama(), TARGETS, float("nan")).merge_adapter(safe_merge=True)
    ours = trained_ours(llama(), ["*.q_proj"], float("nan"))
    with pytest.raises(li.StateError, match="nothing was merged"):
        li.merge(ours)


def test_merge_into_a_tied_head():
    weight = llama(tie_word_embeddings=True).lm_head.weight.detach().clone()
    with pytest.warns(UserWarning, match="tie"):
        wrapped = trained_peft(llama(tie_word_embeddings=True), ["lm_head"])
        wrapped.merge_adapter()
    assert not torch.equal(wrapped.base_model.model.model.embed_tokens.weight, weight)
    ours = trained_ours(llama(tie_word_embeddings=True), ["lm_head"])
    report = li.merge(ours)
    assert torch.equal(ours.model.embed_tokens.weight, weight)
    assert "untied" in str(report)
    li.unmerge(ours)
    assert ours.lm_head._parameters["weight"] is ours.model.embed_tokens.weight


def test_requires_grad_after_the_adapters_are_gone():
    model = trained_peft(llama(), TARGETS).unload()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model = trained_ours(llama(), ["*.q_proj"])
    li.uninject(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def other_base() -> LlamaForCausalLM:
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


@pytest.fixture
def folder(tmp_path):
    """PEFT's folder of an adapter."""
    trained_peft(llama(), TARGETS).save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


@pytest.fixture
def file(tmp_path):
    """Our file of an adapter."""
    return li.export(trained_ours(llama(), ["*.q_proj"]), tmp_path / "ours.safetensors")


def edited(path, change):
    """Changes the tensors of a safetensors file and leaves its metadata as they are."""
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def test_other_base_weights(folder, file):
    PeftModel.from_pretrained(other_base(), folder)
    with pytest.raises(li.MismatchError, match="other base weights"):
        li.load(other_base(), file)
    li.load(other_base(), file, check_base=False)


def test_a_file_that_lacks_a_tensor(folder, file):
    gone = "model.layers.0.self_attn.q_proj.lora_B"
    edited(folder / "adapter_model.safetensors", lambda held: held.pop(f"base_model.model.{gone}.weight"))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        wrapped = PeftModel.from_pretrained(llama(), folder)
    assert not wrapped.get_parameter(f"base_model.model.{gone}.default.weight").any()
    edited(file, lambda held: held.pop(gone))
    with pytest.raises(li.MismatchError, match=re.escape(gone)):
        li.load(llama(), file)


def test_a_file_with_a_tensor_that_has_no_place(folder, file):
    stray = "model.layers.7.self_attn.q_proj.lora_B"
    edited(
        folder / "adapter_model.safetensors",
        lambda held: held.update({f"base_model.model.{stray}.weight": torch.ones(32, 4)}),
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(llama(), folder)
    assert not [warning for warning in said if "layers.7" in str(warning.message)]
    edited(file, lambda held: held.update({stray: torch.ones(32, 4)}))
    with pytest.raises(li.FormatError, match=re.escape("model.layers.7.self_attn.q_proj")):
        li.load(llama(), file)
