"""Hosts that are containers: what walks their contents never meets the adapters, whichever adapters they carry."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_inject as li

BLOCK = li.Target("0", adapter="block", in_features=4, out_features=4)


class Steps(nn.ModuleList):
    def forward(self, x):
        for step in self:
            x = step(x)
        return x


class Numbered(nn.ModuleList):
    def forward(self, x):
        for i in range(len(self)):
            x = self[i](x)
        return self[-1](x)


class Named(nn.ModuleDict):
    def forward(self, x):
        for (key, step), same, value in zip(self.items(), self, self.values(), strict=True):
            assert key == same and step is value
            x = self[key](x)
        assert len(self) == len(self.keys())
        return x


class Scaled(nn.Sequential):
    """A sequence with a matrix of its own, which is adapted as a parameter."""

    def __init__(self, *steps):
        super().__init__(*steps)
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return super().forward(x) @ self.matrix


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed([step for name, step in self._modules.items() if name != "adapters"])


class Children(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def parts():
    return nn.Linear(4, 4), nn.Tanh()


MAKERS = {
    "sequential": lambda: nn.Sequential(*parts()),
    "list": lambda: Steps(parts()),
    "by-number": lambda: Numbered(parts()),
    "dict": lambda: Named(dict(zip("ab", parts(), strict=True))),
    "with-a-parameter": lambda: Scaled(*parts()),
    "with-a-walk-of-its-own": lambda: Backwards(*parts()),
}


def filled(model):
    for ref in li.adapters(model):
        for parameter in ref.adapter.parameters():
            nn.init.normal_(parameter)


@pytest.mark.parametrize("name", MAKERS)
def test_a_container_as_a_block(name):
    model, x = nn.Sequential(MAKERS[name]()), torch.randn(3, 4)
    before, keys = model(x), list(model.state_dict())
    li.inject(model, BLOCK, rank=2)
    assert torch.equal(model(x), before)
    filled(model)
    adapter = next(li.adapters(model)).adapter
    wanted = before.double() + (x.double() @ adapter.lora_A.double().T) @ adapter.lora_B.double().T
    assert (model(x) - wanted).abs().max() < 1e-5
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.compile(model, fullgraph=True)):
        assert torch.allclose(twin(x), model(x), atol=1e-6)
    li.uninject(model)
    assert torch.equal(model(x), before) and list(model.state_dict()) == keys


@pytest.mark.parametrize("target", [BLOCK, "0.matrix"], ids=["block", "parameter"])
def test_a_container_is_used_while_it_carries_adapters(target):
    model = nn.Sequential(Scaled(*parts()))
    host, held = model[0], list(model[0])
    li.inject(model, target, rank=2)
    host.append(nn.ReLU())
    held.append(host._modules["2"])
    assert len(host) == 3 and list(host) == held
    assert [host[i] for i in (0, 1, 2, -1)] == [*held, held[2]]
    part = host[1:]
    assert type(part) is nn.Sequential and list(part.named_children()) == [("1", held[1]), ("2", held[2])]
    with pytest.raises(IndexError):
        host[3]
    li.uninject(model)
    assert list(host) == held and list(host._modules) == ["0", "1", "2"]


def test_slices_of_a_list():
    model = nn.Sequential(Steps([*parts(), nn.ReLU()]))
    held = list(model[0])
    li.inject(model, BLOCK, rank=2)
    part = model[0][1:]
    assert type(part) is nn.ModuleList and list(part) == held[1:]


def test_a_forward_that_calls_all_children_is_told_what_to_do():
    model = nn.Sequential(Children())
    li.inject(model, BLOCK, rank=2)
    with pytest.raises(li.UnsupportedError, match="adapt the modules inside it"):
        model(torch.randn(3, 4))
