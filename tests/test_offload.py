"""accelerate's offloading: the base waits on the CPU or the disk, the adapters are where the module runs."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from models import fill
from torch import nn

import lora_inject as li

CPU = torch.device("cpu")


class Reading(nn.Module):
    """Reads a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.tanh(x @ self.matrix)


class Net(nn.Module):
    """Linears that are called, and a matrix that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.middle = Reading()
        self.down = nn.Linear(8, 4)

    def forward(self, x):
        return self.down(self.middle(self.up(x)))


TARGETS = ["up", "down", "middle.matrix"]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def adapted(model: nn.Module) -> nn.Module:
    li.inject(model, TARGETS, rank=2, seed=0)
    fill(model)
    return model


def offloaded(how: str, tmp_path) -> Net:
    model = net()
    if how == "cpu":
        cpu_offload(model, execution_device=CPU)
    else:
        disk_offload(model, str(tmp_path / "weights"), execution_device=CPU)
    assert model.up.weight.is_meta
    return model


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_an_offloaded_model_runs_with_adapters_and_leaves_no_trace(how, tmp_path):
    x, wanted = torch.randn(2, 3, 6), adapted(net())
    with torch.no_grad():
        model, plain = offloaded(how, tmp_path), net()(x)
        assert torch.equal(model(x), plain)
        flags = {key: p.requires_grad for key, p in model.named_parameters()}
        li.inject(model, TARGETS, rank=2, seed=0)
        assert {str(p.device) for p in li.adapter_parameters(model).values()} == {"cpu"}
        assert torch.equal(model(x), plain)
        fill(model)
        for _ in range(2):
            assert torch.allclose(model(x), wanted(x), atol=1e-6)
            assert model.up._parameters["weight"].is_meta, "the weight went back"
        with li.disabled(model):
            assert torch.equal(model(x), plain)
        li.uninject(model)
        assert torch.equal(model(x), plain)
        assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
        remove_hook_from_submodules(model)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_adapters_of_an_offloaded_model_get_the_same_gradients(how, tmp_path):
    x, wanted = torch.randn(2, 3, 6), adapted(net())
    model = adapted(offloaded(how, tmp_path))
    model(x).square().sum().backward()
    wanted(x).square().sum().backward()
    for one, other in zip(li.adapter_parameters(model).values(), li.adapter_parameters(wanted).values(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_weights_that_are_elsewhere_cannot_be_merged_into(how, tmp_path):
    model = adapted(offloaded(how, tmp_path))
    with pytest.raises(li.UnsupportedError, match=r"up\.weight is on the meta device.*load the weights first"):
        li.merge(model)
    assert not any(ref.adapter.merged for ref in li.adapters(model))


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_verify_finds_them_alive_and_merges_nothing(how, tmp_path):
    model = offloaded(how, tmp_path)
    li.inject(model, TARGETS, rank=2)
    report = li.verify(model, torch.randn(2, 3, 6))
    assert report.ok and report.merge_error is None and len(report.verdicts) == 3, str(report)


def test_verify_of_a_computed_weight_merges_nothing_either():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)))
    li.inject(model, "0", rank=2)
    report = li.verify(model, torch.randn(2, 6))
    assert report.ok and report.merge_error is None, str(report)
