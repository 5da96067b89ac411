"""Linear layers whose weight torchao or bitsandbytes has quantized, on the CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_submodules
from models import fill, steps
from snapshot import raw
from torch import Tensor, nn

import lora_inject as li
from lora_inject.quantized import stored_weight

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup, PerTensor

pytestmark = [
    pytest.mark.filterwarnings("ignore::lora_inject.RoundingWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
WIDTH, MIDDLE, OUT = 64, 128, 32


def plain() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(WIDTH, MIDDLE), nn.ReLU(), nn.Linear(MIDDLE, OUT, bias=False)).eval()


def by_torchao(config: object, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = plain().to(dtype)
        quantize_(model, config)
        return model

    return make


def by_bitsandbytes(kind: type, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = plain()
        for name in ("0", "2"):
            old = model.get_submodule(name)
            new = kind(old.in_features, old.out_features, bias=old.bias is not None, **options)
            new.load_state_dict(old.state_dict())
            # See test_a_weight_packed_for_a_kernel_in_bfloat16_is_read_and_left_as_it_is.
            new.support_avx512bf16_for_cpu = False
            model.set_submodule(name, new)
        return model.to("cpu").eval()

    return make


def int4(group: int | None = None, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    more = {} if group is None else {"granularity": PerGroup(group)}
    return by_torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, **more), dtype)


FOUR = {"compute_dtype": torch.float32}
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "torchao-int8": by_torchao(Int8WeightOnlyConfig()),
    "torchao-int8-tensor": by_torchao(Int8WeightOnlyConfig(granularity=PerTensor())),
    "torchao-int8-bfloat16": by_torchao(Int8WeightOnlyConfig(), torch.bfloat16),
    "torchao-int4": int4(),
    "torchao-int4-groups": int4(32),
    "bitsandbytes-int8": by_bitsandbytes(bitsandbytes.nn.Linear8bitLt, has_fp16_weights=False),
    "bitsandbytes-nf4": by_bitsandbytes(bitsandbytes.nn.Linear4bit, quant_type="nf4", **FOUR),
    "bitsandbytes-fp4-plain": by_bitsandbytes(
        bitsandbytes.nn.Linear4bit, quant_type="fp4", compress_statistics=False, **FOUR
    ),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def bytes_of(model: nn.Module) -> dict[str, list[bytes]]:
    """Returns every byte that holds a quantized weight."""
    return {name: [raw(part) for part in stored_weight(model.get_submodule(name)).parts()] for name in ("0", "2")}


def inputs(model: nn.Module) -> Tensor:
    dtype = model[0].bias.dtype
    return torch.randn(3, 5, WIDTH).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def identity_rows(model: nn.Module, name: str) -> Tensor:
    """Returns W in float64 as the library's own forward applies it: its output for the unit vectors, bias off."""
    module = model.get_submodule(name)
    dtype = torch.bfloat16 if module.weight.dtype == torch.bfloat16 else torch.float32
    with torch.no_grad():
        found = module(torch.eye(module.in_features, dtype=dtype)).double()
        zero = module(torch.zeros(1, module.in_features, dtype=dtype)).double()
    return (found - zero).T


def injected(make: Callable[[], nn.Module], **options: object) -> nn.Module:
    model = make()
    li.inject(model, ["0", "2"], rank=4, alpha=6, seed=0, **options)
    fill(model, size=0.2)
    return model


@every
def test_identity_at_injection_and_no_trace_afterwards(make):
    model = make()
    x = inputs(model)
    wanted, before = model(x), bytes_of(model)
    keys = list(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    objects = [(id(m), type(m)) for m in model.modules()] + [id(p) for p in model.parameters()]
    plan = li.inject(model, ["0", "2"], rank=4)
    assert [site.shape for site in plan] == [(MIDDLE, WIDTH), (OUT, MIDDLE)]
    assert {p.dtype for p in li.adapter_parameters(model).values()} == {torch.float32}
    assert torch.equal(model(x), wanted)
    fill(model)
    assert not torch.equal(model(x), wanted)
    with li.disabled(model):
        assert torch.equal(model(x), wanted)
    li.uninject(model)
    assert torch.equal(model(x), wanted) and bytes_of(model) == before and list(model.state_dict()) == keys
    assert [(id(m), type(m)) for m in model.modules()] + [id(p) for p in model.parameters()] == objects
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@every
@pytest.mark.parametrize("bias", [False, True])
def test_the_output_is_the_librarys_plus_the_low_rank_path(make, bias):
    model, base = injected(make, bias=bias), make()
    x = inputs(model)
    hidden = x
    for name in ("0", "2"):
        p = {
            key: value.detach().double()
            for key, value in model.get_submodule(name).adapters["default"].named_parameters()
        }
        rows = base.get_submodule(name)(hidden)
        inner = hidden.double() @ p["lora_A"].T + p.get("lora_A_bias", 0)
        wanted = rows.double() + 1.5 * (inner @ p["lora_B"].T + p.get("lora_B_bias", 0))
        found = model.get_submodule(name)(hidden)
        size = 0.02 if x.dtype == torch.bfloat16 else 1e-4
        assert torch.allclose(found.double(), wanted, rtol=size, atol=size)
        assert not torch.allclose(rows.double(), wanted, atol=10 * size)
        hidden = torch.relu(found).detach()
    assert li.verify(model, x).ok


@every
def test_training_moves_the_adapters_and_not_a_byte_of_the_base(make):
    model = make()
    x = inputs(model)
    model(x)
    before = bytes_of(model)
    li.inject(model, ["0", "2"], rank=4, dropout=0.1, seed=0)
    losses = steps(model.train(), x, 20)
    assert losses[-1] < losses[0]
    model(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in li.adapter_parameters(model).values())
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)
    assert bytes_of(model) == before


@every
def test_files_cross_between_quantized_models_and_to_the_plain_base(make, tmp_path):
    model = injected(make)
    x = inputs(model)
    path = li.export(model, tmp_path / "a.safetensors")
    fresh = make()
    li.load(fresh, path)
    assert torch.equal(fresh(x), model(x))
    wide = plain()
    with pytest.raises(li.MismatchError, match="2 of 2 sites differ"):
        li.load(wide, path)
    plan = li.load(wide, path, check_base=False)
    assert {site.adapter_class.kind for site in plan} == {"linear"}
    mine, theirs = li.adapter_state(model), li.adapter_state(wide)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    li.load(make(), li.export(wide, tmp_path / "b.safetensors"), check_base=False)


@every
def test_merging_is_refused_until_it_is_asked_for(make):
    model = injected(make)
    before = bytes_of(model)
    with pytest.raises(
        li.UnsupportedError, match=r"0\.weight is quantized.*requantize=True.*keep the adapter unmerged"
    ):
        li.merge(model)
    assert bytes_of(model) == before and not any(ref.adapter.merged for ref in li.adapters(model))


@every
@pytest.mark.parametrize("run_before", [False, True])
def test_merging_into_the_stored_format_tells_its_error_and_goes_back(make, run_before):
    model = injected(make)
    x = inputs(model)
    if run_before:
        model(x)
    twin = make()
    base = {name: identity_rows(twin, name) for name in ("0", "2")}
    wanted = {
        name: base[name] + model.get_submodule(name).adapters["default"].delta(model)["weight"].detach().double()
        for name in base
    }
    before = bytes_of(model)
    kept = {name: model.get_submodule(name)._parameters["weight"] for name in base}
    unmerged = model(x)
    for _ in range(2):
        report = li.merge(model, requantize=True)
        assert [row.path for row in report] == ["0.weight", "2.weight"] and all(row.requantized for row in report)
        assert "requantized" in str(report) and report.kept > 0
        assert type(model[0]._parameters["weight"]) is type(kept["0"])
        assert bytes_of(model) != before
        for name, row in zip(base, report, strict=True):
            stored = identity_rows(model, name)
            error = (stored - wanted[name]).abs().max()
            assert row.error == pytest.approx(float(error), rel=0.02, abs=2e-2 if x.dtype == torch.bfloat16 else 2e-4)
            assert row.error > 0
            assert error < (base[name] - wanted[name]).abs().max(), "most of the update is there"
        merged = model(x)
        assert not torch.equal(merged, unmerged)
        with li.disabled(model):
            assert torch.equal(model(x), twin(x))
        assert torch.equal(model(x), merged)
        li.unmerge(model)
        assert bytes_of(model) == before
        assert all(model.get_submodule(name)._parameters["weight"] is weight for name, weight in kept.items())
        assert torch.equal(model(x), unmerged)
    li.merge(model, requantize=True)
    li.uninject(model)
    assert bytes_of(model) == before and torch.equal(model(x), twin(x))


@every
def test_a_merge_that_fails_at_the_second_layer_takes_the_first_back(make):
    model = injected(make)
    x = inputs(model)
    wanted, before = model(x), bytes_of(model)
    with torch.no_grad():
        last = model[2].adapters["default"].lora_B
        old = last.clone()
        last[0, 0] = float("nan")
    with pytest.raises(li.StateError, match=r"2\.weight.*not finite"):
        li.merge(model, requantize=True)
    with torch.no_grad():
        last.copy_(old)
    assert bytes_of(model) == before and torch.equal(model(x), wanted)


@every
def test_merged_and_kept(make):
    model = injected(make)
    x = inputs(model)
    li.merge(model, requantize=True)
    merged = model(x)
    with pytest.raises(li.StateError, match=r"cannot be cast or moved.*unmerge"):
        model.to(torch.float64)
    li.uninject(model, keep_merged=True)
    assert torch.equal(model(x), merged) and next(li.adapters(model), None) is None


@every
def test_copies(make):
    model = injected(make)
    x = inputs(model)
    wanted = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), wanted)
    li.merge(twin, requantize=True)
    assert torch.equal(model(x), wanted)
    li.unmerge(twin)
    assert torch.equal(twin(x), wanted)


def test_a_reader_of_the_weight_is_found():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MAKERS["torchao-int8"]()[0]

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.inner.weight)

    model = Reader()
    li.inject(model, "inner", rank=2)
    report = li.verify(model, torch.randn(2, WIDTH))
    assert not report.ok and [v.path for v in report.dead] == ["inner"] and "not reached" in str(report)


def hooked(model: nn.Module) -> nn.Module:
    """Puts on every layer the hook that `device_map="auto"` puts there."""
    for name in ("0", "2"):
        add_hook_to_module(model.get_submodule(name), AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def runs(model: nn.Module, x: Tensor) -> bool:
    """Says whether accelerate brings the weights back by itself."""
    try:
        model(x)
    except NotImplementedError:
        return False
    return True


@every
@pytest.mark.parametrize("first", ["hook", "inject"])
def test_a_layer_with_a_hook_of_accelerate_does_what_one_without_does(make, first, tmp_path):
    model, twin = make(), injected(make)
    x = inputs(model)
    plain_output = model(x)
    if first == "hook":
        hooked(model)
    li.inject(model, ["0", "2"], rank=4, alpha=6, seed=0)
    if first == "inject":
        hooked(model)
    assert torch.equal(model(x), plain_output)
    fill(model, size=0.2)
    assert torch.equal(model(x), twin(x))
    with li.disabled(model):
        assert torch.equal(model(x), plain_output)
    assert steps(model, x, 3) == steps(twin, x, 3)
    one, other = li.export(model, tmp_path / "one"), li.export(twin, tmp_path / "other")
    assert one.read_bytes() == other.read_bytes()
    before, wanted = bytes_of(model), model(x)
    li.merge(model, requantize=True)
    li.merge(twin, requantize=True)
    assert torch.equal(model(x), twin(x)) and bytes_of(model) != before
    li.unmerge(model)
    assert torch.equal(model(x), wanted) and bytes_of(model) == before
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), wanted)
    li.uninject(model)
    assert torch.equal(model(x), plain_output)
    remove_hook_from_submodules(model)
    assert torch.equal(model(x), plain_output)
    assert {type(model[0]), type(model[2])} == {type(make()[0])}


def test_a_hook_that_goes_leaves_the_adapters_at_work():
    model, twin = hooked(MAKERS["torchao-int8"]()), injected(MAKERS["torchao-int8"])
    li.inject(model, ["0", "2"], rank=4, alpha=6, seed=0)
    fill(model, size=0.2)
    remove_hook_from_submodules(model)
    x = inputs(model)
    assert torch.equal(model(x), twin(x))
    li.uninject(model)
    assert torch.equal(model(x), MAKERS["torchao-int8"]()(x)) and "forward" not in model[0].__dict__


@every
def test_an_offloaded_layer_works_where_accelerate_brings_its_weight_back(make, tmp_path):
    """bitsandbytes' 4-bit weights come back without their scales, with or without adapters."""
    model, twin = make(), injected(make)
    x = inputs(model)
    wanted = twin(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    comes_back = runs(model, x)
    assert comes_back is (getattr(model[0], "quant_state", None) is None)
    li.inject(model, ["0", "2"], rank=4, alpha=6, seed=0)
    fill(model, size=0.2)
    if not comes_back:
        with pytest.raises(li.UnsupportedError, match=r"4 bits by bitsandbytes.*keep this layer on a device"):
            li.export(model, tmp_path / "one")
        assert not list(tmp_path.iterdir())
        return
    assert torch.equal(model(x), wanted)
    one, other = li.export(model, tmp_path / "one"), li.export(twin, tmp_path / "other")
    assert one.read_bytes() == other.read_bytes(), "the fingerprint knows the weights that are elsewhere"
    with pytest.raises(li.UnsupportedError, match=r"0\.weight is on the meta device"):
        li.merge(model, requantize=True)
    assert torch.equal(model(x), wanted)
    li.uninject(model)
    assert torch.equal(model(x), make()(x))


def test_a_forward_that_others_put_on_a_quantized_layer_is_refused():
    model = MAKERS["torchao-int8"]()
    model[0].forward = lambda x: nn.Linear.forward(model[0], x)
    with pytest.raises(li.UnsupportedError, match=r"0 .*quantized weight cannot act: take that forward away"):
        li.inject(model, "0")
    del model[0].forward
    add_hook_to_module(model[0], ModelHook())
    inner = model[0].forward
    model[0].forward = lambda x: inner(x)
    with pytest.raises(li.UnsupportedError, match=r"0 .*quantized weight cannot act: take that forward away"):
        li.inject(model, "0")


@pytest.mark.parametrize("order", [("pair", "whole"), ("whole", "pair")])
@pytest.mark.parametrize("name", ["torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4"])
def test_a_bias_trained_as_a_whole_leaves_the_low_rank_path_on(name, order):
    model, plain_one = MAKERS[name](), MAKERS[name]()
    targets = {"pair": "0", "whole": li.Target("0.bias", adapter="full")}
    for part in order:
        li.inject(model, targets[part], name=part, rank=2)
    fill(model)
    p = {key: value.detach().double() for key, value in li.adapter_parameters(model).items()}
    x = torch.randn(5, WIDTH)
    path = x.double() @ p["0.adapters.pair.lora_A"].T @ p["0.adapters.pair.lora_B"].T
    wanted = plain_one[0](x).detach().double()
    wanted = wanted + path + p["0.adapters.whole@bias.lora_dense"]
    assert torch.allclose(model[0](x).double(), wanted, rtol=1e-3, atol=1e-3)
    assert path.abs().max() > 0.05


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("name", ["bitsandbytes-nf4", "bitsandbytes-fp4-plain", "stored as bfloat16"])
def test_a_weight_packed_for_a_kernel_in_bfloat16_is_read_and_left_as_it_is(name, tmp_path):
    stored = by_bitsandbytes(bitsandbytes.nn.Linear4bit, quant_storage=torch.bfloat16, **FOUR)
    model = MAKERS.get(name, stored)()
    layers = [model.get_submodule(place) for place in ("0", "2")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    x = inputs(model)
    with torch.no_grad():
        wanted = model(x)
        assert all(layer.weight.quant_state.packing_format_for_cpu for layer in layers)
        for place, layer in zip(("0", "2"), layers, strict=True):
            rows = identity_rows(model, place)
            assert torch.allclose(stored_weight(layer).dequantized().double(), rows, rtol=2**-7, atol=1e-6)
        before = bytes_of(model)
        li.inject(model, ["0", "2"], rank=4, alpha=6, seed=0)
        assert torch.equal(model(x), wanted)
        fill(model, size=0.2)
        adapted = model(x)
        li.export(model, tmp_path / "a.safetensors")
        assert torch.equal(model(x), adapted) and not torch.equal(adapted, wanted)
        li.merge(model, requantize=True)
        merged = model(x)
        assert (merged - adapted).norm() < 0.3 * (adapted - wanted).norm()
        li.unmerge(model)
        assert torch.equal(model(x), adapted)
        li.uninject(model)
        assert torch.equal(model(x), wanted) and bytes_of(model) == before
        li.load(model, tmp_path / "a.safetensors")
        assert torch.equal(model(x), adapted)
