"""Inject and uninject on whole models: atomic, without a trace, with every flag where it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from models import TOKENS, fill, picture, steps, text
from snapshot import assert_same, raw, snapshot, values
from torch import nn

import lora_inject as li


@pytest.mark.parametrize("targets", ["*", ["up", "down"], "head", ["embed", "head"]])
def test_a_tied_model_is_what_it_was(targets):
    model = text()
    before = snapshot(model)
    li.inject(model, targets, rank=2, bias=True)
    assert model.head._parameters["weight"] is model.embed._parameters["weight"]
    fill(model)
    model(TOKENS)
    li.uninject(model)
    assert_same(before, model)
    assert model.head.weight is model.embed.weight


def test_identity_isinstance_keys_and_lists_stay_while_injected():
    model = picture()
    keys, ids = list(model.state_dict()), {path: id(m) for path, m in model.named_modules()}
    li.inject(model, "*", rank=2)
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    assert {path: id(m) for path, m in model.named_modules() if "adapters" not in path} == ids
    assert isinstance(model.mix, nn.Linear) and isinstance(model.stem, nn.Conv2d)
    assert model.mix is model.again is model.plain[0]
    assert len(list(li.adapters(model))) == 3, "the shared module is one host"
    assert {f"mix.adapters.default.lora_{x}" for x in "AB"} <= set(model.state_dict())
    assert (model.stem.stride, model.stem.kernel_size, model.mix.in_features) == ((1, 1), (3, 3), 4)


def test_the_state_dict_has_the_base_as_it_is_and_the_adapters_by_name():
    model = text()
    before = values(model)
    li.inject(model, "*", rank=2, name="a")
    fill(model)
    state = values(model)
    assert {k: v for k, v in state.items() if ".adapters." not in k} == before
    assert set(li.adapter_parameters(model)) == set(state) - set(before)
    assert set(li.adapter_state(model, "a")) == {k.replace(".adapters.a", "") for k in set(state) - set(before)}


def test_a_base_state_dict_loads_into_an_injected_model():
    model, other = text(), text()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    li.inject(model, "*", rank=2)
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert unexpected == [] and set(missing) == set(li.adapter_parameters(model))
    assert torch.equal(model(TOKENS), other(TOKENS))


def test_freezing_touches_everything_but_adapters_and_is_taken_back():
    model = text()
    model.up.weight.requires_grad_(False)
    before = snapshot(model)
    li.inject(model, "up", name="a")
    li.inject(model, "down", name="b", freeze=False)
    mine = li.adapter_parameters(model)
    assert {k for k, p in model.named_parameters() if p.requires_grad} == set(mine)
    li.uninject(model, "a")
    assert not any(p.requires_grad for k, p in model.named_parameters() if ".adapters." not in k)
    li.uninject(model, "b")
    assert_same(before, model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_and_lazy_neighbours_are_frozen_and_train_again():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "s": torch.jit.script(nn.Linear(4, 4)), "z": nn.LazyLinear(2)})
    model["s"].bias.requires_grad_(False)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    li.inject(model, "a", rank=2)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".adapters." not in key)
    x = model["s"](model["a"](torch.randn(3, 4)))
    # It gets its shape while it is frozen.
    model["z"](x).sum().backward()
    assert model["z"].weight.shape == (2, 4) and not model["z"].weight.requires_grad
    li.uninject(model)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert not any("_lora_inject_frozen" in module.__dict__ for module in model.modules())


def test_without_freeze_the_base_trains_on():
    model = text()
    li.inject(model, "*", freeze=False)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_flags_come_back_after_a_copy_too(copied):
    model = text()
    model.norm.requires_grad_(False)
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    li.inject(model, "up")
    twin = copied(model)
    li.uninject(twin)
    assert {k: p.requires_grad for k, p in twin.named_parameters()} == flags
    assert twin.head.weight is twin.embed.weight
    assert not any(p.requires_grad for k, p in model.named_parameters() if ".adapters." not in k)


def test_adapters_take_over_the_training_flag_of_their_module():
    model = text()
    model.up.eval()
    li.inject(model, "*", dropout=0.5)
    assert not model.up.adapters["default"].training and model.down.adapters["default"].training


@pytest.mark.parametrize(
    ("dtype", "asked", "wanted"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_the_dtype_of_adapters(dtype, asked, wanted):
    model = text(dtype=dtype)
    li.inject(model, "*", dtype=asked)
    assert {p.dtype for p in li.adapter_parameters(model).values()} == {wanted}
    fill(model)
    assert model(TOKENS).dtype == dtype


def test_a_seed_gives_the_same_numbers_whatever_the_order_and_leaves_the_global_generator_alone():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            made = text()
            for name in ("head", "down", "up", "embed"):
                self.add_module(name, getattr(made, name))

    one, two = text(), Backwards()
    state = torch.get_rng_state()
    li.inject(one, "*", seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    li.inject(two, ["down", "up"], seed=5)
    for key, parameter in li.adapter_parameters(two).items():
        assert raw(parameter) == raw(li.adapter_parameters(one)[key])
    a = [raw(p) for k, p in li.adapter_parameters(one).items() if k.endswith("lora_A")]
    assert len(set(a)) == len(a), "every site draws numbers of its own"
    li.inject(one, "*", seed=6, name="other")
    assert raw(one.up.adapters["other"].lora_A) != raw(one.up.adapters["default"].lora_A)


def test_without_a_seed_the_global_generator_decides():
    drawn = []
    for seed in (1, 1, 2):
        model = text()
        torch.manual_seed(seed)
        li.inject(model, "*")
        drawn.append(raw(model.up.adapters["default"].lora_A))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_inits(init):
    layer = nn.Linear(400, 300)
    li.inject(layer, "", rank=20, init=init, seed=1)
    a, b = layer.adapters["default"].lora_A.detach(), layer.adapters["default"].lora_B.detach()
    assert a.shape == (20, 400) and b.shape == (300, 20) and not b.any()
    if init == "kaiming":
        # kaiming-uniform with a = sqrt(5): bound sqrt(6 / (1 + 5) / fan_in), hence std bound / sqrt(3).
        assert a.abs().max() <= 1 / 20
        assert a.std() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)
    elif init == "gaussian":
        assert a.std() == pytest.approx(1 / 20, rel=0.05)
    else:
        assert torch.allclose(a @ a.T, torch.eye(20), atol=1e-5)


def test_several_names_add_up():
    base, both = nn.Linear(6, 5).double(), []
    x = torch.randn(3, 6, dtype=torch.float64)
    li.inject(base, "", rank=2, alpha=4, name="a", seed=1)
    li.inject(base, "", rank=3, alpha=3, name="b", seed=2)
    fill(base)
    for name, s in (("a", 2.0), ("b", 1.0)):
        adapter = base.adapters[name]
        both.append(s * adapter.lora_B @ adapter.lora_A)
    w = base._parameters["weight"]
    assert torch.allclose(base(x), x @ (w + both[0] + both[1]).T + base.bias, rtol=1e-12)
    li.uninject(base, "a")
    assert torch.allclose(base(x), x @ (w + both[1]).T + base.bias, rtol=1e-12)
    assert [ref.name for ref in li.adapters(base)] == ["b"]


def test_detaching_keeps_the_weights_of_the_adapter():
    model = nn.Linear(4, 4)
    li.inject(model, "")
    fill(model)
    (ref,) = li.adapters(model)
    kept = {k: p.clone() for k, p in ref.adapter.named_parameters()}
    li.uninject(model)
    assert all(torch.equal(p, kept[k]) for k, p in ref.adapter.named_parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda m, n: li.uninject(m, n),
        lambda m, n: li.merge(m, n),
        lambda m, n: li.adapter_state(m, n),
        lambda m, n: li.adapter_parameters(m, n),
        lambda m, n: li.activate(m, n),
        lambda m, n: li.disabled(m, n).__enter__(),
        lambda m, n: li.scaled(m, 2.0, n).__enter__(),
        lambda m, n: li.export(m, "never-written.safetensors", n),
    ],
)
def test_an_unknown_name_is_named_by_every_call(call):
    model = text()
    with pytest.raises(li.StateError, match=r"inject|no adapter"):
        call(model, "style")
    li.inject(model, "up", name="style")
    before = snapshot(model)
    with pytest.raises(li.StateError, match=r"styel.*style"):
        call(model, "styel")
    assert_same(before, model)


def test_uninject_without_adapters_is_an_error():
    with pytest.raises(li.StateError, match="inject"):
        li.uninject(text())


def test_nothing_is_left_alive_after_uninject():
    model = text()
    li.inject(model, "*")
    (first, *_) = li.adapters(model)
    gone, cls = weakref.ref(first.adapter), weakref.ref(type(model.norm))
    del first
    steps(model, TOKENS)
    li.uninject(model)
    gc.collect()
    assert gone() is None and cls() is nn.LayerNorm


def test_one_class_per_base_class():
    model = text()
    li.inject(model, ["up", "down"])
    assert type(model.up) is type(model.down) is not nn.Linear
    assert type(model.up).__name__ == "AdaptedLinear"


def test_a_whole_model_goes_through_a_file_by_torch_save():
    model, buffer = text(), io.BytesIO()
    li.inject(model, "*")
    fill(model)
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(TOKENS), model(TOKENS))
    assert [(r.path, r.name) for r in li.adapters(twin)] == [(r.path, r.name) for r in li.adapters(model)]


def test_training_moves_the_adapters_and_nothing_else():
    model = picture().train()
    li.inject(model, ["mix", "out", "stem"], rank=2, dropout=0.1, seed=0)
    bytes_before = {k: raw(p) for k, p in model.named_parameters()}
    losses = steps(model, torch.randn(8, 3, 6, 6), 5)
    moved = {k for k, p in model.named_parameters() if raw(p) != bytes_before[k]}
    assert moved == set(li.adapter_parameters(model))
    assert losses[-1] < losses[0]
