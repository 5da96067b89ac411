"""The contract of an adapter, design section 6, points 6 to 9: what it leaves behind, copies, files, failures."""

from __future__ import annotations

import copy
import errno
import io
import os
import pickle

import pytest
import torch
from contract import every, flat, in_float32, injected, outputs, parameters64, quiet, same, train
from safetensors import safe_open
from snapshot import assert_same, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint
from variant import map_floats

import lora_inject as li

pytestmark = quiet


@every
def test_6_uninject_leaves_no_trace(variant, dtype):
    model = variant.thawed(dtype)
    host = model.get_submodule(variant.at)
    host.register_forward_hook(lambda *args: None)
    host.register_full_backward_pre_hook(lambda *args: None)
    next(host.parameters()).requires_grad_(False)
    host.eval()
    before, wanted = snapshot(model), outputs(model, variant.x(dtype))
    variant.inject(model)
    train(model)
    li.uninject(model)
    assert_same(before, model)
    assert same(outputs(model, variant.x(dtype)), wanted)


@every
def test_7_a_file_carries_the_adapter_to_a_fresh_base(variant, dtype, tmp_path):
    model, x = injected(variant, dtype), variant.x(dtype)
    wanted = outputs(model, x)
    path = li.export(model, tmp_path / "adapter.safetensors")
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {f"{variant.path}.{key}" for key in parameters64(model)}
    fresh = variant.model(dtype).eval()
    li.load(fresh, path)
    assert same(outputs(fresh, x), wanted)


def copies(variant, model):
    """Returns a copy by every way there is; where Python cannot pickle the base, it says the same of the host."""
    if not variant.pickles:
        for one in (variant.model(torch.float32), model):
            for way in (pickle.dumps, lambda one: torch.save(one, io.BytesIO())):
                with pytest.raises(AttributeError, match=r"'functools\.partial' object has no attribute '__name__'"):
                    way(one)
        return [copy.deepcopy(model)]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]


@in_float32
def test_8_copies_and_pickles_carry_the_adapter(variant):
    model, x = injected(variant, torch.float32), variant.x(torch.float32)
    wanted = outputs(model, x)
    before = snapshot(variant.model(torch.float32).eval())
    for twin in copies(variant, model):
        assert same(outputs(twin, x), wanted)
        train(twin, seed=9)
        assert same(outputs(model, x), wanted), "the copy shares memory with the original"
        li.uninject(twin)
        assert snapshot(twin)["values"] == before["values"]
        assert type(twin.site) is type(variant.model(torch.float32).site)


@pytest.mark.parametrize("reentrant", [True, False])
@in_float32
def test_8_checkpointing_gives_the_same_gradients(variant, reentrant):
    model, x = injected(variant, torch.float32).train(), variant.x(torch.float32)
    x = map_floats(lambda t: t.requires_grad_(True), x)
    if reentrant and not any(t is not None and t.requires_grad for t in x):
        pytest.skip("reentrant checkpointing needs an input that has a gradient")

    def gradients(run):
        model.zero_grad()
        torch.manual_seed(5)
        out = flat(run(*x))[0]
        # Reentrant checkpointing runs without gradients first, where torch may round the output differently.
        (out * torch.linspace(1, 2, out.numel()).view_as(out)).sum().backward()
        found = {k: p.grad for k, p in li.adapter_parameters(model).items()}
        return {k: g.to_dense() if g.is_sparse else g for k, g in found.items()}

    wanted = gradients(model)
    found = gradients(lambda *x: checkpoint(model, *x, use_reentrant=reentrant))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@in_float32
def test_9_a_failure_leaves_everything_as_it_was(variant, tmp_path, monkeypatch):
    model, x = injected(variant, torch.float32), variant.x(torch.float32)
    path = li.export(model, tmp_path / "adapter.safetensors")
    old = path.read_bytes()
    before, wanted = snapshot(model), outputs(model, x)
    with (
        pytest.raises((RuntimeError, ValueError, TypeError, AssertionError)),
        li.scaled(model, 2.0),
        li.disabled(model),
        li.activate(model),
    ):
        model(torch.zeros(1, 1, 1, 1, 1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _disk_full)
        with pytest.raises(li.LoraInjectError, match=r"adapter\.safetensors.*No space left"):
            li.export(model, path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["adapter.safetensors"]
    with pytest.raises(li.LoraInjectError, match="site"):
        variant.inject(model)
    assert_same(before, model)
    assert same(outputs(model, x), wanted)
    with torch.no_grad():
        list(li.adapter_parameters(model).values())[-1].fill_(float("nan"))
    before = snapshot(model)
    with pytest.raises(li.LoraInjectError, match="site"):
        variant.merge(model)
    assert_same(before, model)


def _disk_full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_an_output_of_one_pixel_keeps_its_strides(kind, trained):
    """A matrix product picks its kernel by the strides of what it reads, and so do the bits behind such a layer."""
    torch.manual_seed(0)
    side = 2 if kind is nn.Conv2d else 1
    base = kind(8, 6, side).double().to(memory_format=torch.channels_last).requires_grad_(False)
    side = 2 if kind is nn.Conv2d else 1
    x = torch.randn(3, side, side, 8, dtype=torch.float64).permute(0, 3, 1, 2)
    model = nn.Sequential(copy.deepcopy(base), nn.Flatten(2))
    li.inject(model, "0", rank=2, seed=0)
    adapter = next(iter(li.adapters(model))).adapter
    if trained:
        nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(1))
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            assert model[0](x).stride() == base(x).stride()
    delta = next(iter(adapter.delta(model[0]).values()))
    reference = torch.func.functional_call(base, {"weight": base.weight + delta}, x)
    torch.testing.assert_close(model[0](x), reference)
    wanted = torch.autograd.grad(reference.square().sum(), [adapter.lora_A, adapter.lora_B])
    found = torch.autograd.grad(model(x).square().sum(), [adapter.lora_A, adapter.lora_B])
    torch.testing.assert_close(found, wanted)
