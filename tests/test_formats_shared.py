"""Weights and modules that stand in several places, and merged updates, in other programs' files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_inject as li

IDS = torch.arange(12).reshape(2, 6)
ENDS = ["model.embed_tokens", "lm_head"]


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def shared_llama() -> LlamaForCausalLM:
    model = llama()
    li.inject(model, ENDS, rank=2, share_tied=True)
    fill(model)
    return model.eval()


@torch.no_grad()
def test_a_pair_that_tied_weights_share_is_written_for_each_and_peft_computes_the_same(tmp_path):
    model = shared_llama()
    li.export(model, tmp_path / "peft", format="peft")
    with pytest.warns(UserWarning, match="tie"):
        theirs = PeftModel.from_pretrained(llama(), tmp_path / "peft").eval()
    wanted, base = model(IDS).logits, llama()(IDS).logits
    torch.testing.assert_close(theirs(IDS).logits, wanted, atol=2e-6, rtol=1e-5)
    assert (wanted - base).abs().max() > 0.1
    ours = llama()
    li.load(ours, tmp_path / "peft")
    torch.testing.assert_close(ours(IDS).logits, wanted, atol=2e-6, rtol=1e-5)


def forgetting(path):
    """Rewrites a file as one from before files told which aliases are tied modules."""
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    adapter = json.loads(meta["adapter"])
    assert any(site.pop("tied", None) for site in adapter["sites"])
    save_file(tensors, path, meta | {"adapter": json.dumps(adapter)})


@torch.no_grad()
@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_a_pair_that_tied_weights_share_is_converted_and_checked_by_the_file_alone(tmp_path, to):
    model = shared_llama()
    native = li.export(model, tmp_path / "a.safetensors")
    if to == "peft":
        li.convert(native, tmp_path / "out", to)
        assert "--model" not in str(li.check_adapter(native, "peft"))
    else:
        llama().save_pretrained(tmp_path / "base")
        li.convert(native, tmp_path / "out", to, model=tmp_path / "base")
    ours = llama()
    li.load(ours, tmp_path / "out")
    torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, atol=2e-6, rtol=1e-5)
    if to == "peft":
        with pytest.warns(UserWarning, match="tie"):
            theirs = PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_a_file_that_does_not_tell_tied_modules_is_converted_and_checked_with_the_model_alone(tmp_path):
    model = shared_llama()
    native = li.export(model, tmp_path / "a.safetensors")
    forgetting(native)
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(li.UnsupportedError, match=r"(?s)embed_tokens = lm_head.*--model"):
        li.convert(native, tmp_path / "no", "peft")
    assert "--model" in str(li.check_adapter(native, "peft")) and not li.check_adapter(native, "peft")
    assert li.check_adapter(native, "peft", model=llama())
    for to in ("peft", "mlx"):
        li.convert(native, tmp_path / to, to, model=tmp_path / "base")
        ours = llama()
        li.load(ours, tmp_path / to)
        torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, atol=2e-6, rtol=1e-5)


class Twice(nn.Module):
    """One layer under two names, or inside a block that has two names."""

    def __init__(self, block: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Sequential(nn.Linear(8, 8)) if block else nn.Linear(8, 8)
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("format", ["peft", "kohya", "diffusers"])
def test_a_module_under_two_names_is_refused_by_both(format, tmp_path):
    model = Twice(block=False)
    li.inject(model, "a", rank=2)
    fill(model)
    with pytest.raises(li.UnsupportedError, match="a = b"):
        li.export(model, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []
    native = li.export(model, tmp_path / "a.safetensors")
    for base in (None, Twice(block=False)):
        report = li.check_adapter(native, "peft", model=base)
        assert not report and "a = b" in str(report)
    again = Twice(block=False)
    li.load(again, native)
    x = torch.randn(3, 8)
    assert torch.equal(again(x), model(x))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # those of the second name
@torch.no_grad()
def test_a_layer_inside_a_block_that_has_two_names_is_adapted_in_both_by_peft(tmp_path):
    model = Twice(block=True)
    li.inject(model, "a.0", rank=2)
    fill(model)
    li.export(model, tmp_path / "peft", format="peft")
    theirs = PeftModel.from_pretrained(Twice(block=True), tmp_path / "peft").eval()
    x = torch.randn(3, 8)
    torch.testing.assert_close(theirs(x), model(x), atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::lora_inject.RoundingWarning")
@pytest.mark.parametrize("keep", ["residual", "copy"])
def test_values_trained_as_a_whole_are_the_same_merged_or_not(keep, tmp_path):
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    model = Norms()
    base = copy.deepcopy(model)
    li.inject(model, ["lin", li.Target("norm.weight", adapter="full")], rank=2)
    fill(model)
    update = model.norm.adapters["default@weight"].lora_dense.detach().clone()
    files = [li.export(model, tmp_path / "before", format="peft")]
    li.merge(model, keep=keep)
    files.append(li.export(model, tmp_path / "merged", format="peft"))
    before, merged = (load_file(file / "adapter_model.safetensors") for file in files)
    assert before.keys() == merged.keys()
    assert all(torch.equal(before[key], merged[key]) for key in before)
    name = next(key for key in merged if key.endswith("norm.weight"))
    torch.testing.assert_close(merged[name], (base.norm.weight + update).detach(), atol=1e-6, rtol=0)
