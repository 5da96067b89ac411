"""Each preset in configs/ against a small model of every family that it names, with random weights."""

import re
from collections import Counter

import preset_models
import pytest
import torch
from preset_models import HEADS, IMAGE, LLAMA, MODELS, VOCABULARY, build, each
from tiny_unet import UNet2DConditionModel
from torch import nn

import lora_inject as li
from lora_inject.recipe_file import presets

pytestmark = pytest.mark.zoo


def kinds(plan):
    """How many sites there are by the last two names of their paths, numbers apart."""
    return Counter(".".join(re.sub(r"\.\d+(?=\.|$)", "", site.path).split(".")[-2:]) for site in plan)


def first_tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def check(preset, model, inputs, expected):
    """The sites are the expected ones, the output stays bit-equal, and every adapter gets a gradient."""
    # torch picks kernels for products by requires_grad, so the base is compared as frozen as it will be.
    model.requires_grad_(False)
    with torch.no_grad():
        before = first_tensor(model(**inputs))
    plan = li.inject(model, li.load_recipe(preset), seed=0)
    assert kinds(plan) == expected
    with torch.no_grad():
        assert torch.equal(first_tensor(model(**inputs)), before)
    for ref in li.adapters(model):
        ref.adapter.train()
    first_tensor(model(**inputs)).square().sum().backward()
    assert [ref.path for ref in li.adapters(model) if not ref.adapter.lora_B.grad.any()] == []
    return plan


@pytest.mark.parametrize(
    ("preset", "class_name", "options", "inputs", "expected"), MODELS, ids=[f"{row[0]}-{row[1]}" for row in MODELS]
)
def test_a_preset_adapts_what_it_names_and_changes_no_output(preset, class_name, options, inputs, expected):
    model = build(class_name, options)
    check(preset, model, inputs(model.config), expected)


def test_every_preset_is_tried_on_a_model():
    # minilm is the demo's own recipe, tried there on the real model.
    assert {"sd_unet", "minilm", *(row[0] for row in MODELS)} >= presets().keys()


@pytest.mark.parametrize("preset", ["gemma", "all_linear"])
def test_only_all_linear_enters_the_vision_tower_of_a_text_preset(preset):
    options = {
        "text_config": VOCABULARY | HEADS | {"vocab_size": 64},
        "vision_config": IMAGE,
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    }
    plan = li.plan(build("Gemma3ForConditionalGeneration", options), li.load_recipe(preset))
    vision = [site.path for site in plan if "vision" in site.path]
    text = Counter(kinds([site for site in plan if "vision" not in site.path]))
    assert text == LLAMA
    assert len(vision) == (12 if preset == "all_linear" else 0)


@pytest.mark.parametrize("linear", [False, True], ids=["convolutions", "linears"])
def test_the_unet_preset_adapts_attention_and_convolutions_at_their_ranks(linear):
    torch.manual_seed(0)
    model = UNet2DConditionModel(linear).eval()
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.randn(2, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }
    expected = each(4, "attn1 attn2", "to_q to_k to_v to_out") | {"net.proj": 4, "ff.net": 4}
    expected |= {"attentions.proj_in": 4, "attentions.proj_out": 4}
    expected |= each(5, "resnets", "conv1 conv2 time_emb_proj") | {"resnets.conv_shortcut": 2}
    expected |= {"downsamplers.conv": 1, "upsamplers.conv": 1}
    plan = check("sd_unet", model, inputs, expected)
    assert {site.config.rank for site in plan if "resnets" in site.path or "samplers" in site.path} == {8}
    assert {site.config.rank for site in plan if "attentions" in site.path} == {16}
    assert {site.config.scaling for site in plan} == {1.0}


def test_all_linear_leaves_heads_alone_and_takes_subclasses():
    class Quantised(nn.Linear):
        pass

    model = nn.Module()
    model.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Quantised(4, 4), nn.Conv1d(4, 4, 1))
    model.head = nn.Sequential(nn.Linear(4, 4))
    model.lm_head, model.overhead = nn.Linear(4, 4), nn.Linear(4, 4)
    plan = li.plan(model, li.load_recipe("all_linear"))
    assert [site.path for site in plan] == ["body.0", "body.2", "overhead"]


def test_options_of_the_call_stand_above_those_of_the_recipe():
    model = build("LlamaForCausalLM", preset_models.GROUPED)
    plan = li.inject(model, li.load_recipe("llama"), rank=4, alpha=2, name="small")
    assert {(site.config.rank, site.config.scaling) for site in plan} == {(4, 0.5)}
    assert {ref.name for ref in li.adapters(model)} == {"small"}
