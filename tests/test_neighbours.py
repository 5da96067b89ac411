"""Other tools that change modules, and parents that read weights directly: each works or is refused beforehand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from models import TOKENS, fill, steps, text
from snapshot import assert_same, raw, snapshot
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrize

import lora_inject as li


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    file = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted(targets="*", **options):
    model = text().eval()
    li.inject(model, targets, rank=2, seed=0, **options)
    fill(model)
    return model


def test_ddp(one_process):
    model, plain = adapted(), adapted()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert steps(wrapped, TOKENS, 3) == steps(plain, TOKENS, 3)
    assert next(li.adapters(wrapped)).path == "module.embed"
    assert {k: raw(v) for k, v in model.state_dict().items()} == {k: raw(v) for k, v in plain.state_dict().items()}


@pytest.mark.parametrize("each_host", [False, True])
def test_inject_then_fully_shard(one_process, each_host):
    """fully_shard reads every parameter as an attribute: it must get W, or it would shard and train W + delta."""
    plain, model = adapted(["up", "down"]), adapted(["up", "down"])
    wanted = steps(plain, TOKENS, 2)
    mesh = dist.init_device_mesh("cpu", (1,))
    for part in (model.up, model.down) if each_host else ():
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    assert steps(model, TOKENS, 2) == pytest.approx(wanted, rel=1e-5)
    assert torch.allclose(model(TOKENS), plain(TOKENS), atol=1e-6)
    assert {k for k, p in model.named_parameters() if p.requires_grad} == set(li.adapter_parameters(model))
    base = text().state_dict()
    assert all(torch.equal(model.state_dict()[key].full_tensor(), value) for key, value in base.items())
    if each_host:
        with pytest.raises(li.StateError, match=r"up.*last in, first out"):
            li.uninject(model)


def test_what_is_sharded_already_is_refused(one_process):
    model = text()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(li.UnsupportedError, match=r"up.*DTensor.*inject first"):
        li.inject(model, "up")
    assert list(li.adapters(model)) == []


class Doubling(ModelHook):
    """A hook that changes what goes in and comes out, so that skipping it would show."""

    def pre_forward(self, module, *args, **kwargs):
        return tuple(2 * x for x in args), kwargs

    def post_forward(self, module, output):
        return output + 1


def exact(layer, x, adapter):
    weight = layer._parameters["weight"] + adapter.lora_B @ adapter.lora_A
    return 2 * x @ weight.T + layer._parameters["bias"] + 1


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_block_is_adapted_where_a_hook_has_been(when):
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    model, plain = nn.ModuleDict({"layer": layer}), layer(x)
    block = li.Target("layer", adapter="block", in_features=4, out_features=4)
    add_hook_to_module(layer, Doubling())
    if when == "before":
        remove_hook_from_module(layer)
    li.inject(model, block, rank=2, name="a")
    if when == "between":
        remove_hook_from_module(layer)
    li.inject(model, block, rank=2, name="b")
    wanted = plain.double()
    for ref in li.adapters(model):
        nn.init.normal_(ref.adapter.lora_B)
        wanted = wanted + x.double() @ ref.adapter.lora_A.double().T @ ref.adapter.lora_B.double().T
    assert (layer(x) - wanted).abs().max() < 1e-5
    assert torch.equal(copy.deepcopy(model)["layer"](x), layer(x))
    li.uninject(model)
    assert type(layer) is nn.Linear and torch.equal(layer(x), plain)


@pytest.mark.parametrize("hook_first", [True, False])
@pytest.mark.parametrize("hook_leaves_first", [True, False])
def test_accelerate_hooks_in_any_order(hook_first, hook_leaves_first):
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    model = nn.ModuleDict({"layer": layer})
    plain = layer(x)
    if hook_first:
        add_hook_to_module(layer, Doubling())
    li.inject(model, "layer", rank=2)
    if not hook_first:
        add_hook_to_module(layer, Doubling())
    fill(model)
    adapter = layer.adapters["default"]
    assert torch.allclose(layer(x), exact(layer, x, adapter), atol=1e-5)
    with li.disabled(model):
        assert torch.allclose(layer(x), 2 * x @ layer.weight.T + layer.bias + 1, atol=1e-5)
    if hook_leaves_first:
        remove_hook_from_module(layer)
        weight = layer._parameters["weight"] + adapter.lora_B @ adapter.lora_A
        assert torch.allclose(layer(x), x @ weight.T + layer._parameters["bias"], atol=1e-5)
        li.uninject(model)
    else:
        li.uninject(model)
        assert torch.allclose(layer(x), 2 * x @ layer.weight.T + layer.bias + 1, atol=1e-5)
        remove_hook_from_module(layer)
    assert type(layer) is nn.Linear and torch.equal(layer(x), plain)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), plain)


def test_a_forward_set_on_the_instance_is_called_and_kept():
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    layer.forward = lambda x: torch.tanh(nn.Linear.forward(layer, x))
    before, plain = snapshot(layer), layer(x)
    li.inject(layer, "", rank=2)
    assert torch.equal(layer(x), plain)
    fill(layer)
    adapter = layer.adapters["default"]
    weight = layer._parameters["weight"] + adapter.lora_B @ adapter.lora_A
    assert torch.allclose(layer(x), torch.tanh(x @ weight.T + layer._parameters["bias"]), atol=1e-5)
    wanted = layer(x)
    li.merge(layer)
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    li.uninject(layer)
    assert_same(before, layer)
    assert torch.equal(layer(x), plain)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("trained", [False, True])
def test_a_parametrization_on_top_is_refused_or_right_and_must_go_first(trained):
    """`register_parametrization` reads the weight, deletes it and keeps what it read: that must not be W + delta."""
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    before = dict(snapshot(layer)["values"])
    li.inject(layer, "", rank=2)
    if trained:
        fill(layer)
    adapter, w, b = layer.adapters["default"], layer._parameters["weight"], layer._parameters["bias"]
    injected = snapshot(layer)
    try:
        parametrize.register_parametrization(layer, "weight", Half())
    except li.LoraInjectError as refusal:
        assert "weight" in str(refusal) and "uninject" in str(refusal)
        assert_same(injected, layer)
    else:
        assert torch.allclose(layer(x), x @ (w / 2 + adapter.lora_B @ adapter.lora_A).T + b, atol=1e-5)
        with pytest.raises(li.StateError, match="last in, first out"):
            li.uninject(layer)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    li.uninject(layer)
    assert dict(snapshot(layer)["values"]) == before and type(layer) is nn.Linear


def test_a_reader_from_outside_gets_the_sum_and_the_parameter_when_nothing_acts():
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    li.inject(layer, "", rank=2, bias=True)
    fill(layer)
    adapter = layer.adapters["default"]
    read = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(read, layer(x), atol=1e-5)
    read.sum().backward()
    assert all(p.grad.any() for p in adapter.parameters()), "gradients flow through what was read"
    assert layer._parameters["weight"].grad is None
    with li.disabled(layer):
        assert layer.weight is layer._parameters["weight"]


def test_an_encoder_layer_in_eval_gives_the_adapted_output():
    """Its fast path reads the weights of its linears and never calls them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        plain = layer(x)
        li.inject(layer, ["linear1", "linear2"], rank=2)
        assert torch.allclose(layer(x), plain, atol=1e-6)
        fill(layer)
        w = {n: getattr(layer, n) for n in ("linear1", "linear2")}
        twin = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
        twin.load_state_dict({k: v for k, v in layer.state_dict().items() if "adapters" not in k})
        for name, host in w.items():
            adapter = host.adapters["default"]
            getattr(twin, name).weight += adapter.lora_B @ adapter.lora_A
        assert torch.allclose(layer(x), twin(x), atol=1e-5)
        assert not torch.allclose(layer(x), plain, atol=1e-3)
        li.uninject(layer)
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = adapted()
    with torch.autocast("cpu", dtype=dtype):
        found = model(TOKENS)
        wanted = copy.deepcopy(model)
        li.merge(wanted)
        merged = wanted(TOKENS)
    assert found.dtype == merged.dtype == dtype
    assert torch.allclose(found.float(), merged.float(), atol=0.1)
    found.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in li.adapter_parameters(model).values())


def test_activation_checkpoint_wrappers():
    plain, model = adapted("up"), text().eval()
    model.up = checkpoint_wrapper(model.up)
    li.inject(model, "up", rank=2, seed=0)
    fill(model)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert set(li.adapter_state(model)) == {"up.lora_A", "up.lora_B"}
    assert set(li.adapter_parameters(model)) <= set(model.state_dict())
    assert steps(model, TOKENS, 2) == steps(plain, TOKENS, 2)


def test_files_cross_wrappers(tmp_path):
    wrapped = text().eval()
    wrapped.up = torch.compile(wrapped.up, backend="eager")
    li.inject(wrapped, "up", rank=2)
    fill(wrapped)
    plain = text().eval()
    li.load(plain, li.export(wrapped, tmp_path / "a"))
    assert torch.equal(plain(TOKENS), wrapped(TOKENS))
    assert set(li.adapter_parameters(wrapped)) <= set(wrapped.state_dict())


def test_hooks_of_all_kinds_run_once_and_stay():
    layer, calls = nn.Linear(6, 5), []
    layer.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    layer.register_forward_hook(lambda m, args, out: calls.append("post"))
    layer.register_full_backward_hook(lambda m, gin, gout: calls.append("back"))
    before = snapshot(layer)
    li.inject(layer, "")
    layer.register_forward_hook(lambda m, args, out: 2 * out).remove()
    layer(torch.randn(2, 6, requires_grad=True)).sum().backward()
    assert calls == ["pre", "post", "back"]
    li.uninject(layer)
    assert_same(before, layer)


def test_a_dropped_input_is_the_low_rank_paths_alone():
    """A = B = identity makes the path the dropped input itself: each entry is 0 or x / (1 - p)."""
    layer, x = nn.Linear(50, 50).requires_grad_(False), torch.randn(40, 50)
    plain = layer(x)
    li.inject(layer, "", rank=50, alpha=50, dropout=0.25)
    adapter = layer.adapters["default"]
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(50))
        adapter.lora_B.copy_(torch.eye(50))
    path = layer.train()(x) - plain
    kept = path.abs() > 1e-4
    assert torch.allclose(path[kept], (x / 0.75)[kept], atol=1e-4)
    assert 0.70 < kept.float().mean() < 0.80
    assert torch.allclose(layer.eval()(x) - plain, x, atol=1e-4)


def test_scale_grad_by_freq_reaches_the_factor_of_each_token():
    table = nn.Embedding(7, 4, scale_grad_by_freq=True)
    index = torch.tensor([1, 1, 1, 2])
    li.inject(table, "", rank=2)
    fill(table)
    adapter, gout = table.adapters["default"], torch.randn(4, 4)
    table(index).backward(gout)
    full = gout @ adapter.lora_A.detach().T
    assert torch.allclose(adapter.lora_B.grad[1], full[:3].sum(0) / 3, atol=1e-6)
    assert torch.allclose(adapter.lora_B.grad[2], full[3], atol=1e-6)


def test_the_padding_row_never_moves():
    table = nn.Embedding(7, 4, padding_idx=2)
    plain = table(torch.tensor([2]))
    li.inject(table, "", rank=2, bias=True, freeze=False)
    optimizer = torch.optim.SGD(li.adapter_parameters(table).values(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (table(torch.arange(7)) - 1).square().sum().backward()
        optimizer.step()
    assert not table.adapters["default"].lora_B[2].any()
    assert torch.equal(table(torch.tensor([2])), plain)
    li.merge(table)
    assert torch.equal(table(torch.tensor([2])), plain)
