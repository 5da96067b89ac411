"""accelerate's offloading: the base waits on the CPU or the disk, the adapters are where the module runs."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from models import fill, steps
from safetensors import safe_open
from snapshot import assert_same, raw, snapshot
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


WAYS = ["cpu", "disk", "dispatched"]
TARGETS = ["up", "down", "middle.matrix"]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def adapted(model: nn.Module) -> nn.Module:
    li.inject(model, TARGETS, rank=2, seed=0)
    fill(model)
    return model


def offload(model: nn.Module, how: str, tmp_path) -> nn.Module:
    if how == "cpu":
        cpu_offload(model, execution_device=CPU)
    elif how == "disk":
        disk_offload(model, str(tmp_path / "weights"), execution_device=CPU)
    else:
        places = {"up": "disk", "middle": "cpu", "down": "disk"}
        dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "weights"), force_hooks=True)
    return model


def offloaded(how: str, tmp_path) -> Net:
    model = offload(net(), how, tmp_path)
    assert model.up.weight.is_meta
    return model


def base_flags(model: nn.Module) -> dict[str, bool]:
    return {key: p.requires_grad for key, p in model.named_parameters() if ".adapters." not in key}


def held(path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Returns all that a file says, fingerprints included."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: raw(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 - not a mapping


@pytest.mark.parametrize("how", WAYS)
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


@pytest.mark.parametrize("how", WAYS)
def test_adapters_of_an_offloaded_model_get_the_same_gradients(how, tmp_path):
    x, wanted = torch.randn(2, 3, 6), adapted(net())
    model = adapted(offloaded(how, tmp_path))
    model(x).square().sum().backward()
    wanted(x).square().sum().backward()
    for one, other in zip(li.adapter_parameters(model).values(), li.adapter_parameters(wanted).values(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", WAYS)
def test_training_leaves_the_base_frozen_and_gets_the_same_losses(how, tmp_path):
    """accelerate copies `requires_grad` from what it reads of a module: that must be W, not W + delta."""
    x, wanted, model = torch.randn(2, 3, 6), adapted(net()), adapted(offloaded(how, tmp_path))
    assert steps(model, x, 3) == pytest.approx(steps(wanted, x, 3), rel=1e-5)
    assert not any(base_flags(model).values())
    assert all(p.grad is None for key, p in model.named_parameters() if ".adapters." not in key)
    hooks = [model.up._hf_hook, model.down._hf_hook]
    li.uninject(model)
    assert all(base_flags(model).values())
    assert not any({"pre_forward", "post_forward"} & hook.__dict__.keys() for hook in hooks)
    remove_hook_from_submodules(model)
    assert {key: t.tolist() for key, t in model.state_dict().items()} == {
        key: t.tolist() for key, t in net().state_dict().items()
    }


@pytest.mark.parametrize("how", WAYS)
def test_files_cross_between_offloaded_and_plain_models(how, tmp_path):
    x, model, plain = torch.randn(2, 3, 6), adapted(offloaded(how, tmp_path)), adapted(net())
    one, other = li.export(model, tmp_path / "one"), li.export(plain, tmp_path / "other")
    assert held(one) == held(other), "the fingerprint knows the weights that are elsewhere"
    fresh = offloaded(how, tmp_path)
    li.load(fresh, other)
    assert torch.allclose(fresh(x), plain(x), atol=1e-6)
    strange = net()
    with torch.no_grad():
        strange.down.weight.add_(1)
    with pytest.raises(li.MismatchError, match="1 of 3 sites differ"):
        li.load(offload(strange, how, tmp_path / "strange"), other)
    assert not list(li.adapters(strange))


@pytest.mark.parametrize("how", WAYS)
def test_offloading_after_injection_takes_the_base_and_leaves_the_adapters(how, tmp_path):
    x, wanted = torch.randn(2, 3, 6), adapted(net())
    model = offload(adapted(net()), how, tmp_path)
    mine = li.adapter_parameters(model)
    assert model.up._parameters["weight"].is_meta
    assert all(p.device == CPU and p.requires_grad for p in mine.values()) and not any(base_flags(model).values())
    assert torch.allclose(model(x), wanted(x), atol=1e-6)
    assert steps(model, x, 3) == pytest.approx(steps(wanted, x, 3), rel=1e-5)
    assert all(mine[key] is p for key, p in li.adapter_parameters(model).items()), "no forward replaces A or B"
    assert not any(base_flags(model).values())
    assert held(li.export(model, tmp_path / "a"))[0] == held(li.export(wanted, tmp_path / "b"))[0]
    li.uninject(model)
    assert all(base_flags(model).values())
    with torch.no_grad():
        assert torch.equal(model(x), net()(x))
    remove_hook_from_submodules(model)
    assert_same({"values": snapshot(net())["values"]}, model)


@pytest.mark.parametrize("tool", [cpu_offload, disk_offload])
def test_a_hook_that_holds_a_whole_subtree(tool, tmp_path):
    """`preload_module_classes` puts one hook on the attention, which then brings `out_proj` along."""

    def attention() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, batch_first=True)})

    def with_adapters(model: nn.ModuleDict) -> nn.ModuleDict:
        li.inject(model, "attention", rank=2, seed=0)
        fill(model)
        return model

    x, wanted, model = torch.randn(2, 3, 4), with_adapters(attention()), attention()
    folder = () if tool is cpu_offload else (str(tmp_path / "weights"),)
    tool(model, *folder, execution_device=CPU, preload_module_classes=["MultiheadAttention"])
    assert not hasattr(model["attention"].out_proj, "_hf_hook")
    with_adapters(model)
    mine = li.adapter_parameters(model)
    assert {p.device for p in mine.values()} == {CPU} and len(mine) == 4

    def losses(model: nn.ModuleDict) -> list[float]:
        optimizer = torch.optim.SGD(li.adapter_parameters(model).values(), lr=0.1)
        found = []
        for _ in range(3):
            loss = model["attention"](x, x, x)[0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(model) == pytest.approx(losses(wanted), rel=1e-5)
    assert all(mine[key] is p for key, p in li.adapter_parameters(model).items())
    assert list(dict(model["attention"].named_modules())) == list(dict(wanted["attention"].named_modules()))
    assert not any(base_flags(model).values())
    one, other = li.export(model, tmp_path / "a"), li.export(wanted, tmp_path / "b")
    assert held(one)[0] == held(other)[0]
    li.load(attention(), one)
    li.uninject(model)
    remove_hook_from_submodules(model)
    assert_same({"values": snapshot(attention())["values"]}, model)


def test_a_weight_without_numbers_anywhere_cannot_be_recognised(tmp_path):
    model = adapted(net())
    model.up._parameters["weight"] = nn.Parameter(model.up._parameters["weight"].to("meta"), requires_grad=False)
    with pytest.raises(li.StateError, match=r"up\.weight is on the meta device.*load its weights"):
        li.export(model, tmp_path / "a")


def test_a_copy_of_an_offloaded_model_has_hooks_of_its_own(tmp_path):
    import copy

    x, model = torch.randn(2, 3, 6), adapted(offloaded("cpu", tmp_path))
    assert torch.allclose(copy.deepcopy(model.up)(x), model.up(x), atol=1e-6)


@pytest.mark.parametrize("how", WAYS)
def test_weights_that_are_elsewhere_cannot_be_merged_into(how, tmp_path):
    model = adapted(offloaded(how, tmp_path))
    with pytest.raises(li.UnsupportedError, match=r"up\.weight is on the meta device.*load the weights first"):
        li.merge(model)
    assert not any(ref.adapter.merged for ref in li.adapters(model))


@pytest.mark.parametrize("how", WAYS)
def test_verify_finds_them_alive_and_merges_nothing(how, tmp_path):
    model = offloaded(how, tmp_path)
    li.inject(model, TARGETS, rank=2)
    report = li.verify(model, torch.randn(2, 3, 6))
    assert report.ok and report.merge_error is None and len(report.verdicts) == 3, str(report)
