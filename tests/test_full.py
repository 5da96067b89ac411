"""Parameters trained as a whole beside low-rank pairs: one host may carry both."""

from __future__ import annotations

import copy

import pytest
import torch
from snapshot import assert_same, snapshot
from torch import nn

import lora_inject as li

FULL = {"adapter": "full"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def fill(model, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return {key: value.detach().double() for key, value in li.adapter_parameters(model).items()}


def test_a_module_takes_a_pair_for_its_weight_and_a_whole_update_for_its_bias(model):
    base, x = copy.deepcopy(model), torch.randn(5, 8)
    plan = li.inject(model, ["0", li.Target("0.bias", **FULL)], rank=2, alpha=6)
    assert [(site.path, site.adapter_class.kind) for site in plan] == [("0", "linear"), ("0.bias", "full")]
    p = fill(model)
    weight = base[0].weight.double() + 3 * p["0.adapters.default.lora_B"] @ p["0.adapters.default.lora_A"]
    bias = base[0].bias.double() + 3 * p["0.adapters.default@bias.lora_dense"]
    wanted = x.double() @ weight.T + bias
    assert torch.allclose(model[0](x).double(), wanted, atol=1e-5)
    li.merge(model)
    assert torch.allclose(model[0](x).double(), wanted, atol=1e-5)
    li.unmerge(model)
    assert torch.allclose(model[0](x).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("order", [("pair", "whole"), ("whole", "pair")])
def test_either_may_come_first_and_the_model_comes_back(model, order):
    before, x = snapshot(model), torch.randn(5, 8)
    targets = {"pair": "0", "whole": li.Target("0.bias", **FULL)}
    for name in order:
        li.inject(model, targets[name], name=name, rank=2)
    fill(model)
    together = model(x)
    with li.disabled(model, "whole"):
        assert not torch.equal(model(x), together)
    with li.disabled(model, "pair"):
        assert not torch.equal(model(x), together)
    li.uninject(model, "pair")
    li.uninject(model, "whole")
    assert_same(before, model)


def test_a_module_selected_as_a_whole_gets_all_its_own_parameters_and_no_childs(model):
    plan = li.plan(nn.Sequential(model), [li.Target("0.1", **FULL), li.Target("0.2.*", **FULL)])
    assert [site.path for site in plan] == ["0.1.weight", "0.1.bias", "0.2.weight", "0.2.bias"]
    with pytest.raises(li.LoraInjectError, match="finds nothing to serve in Sequential"):
        li.plan(nn.Sequential(model), li.Target("0", **FULL))


def test_without_the_wish_for_it_no_norm_or_bias_is_trained(model):
    assert [site.path for site in li.plan(model, "*")] == ["0", "2"]


def test_gradients_reach_the_update_and_training_it_is_training_the_parameter(model):
    twin, x = copy.deepcopy(model).requires_grad_(False), torch.randn(5, 8)
    twin[1].requires_grad_(True)
    li.inject(model, li.Target("1", **FULL))
    for run in (model, twin):
        run(x).square().sum().backward()
    found = li.adapter_parameters(model)
    assert torch.allclose(found["1.adapters.default@weight.lora_dense"].grad, twin[1].weight.grad)
    assert torch.allclose(found["1.adapters.default@bias.lora_dense"].grad, twin[1].bias.grad)


def test_a_single_number_is_refused_with_the_way_out():
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(li.UnsupportedError, match="single number"):
        li.plan(nn.Sequential(module), li.Target("0.scale", **FULL))


def test_it_goes_through_a_file_and_a_checkpoint(model, tmp_path):
    from safetensors.torch import load_file, save_file

    base = copy.deepcopy(model)
    li.inject(model, ["0", li.Target("*.bias", **FULL), li.Target("1.weight", **FULL)], rank=2)
    fill(model)
    x = torch.randn(5, 8)
    wanted = model(x)
    path = li.export(model, tmp_path / "adapter.safetensors")
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    li.merge_checkpoint(tmp_path / "model.safetensors", path, tmp_path / "out")
    fresh = copy.deepcopy(base)
    li.load(fresh, path)
    assert torch.equal(fresh(x), wanted)
    li.merge(model)
    merged = copy.deepcopy(base)
    merged.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(merged(x), model(x))
