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


@pytest.mark.parametrize("order", [("block", "whole"), ("whole", "block")])
@pytest.mark.parametrize("merged", [False, True])
def test_beside_a_whole_block_both_act_in_either_order(order, merged):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(8)), torch.randn(5, 8)
    norm = copy.deepcopy(model[0]).double()
    before = snapshot(model)
    block = {"adapter": "block", "in_features": 8, "out_features": 8}
    targets = {"block": li.Target("0", **block), "whole": li.Target("0.weight", **FULL)}
    for name in order:
        li.inject(model, targets[name], name=name, rank=2, alpha=6)
    p = fill(model)
    if merged:
        li.merge(model, "whole")
    weight = norm.weight + 3 * p["0.adapters.whole@weight.lora_dense"]
    path = 3 * x.double() @ p["0.adapters.block.lora_A"].T @ p["0.adapters.block.lora_B"].T
    wanted = nn.functional.layer_norm(x.double(), (8,), weight, norm.bias) + path
    assert torch.allclose(model(x).double(), wanted, atol=1e-5)
    with li.disabled(model, "block"):
        assert torch.allclose(model(x).double(), wanted - path, atol=1e-5)
    li.uninject(model, "block")
    assert torch.allclose(model(x).double(), wanted - path, atol=1e-5)
    li.uninject(model, "whole")
    assert_same(before, model)


def test_a_block_of_steps_with_a_parameter_of_its_own_still_walks_its_steps_alone():
    torch.manual_seed(0)
    model, x = nn.Sequential(Scaled(nn.Linear(4, 4), nn.Tanh())), torch.randn(3, 4)
    base = copy.deepcopy(model).double()
    li.inject(model, li.Target("0.gain", **FULL), name="whole")
    li.inject(model, li.Target("0", adapter="block", in_features=4, out_features=4), name="block", rank=2)
    p = fill(model)
    assert len(model[0]) == 2
    gain = 1 + p["0.adapters.whole@gain.lora_dense"]
    path = x.double() @ p["0.adapters.block.lora_A"].T @ p["0.adapters.block.lora_B"].T
    assert torch.allclose(model(x).double(), base(x.double()) * gain + path, atol=1e-5)


def test_a_block_is_refused_where_the_class_was_changed_over_a_host_that_cannot_take_it():
    model = nn.Sequential(nn.LayerNorm(8))
    li.inject(model, li.Target("0.weight", **FULL), name="whole")
    model[0].__class__ = type("Wrapped", (type(model[0]),), {})
    with pytest.raises(li.UnsupportedError, match="class was changed to Wrapped"):
        li.inject(model, li.Target("0", adapter="block", in_features=8, out_features=8), name="block")


@pytest.mark.parametrize(("made", "found"), [("transpose", r"shape \(1, 3, 8\)"), ("pair", "a tuple")])
def test_a_block_whose_output_the_path_does_not_fit_is_an_error_and_no_broadcast(made, found):
    class Step(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
            y = super().forward(x)
            return y.transpose(0, 1) if made == "transpose" else (y, None)

    model = nn.Sequential(Step(8, 8))
    li.inject(model, li.Target("0", adapter="block", in_features=8, out_features=8), rank=2)
    with pytest.raises(li.UnsupportedError, match=rf"Step returned .*{found}, .*adapt the modules inside"):
        model(torch.randn(3, 1, 8))
    with li.disabled(model):
        model(torch.randn(3, 1, 8))


BLOCK = {"adapter": "block", "in_features": 8, "out_features": 6}


@pytest.mark.parametrize("order", [("first", "whole"), ("whole", "first")])
@pytest.mark.parametrize(("first", "then"), [("block", "pair"), ("pair", "block")])
def test_what_has_left_does_not_decide_what_may_come(model, order, first, then):
    """Blocks and pairs cannot share a host; once one is gone, the other may come, though a third stayed meanwhile."""
    before, x = snapshot(model), torch.randn(5, 8)
    base = copy.deepcopy(model[0]).double()
    targets = {"block": li.Target("0", **BLOCK), "pair": "0", "whole": li.Target("0.bias", **FULL)}
    for name in order:
        li.inject(model, targets[first if name == "first" else name], name=name, rank=2, alpha=6)
    p = fill(model)
    if order[0] == "first":
        with pytest.raises(li.UnsupportedError, match=f"beside which '{'linear' if then == 'pair' else 'block'}'"):
            li.inject(model, targets[then], name="then", rank=2)
    li.uninject(model, "first")
    bias = base.bias + 3 * p["0.adapters.whole@bias.lora_dense"]
    assert torch.allclose(model[0](x).double(), nn.functional.linear(x.double(), base.weight, bias), atol=1e-5)
    assert model[0].weight is model[0]._parameters["weight"]
    li.inject(model, targets[then], name="then", rank=2, alpha=6)
    p = fill(model)
    bias = base.bias + 3 * p["0.adapters.whole@bias.lora_dense"]
    path = 3 * x.double() @ p["0.adapters.then.lora_A"].T @ p["0.adapters.then.lora_B"].T
    wanted = nn.functional.linear(x.double(), base.weight, bias) + path
    assert torch.allclose(model[0](x).double(), wanted, atol=1e-5)
    assert torch.allclose(copy.deepcopy(model)[0](x).double(), wanted, atol=1e-5)
    li.uninject(model)
    assert_same(before, model)


def test_a_hook_that_was_added_meanwhile_calls_what_the_host_is_now(model):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    before, x, base = snapshot(model), torch.randn(5, 8), copy.deepcopy(model[0]).double()
    li.inject(model, li.Target("0", **BLOCK), name="block", rank=2)
    li.inject(model, li.Target("0.bias", **FULL), name="whole")
    p = fill(model)
    add_hook_to_module(model[0], ModelHook())
    li.uninject(model, "block")
    bias = base.bias + p["0.adapters.whole@bias.lora_dense"]
    wanted = nn.functional.linear(x.double(), base.weight, bias)
    assert torch.allclose(model[0](x).double(), wanted, atol=1e-5)
    li.uninject(model)
    remove_hook_from_module(model[0])
    del model[0].forward
    assert_same(before, model)


@pytest.mark.parametrize("beside", [(), ("pair",), ("whole",)])
def test_a_whole_block_takes_its_place_behind_a_hook_of_accelerate(beside):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Doubling(ModelHook):
        def pre_forward(self, module, x):
            return (2 * x,), {}

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(5, 8)
    base = copy.deepcopy(model[0]).double()
    add_hook_to_module(model[0], Doubling())
    before = snapshot(model)
    targets = {"pair": "0", "whole": li.Target("0.weight", **FULL)}
    for name in beside:
        li.inject(model, targets[name], name=name, rank=2, alpha=6)
    li.inject(model, li.Target("0", **BLOCK), name="block", rank=2, alpha=6)
    p = fill(model)
    weight = base.weight
    if "pair" in beside:
        weight = weight + 3 * p["0.adapters.pair.lora_B"] @ p["0.adapters.pair.lora_A"]
    if "whole" in beside:
        weight = weight + 3 * p["0.adapters.whole@weight.lora_dense"]
    met = 2 * x.double()
    without = nn.functional.linear(met, weight, base.bias)
    path = 3 * met @ p["0.adapters.block.lora_A"].T @ p["0.adapters.block.lora_B"].T
    assert torch.allclose(model(x).double(), without + path, atol=1e-5)
    li.uninject(model, "block")
    assert torch.allclose(model(x).double(), without, atol=1e-5)
    if beside:
        li.uninject(model)
    assert_same(before, model)
    remove_hook_from_module(model[0])
    assert torch.allclose(model(x).double(), base(x.double()), atol=1e-5)


class Scaled(nn.Sequential):
    """A chain of steps with a parameter of its own."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__(*steps)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


def test_a_chain_whose_own_parameter_alone_is_trained_walks_its_steps_alone():
    model, x = nn.Sequential(Scaled(nn.Linear(4, 4), nn.Tanh())), torch.randn(3, 4)
    base, before = copy.deepcopy(model).double(), snapshot(model)
    li.inject(model, li.Target("0.gain", **FULL))
    gain = 1 + fill(model)["0.adapters.default@gain.lora_dense"]
    assert len(model[0]) == 2 and list(model[0]) == [model[0][0], model[0][1]]
    assert torch.allclose(model(x).double(), base(x.double()) * gain, atol=1e-5)
    li.uninject(model)
    assert_same(before, model)


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0"])
def test_a_recurrent_network_keeps_no_trace_of_a_whole_update_in_its_list_of_weights(name):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(4, 3)), torch.randn(5, 2, 4)
    base, before = copy.deepcopy(model), snapshot(model)
    li.inject(model, li.Target(f"0.{name}", **FULL))
    p = fill(model)
    with torch.no_grad():
        getattr(base[0], name).add_(p[f"0.adapters.default@{name}.lora_dense"].float())
    assert torch.allclose(model(x)[0], base(x)[0], atol=1e-5)
    assert torch.allclose(copy.deepcopy(model)(x)[0], base(x)[0], atol=1e-5)
    li.uninject(model)
    assert all(one is two for one, two in zip(model[0]._flat_weights, model[0].parameters(), strict=True))
    assert_same(before, model)
