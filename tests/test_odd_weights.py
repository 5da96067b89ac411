"""Parameters that are no ordinary matrices of floats: refused while planning with what to do, or listed as skipped."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from snapshot import raw
from test_quantized import MAKERS, WIDTH, bytes_of, inputs
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import lora_inject as li

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
QUANTIZED = r"its weight is quantized \({}\).*select the linear layer itself"
ASKED = ["full", "parameter"]


class Holding(nn.Module):
    """Reads one parameter of its own."""

    def __init__(self, make: Callable[[], nn.Parameter]) -> None:
        super().__init__()
        self.held = make()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.held.to(x.dtype))


def one(dtype: torch.dtype) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.zeros(4, 4, dtype=torch.float32).to(dtype), requires_grad=False)


@pytest.mark.parametrize("adapter", ASKED)
@pytest.mark.parametrize("name", MAKERS)
def test_a_quantized_weight_itself_is_refused_and_its_layer_is_not(name, adapter):
    model = MAKERS[name]()
    x, before = inputs(model), bytes_of(model)
    kind = type(model[0].weight).__name__
    with pytest.raises(li.UnsupportedError, match=r"0\.weight " + r"[\s\S]*" + QUANTIZED.format(kind)):
        li.inject(model, li.Target("0.weight", adapter=adapter))
    assert bytes_of(model) == before and not list(li.adapters(model))
    li.inject(model, "0", rank=2)
    assert model(x).shape[-1] == 32


@pytest.mark.parametrize("name", ["torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4"])
def test_a_quantized_layer_asked_to_train_as_a_whole_trains_its_bias_and_says_that_it_skips_the_weight(name):
    model = MAKERS[name]()
    plan = li.inject(model, li.Target("0", adapter="full"))
    assert [site.path for site in plan] == ["0.bias"]
    (skipped,) = plan.skipped
    assert skipped.path == "0.weight" and "is quantized" in skipped.why and "quantized" in str(plan)
    x = inputs(model)
    with torch.no_grad():
        wanted = model[0](x) + 2
        next(iter(li.adapter_parameters(model).values())).fill_(2.0)
        assert torch.allclose(model[0](x), wanted, atol=1e-4)


def test_quantized_weights_of_other_modules_are_refused():
    model = nn.Sequential(nn.Embedding(WIDTH, WIDTH))
    config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, config, filter_fn=lambda module, path: isinstance(module, nn.Embedding))
    wanted = model(torch.arange(4))
    with pytest.raises(li.UnsupportedError, match=QUANTIZED.format("IntxUnpackedToInt8Tensor") + ".*dequantize"):
        li.inject(model, "0")
    assert torch.equal(model(torch.arange(4)), wanted)
    with pytest.raises(li.UnsupportedError, match=QUANTIZED.format("Int8Tensor")):
        li.inject(Holding(lambda: MAKERS["torchao-int8"]()[0].weight), "held")


@pytest.mark.parametrize("pattern", ["held", "*"])
@pytest.mark.parametrize("adapter", [None, *ASKED])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.complex64])
def test_a_parameter_of_no_floats_is_refused_by_name_and_skipped_by_a_glob(dtype, adapter, pattern):
    model = nn.Sequential(Holding(one(dtype)), nn.Linear(4, 4))
    before = raw(torch.view_as_real(model[0].held) if dtype.is_complex else model[0].held)
    wish = {} if adapter is None else {"adapter": adapter}
    if pattern == "held":
        with pytest.raises(li.UnsupportedError, match=rf"0\.held .*dtype {str(dtype)[6:]}.*dequantize it, or exclude"):
            li.inject(model, li.Target("0.held", **wish))
        assert not list(li.adapters(model))
    else:
        also = r"1\.weight" if adapter == "parameter" else "1"
        plan = li.inject(model, li.Target(rf"re:.*held|{also}", **wish))
        skipped = {skip.path: skip.why for skip in plan.skipped}
        assert "0.held" in skipped and f"dtype {str(dtype)[6:]}" in skipped["0.held"]
    assert raw(torch.view_as_real(model[0].held) if dtype.is_complex else model[0].held) == before


@pytest.mark.parametrize("adapter", [None, *ASKED])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_refused_because_their_scales_are_elsewhere(dtype, adapter):
    wish = {} if adapter is None else {"adapter": adapter}
    with pytest.raises(li.UnsupportedError, match=r"held .*dtype float8.*codes of numbers: dequantize"):
        li.inject(Holding(one(dtype)), li.Target("held", **wish))
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = one(dtype)()
    with pytest.raises(li.UnsupportedError, match=r"0 \(Linear\).*dtype float8"):
        li.inject(nn.Sequential(layer), "0")


@pytest.mark.parametrize("adapter", [None, *ASKED])
def test_a_parameter_without_a_shape_is_refused_until_the_model_has_run(adapter):
    wish = {} if adapter is None else {"adapter": adapter}
    model = Holding(nn.parameter.UninitializedParameter)
    with pytest.raises(li.UnsupportedError, match=r"held .*no shape yet: run the model once"):
        li.inject(model, li.Target("held", **wish))
    with pytest.raises(li.UnsupportedError, match=r"0\.held .*no shape yet"):
        li.inject(nn.Sequential(model, nn.Linear(3, 3)), "*")
    lazy = nn.Sequential(nn.LazyLinear(4))
    path = "0" if adapter is None else "0.weight"
    with pytest.raises(li.UnsupportedError, match=r"0.* no shape yet: run the model once"):
        li.inject(lazy, li.Target(path, **wish))
    lazy(torch.randn(2, 3))
    assert [site.shape for site in li.inject(lazy, li.Target(path, **wish))] == [(4, 3)]


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2, 2)])
def test_a_parameter_of_other_axes_is_refused_and_told_what_will_do(shape):
    model = Holding(lambda: nn.Parameter(torch.zeros(shape)))
    with pytest.raises(li.UnsupportedError, match=rf'{len(shape)} axes.*adapter="full"\) trains it as a whole'):
        li.inject(model, "held")
    assert [site.shape for site in li.inject(model, li.Target("held", adapter="full"))] == [shape]


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_parameter_is_refused_for_every_kind_of_adapter(one_process):
    model = nn.Sequential(Holding(lambda: nn.Parameter(torch.zeros(4, 4))), nn.Linear(4, 4))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    block = {"adapter": "block", "in_features": 4, "out_features": 4}
    for pattern, wish in [
        ("0.held", {}),
        ("0.held", {"adapter": "full"}),
        ("1.bias", {"adapter": "full"}),
        ("1", block),
    ]:
        with pytest.raises(li.UnsupportedError, match=r"DTensor.*inject first, then call fully_shard"):
            li.inject(model, li.Target(pattern, **wish))
    assert not list(li.adapters(model))


@pytest.mark.parametrize("adapter", ASKED)
def test_a_parameter_on_the_meta_device_gets_an_adapter_there(adapter):
    model = Holding(lambda: nn.Parameter(torch.zeros(4, 4, device="meta")))
    li.inject(model, li.Target("held", adapter=adapter), rank=2)
    assert {p.device.type for p in li.adapter_parameters(model).values()} == {"meta"}
    assert model(torch.zeros(2, 4, device="meta")).shape == (2, 4)
    with pytest.raises(li.UnsupportedError, match=r"held is on the meta device.*load the weights first"):
        li.merge(model)


@pytest.mark.parametrize("name", ["torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4"])
def test_a_block_of_quantized_layers_gets_factors_in_a_dtype_of_numbers(name):
    model = nn.Sequential(MAKERS[name]())
    x, plain = inputs(model[0]), MAKERS[name]()
    sizes = {"in_features": WIDTH, "out_features": 32}
    li.inject(model, li.Target("0", adapter="block", **sizes), rank=2, alpha=6)
    p = {key.rpartition(".")[2]: value for key, value in li.adapter_parameters(model).items()}
    assert {value.dtype for value in p.values()} == {torch.float32}
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        p["lora_B"].normal_()
    path = 3 * x.double() @ p["lora_A"].double().T @ p["lora_B"].double().T
    assert torch.allclose(model(x).double(), plain(x).double() + path, atol=1e-3)


class Gated(nn.Linear):
    """A linear layer without a bias, and with a matrix in another dtype that is adapted first."""

    def __init__(self):
        super().__init__(4, 4, bias=False)
        self.gate = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) + (x.double() @ self.gate).to(x.dtype)


@pytest.mark.parametrize("gate_first", [True, False])
def test_a_bias_that_the_base_lacks_has_the_dtype_of_its_own_weight(gate_first):
    model, x = nn.Sequential(Gated()), torch.randn(3, 4)
    model[0].weight.requires_grad_(False)
    weight, gate = (p.detach().clone().double() for p in (model[0].weight, model[0].gate))
    gates = li.Target("0.gate", adapter="parameter")
    steps = [lambda: li.inject(model, gates, rank=2, name="gate"), lambda: li.inject(model, "0", rank=2, bias=True)]
    for step in steps if gate_first else steps[::-1]:
        step()
    for parameter in li.adapter_parameters(model).values():
        nn.init.normal_(parameter)
    found = {ref.name: ref.adapter for ref in li.adapters(model)}
    a, b, first, second = (value.double() for value in found["default"].parameters())
    gate = gate + found["gate"].lora_B @ found["gate"].lora_A
    wanted = x.double() @ (weight + b @ a).T + b @ first + second + x.double() @ gate
    assert model[0].bias.dtype == torch.float32
    assert (model(x) - wanted).abs().max() < 1e-5
    li.merge(model)
    assert model[0].bias.dtype == torch.float32 and not model[0].bias.requires_grad
    assert (model(x) - wanted).abs().max() < 1e-5
    li.uninject(model, keep_merged=True)
    assert model[0].bias.dtype == torch.float32 and not model[0].bias.requires_grad and model[0].gate.requires_grad
