"""What transformers records on the way, hidden states and attentions, of models that are hosts themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lora_inject as li

transformers = pytest.importorskip("transformers")


def vision_model() -> Any:
    """Returns a model with a parameter of its own (its positions), beside its layers."""
    from transformers.models.molmo2 import modeling_molmo2

    config = transformers.AutoConfig.for_model(
        "molmo2_vision",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        image_size=[8, 8],
        patch_size=4,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return modeling_molmo2.Molmo2VisionModel(config).eval()


def recorded(model: Any, patches: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what the model says that it recorded, and what its layers were seen to give."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in model.layers
    ]
    with torch.no_grad():
        output = model(patches, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    assert [attention.shape for attention in output.attentions] == [(2, 2, 4, 4)] * 2
    return list(output.hidden_states), seen


@pytest.mark.parametrize("targets", ["positional_embedding", "*"])
def test_a_model_with_adapted_parameters_of_its_own_still_records(targets: str) -> None:
    model = vision_model()
    patches = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(1))
    plain, _ = recorded(model, patches)
    li.inject(model, targets, rank=2)
    assert any(ref.host_path == "" for ref in li.adapters(model))
    fresh, _ = recorded(model, patches)
    assert len(fresh) == 3 and all(torch.equal(a, b) for a, b in zip(plain, fresh, strict=True))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for ref in li.adapters(model):
            for parameter in ref.adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    states, seen = recorded(model, patches)
    assert all(torch.equal(state, layer) for state, layer in zip(states[1:], seen, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain[1:], states[1:], strict=True))


def test_the_first_recording_may_come_after_the_injection() -> None:
    model = vision_model()
    li.inject(model, "*", rank=2)
    patches = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(1))
    states, seen = recorded(model, patches)
    assert all(torch.equal(state, layer) for state, layer in zip(states[1:], seen, strict=True))
