"""The four ideas that the package grew from, each as a user would write it."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_inject as li


def test_1_one_layer_adapted_by_hand():
    """A linear-like layer gets rank, alpha and biases; it starts as the identity; scaling is alpha / rank."""
    layer = nn.Linear(16, 8)
    x = torch.randn(4, 16)
    before = layer(x)

    li.inject(layer, "", rank=4, alpha=8, bias=True)
    assert torch.equal(layer(x), before)

    adapter = layer.adapters["default"]
    assert adapter.scaling == 8 / 4
    assert adapter.lora_A.shape == (4, 16) and adapter.lora_B.shape == (8, 4)
    assert adapter.lora_A_bias.shape == (4,) and adapter.lora_B_bias.shape == (8,)

    with torch.no_grad():
        adapter.lora_B.fill_(0.1)
        adapter.lora_A_bias.fill_(1.0)
        adapter.lora_B_bias.fill_(0.5)
    inner = x @ adapter.lora_A.T + 1.0
    by_hand = before + 2 * (inner @ adapter.lora_B.T + 0.5)
    assert torch.allclose(layer(x), by_hand, atol=1e-5)


def test_1_a_layer_that_is_not_a_linear_but_works_like_one():
    """GPT-2's Conv1D holds its weight the other way round; nothing else changes."""
    layer = Conv1D(8, 16)
    x = torch.randn(4, 16)
    li.inject(layer, "", rank=4, alpha=2)
    with torch.no_grad():
        layer.adapters["default"].lora_A.fill_(0.2)
        layer.adapters["default"].lora_B.fill_(0.1)
    delta = layer.adapters["default"].delta(layer)["weight"]
    assert delta.shape == (16, 8)
    assert torch.allclose(delta, torch.full((16, 8), 0.5 * 4 * 0.2 * 0.1))
    assert torch.allclose(layer(x), x @ (layer._parameters["weight"] + delta) + layer.bias, atol=1e-5)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 6)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def whole_block(target: li.Target) -> None:
    model = nn.ModuleDict({"mlp": Mlp(), "head": nn.Linear(6, 2)})
    x = torch.randn(5, 8)
    before = model["mlp"](x)

    li.inject(model, target, rank=2, alpha=4)
    assert torch.equal(model["mlp"](x), before)
    assert set(li.adapter_parameters(model)) == {f"mlp.adapters.default.lora_{x}" for x in "AB"}

    adapter = model["mlp"].adapters["default"]
    assert adapter.lora_A.shape == (2, 8) and adapter.lora_B.shape == (6, 2)
    nn.init.normal_(adapter.lora_B)
    path = 2 * x @ adapter.lora_A.T @ adapter.lora_B.T
    assert torch.allclose(model["mlp"](x), before + path, atol=1e-5)
    for strength in (0.0, 0.3, 1.0, 2.0):
        with li.scaled(model, strength):
            assert torch.allclose(model["mlp"](x), before + strength * path, atol=1e-5)


def test_2_a_whole_block_with_its_sizes_from_an_example():
    """The low-rank path runs from the block's input to its output; `scaled` chooses its strength per call."""
    whole_block(li.Target("mlp", adapter="block", example=torch.zeros(1, 8)))


def test_2_a_whole_block_with_its_sizes_given():
    whole_block(li.Target("mlp", adapter="block", in_features=8, out_features=6))


def test_2_a_sequential_is_a_block_too():
    """Containers walk over their children: the adapters must not become one of the layers."""
    block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(3, 8)
    before, length, last = block(x), len(block), block[-1]
    li.inject(block, li.Target("", adapter="block", example=x), rank=2)
    assert torch.equal(block(x), before)
    assert len(block) == length and block[-1] is last and len(list(block)) == length
    nn.init.normal_(block.adapters["default"].lora_B)
    adapter = block.adapters["default"]
    assert torch.allclose(block(x), before + x @ adapter.lora_A.T @ adapter.lora_B.T, atol=1e-5)


def test_3_a_frozen_linear_whose_factors_alone_train():
    """State out, state in, merge."""
    layer = nn.Linear(6, 5)
    frozen = layer.weight.detach().clone()
    li.inject(layer, "", rank=2)
    assert {key for key, p in layer.named_parameters() if p.requires_grad} == set(li.adapter_parameters(layer))

    x, y = torch.randn(64, 6), torch.randn(64, 5)
    optimizer = torch.optim.Adam(li.adapter_parameters(layer).values(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(layer.state_dict()["weight"], frozen)

    state = {key: value.clone() for key, value in li.adapter_state(layer).items()}
    assert set(state) == {"lora_A", "lora_B"}
    twin = nn.Linear(6, 5)
    twin.load_state_dict({key: value for key, value in layer.state_dict().items() if "adapters" not in key})
    li.inject(twin, "", rank=2)
    for key, value in li.adapter_state(twin).items():
        value.copy_(state[key])
    assert torch.equal(twin(x), layer(x))

    wanted = twin(x)
    li.merge(twin)
    assert torch.allclose(twin.state_dict()["weight"], frozen + state["lora_B"] @ state["lora_A"], atol=1e-6)
    assert torch.allclose(twin(x), wanted, atol=1e-5)


def test_4_the_module_chooses_its_adapter():
    """Linear, convolution and embedding by `can_adapt`; merge, unmerge; detach, and the adapter keeps its weights."""
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "conv": nn.Conv2d(3, 4, 3), "out": nn.Linear(4, 2)})
    plan = li.inject(model, "*", rank=2, init="orthogonal", seed=0)
    assert [site.adapter_class.kind for site in plan] == ["embedding", "conv", "linear"]
    inputs = {"table": torch.arange(10), "conv": torch.randn(1, 3, 5, 5), "out": torch.randn(3, 4)}
    for parameter in li.adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)

    def run():
        return {path: model[path](x) for path, x in inputs.items()}

    adapted, base = run(), {k: v.clone() for k, v in model.state_dict().items() if "adapters" not in k}
    li.merge(model)
    assert all(torch.allclose(run()[path], y, atol=1e-5) for path, y in adapted.items())
    li.unmerge(model)
    assert all(torch.equal(run()[path], y) for path, y in adapted.items())

    refs = list(li.adapters(model))
    kept = [ref.adapter.lora_B.detach().clone() for ref in refs]
    li.uninject(model)
    assert list(model.state_dict()) == list(base)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    assert all(torch.equal(ref.adapter.lora_B, value) for ref, value in zip(refs, kept, strict=True))
