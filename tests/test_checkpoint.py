"""Merging on disk: bit-equal to merging in memory and saving, with the base's names, order, dtypes and files."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_inject as li
from lora_inject import rows
from lora_inject.checkpoint import merge_checkpoint
from lora_inject.checkpoint.patching import is_too_small

HALVES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Mixed(nn.Module):
    """A linear layer, convolutions, an embedding, a stack of matrices, and things that no adapter touches."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(37, 24)
        self.lin = nn.Linear(24, 41)
        self.conv = nn.Conv2d(6, 10, (3, 2), groups=2)
        self.up = nn.ConvTranspose1d(4, 6, 3)
        self.pair = nn.Bilinear(3, 4, 5)
        self.stack = nn.Parameter(torch.randn(3, 11, 7))
        self.norm = nn.LayerNorm(24)
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("flag", torch.tensor([True, False]))


def write(model, folder, shards=1):
    """Saves a state dict the way transformers does: one file, or several and an index."""
    folder.mkdir()
    state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt", "note": "kept"})
        return folder
    names = list(state)
    where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({n: state[n] for n in names if where[n] == file}, folder / file, {"format": "pt", "note": "kept"})
    size = sum(value.numel() * value.element_size() for value in state.values())
    index = {"metadata": {"total_size": size, "by": "test"}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def adapt(model, path, seed, targets=("table", "lin", "conv", "up", "pair", "stack"), **options):
    """Injects, fills both factors with noise, exports, and leaves the adapters in the model."""
    name = f"a{seed}"
    li.inject(model, list(targets), name=name, **{"rank": 3, "alpha": 5, "seed": seed} | options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in li.adapter_parameters(model, name).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return li.export(model, path, name)


def tensors(folder):
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def bits(value):
    return value.contiguous().view(torch.uint8) if value.dim() else value.reshape(1).view(torch.uint8)


def assert_bit_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        assert torch.equal(bits(found[key]), bits(value)), key


@pytest.mark.parametrize(("shards", "block"), [(1, 64), (3, 300), (3, 2**18)])
@pytest.mark.parametrize("dtype", HALVES)
def test_bit_equal_to_merging_in_memory(tmp_path, monkeypatch, dtype, shards, block):
    monkeypatch.setattr(rows, "BLOCK", block)
    model = Mixed().to(dtype)
    base = write(model, tmp_path / "base", shards)
    adapter = adapt(model, tmp_path / "a.safetensors", 1)
    report = merge_checkpoint(base, adapter, tmp_path / "out", threads=3)
    li.merge(model)
    li.uninject(model, keep_merged=True)
    assert_bit_equal(tensors(tmp_path / "out"), model.state_dict())
    assert report.status == "merged" and len(report) == 6


@pytest.mark.parametrize("dtype", HALVES)
def test_many_blocks_and_threads_with_numbers_that_every_order_sums_exactly(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(rows, "BLOCK", 50)
    model = Mixed().to(dtype)
    base = write(model, tmp_path / "base", 2)
    li.inject(model, ["table", "lin", "conv", "up", "pair", "stack"], rank=4, alpha=2, seed=0)
    for parameter in li.adapter_parameters(model).values():
        parameter.data.copy_(torch.randint(-3, 4, parameter.shape))
    merge_checkpoint(base, li.export(model, tmp_path / "a.safetensors"), tmp_path / "out", threads=4)
    monkeypatch.undo()
    li.merge(model)
    li.uninject(model, keep_merged=True)
    assert_bit_equal(tensors(tmp_path / "out"), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_values_are_those_of_a_sum_in_double_precision(tmp_path, dtype):
    torch.manual_seed(0)
    model = Mixed().to(dtype)
    base = write(model, tmp_path / "base")
    adapter = adapt(model, tmp_path / "a.safetensors", 1, ["lin"])
    merge_checkpoint(base, adapter, tmp_path / "out")
    factors = load_file(adapter)
    exact = model.lin._parameters["weight"].double()
    exact = exact + 5 / 3 * factors["lin.lora_B"].double() @ factors["lin.lora_A"].double()
    found = tensors(tmp_path / "out")["lin.weight"]
    step = torch.finfo(dtype).eps * exact.abs() + 1e-7
    assert ((found.double() - exact).abs() <= 0.51 * step + 3e-7).all()
    assert not torch.equal(found, model.lin._parameters["weight"])


@pytest.mark.parametrize("options", [{"bias": True}, {"dense": True, "rank": 64}, {"rslora": True}])
def test_options_of_the_adapters(tmp_path, options):
    model = Mixed()
    base = write(model, tmp_path / "base")
    adapter = adapt(model, tmp_path / "a.safetensors", 1, ["lin", "conv", "pair"], **options)
    merge_checkpoint(base, adapter, tmp_path / "out")
    li.merge(model)
    li.uninject(model, keep_merged=True)
    assert_bit_equal(tensors(tmp_path / "out"), model.state_dict())


def test_several_adapters_with_weights(tmp_path):
    model = Mixed().bfloat16()
    base = write(model, tmp_path / "base", 2)
    first = adapt(model, tmp_path / "a.safetensors", 1)
    second = adapt(model, tmp_path / "b.safetensors", 2, ["lin", "stack"], rank=4, alpha=None)
    merge_checkpoint(base, [f"{first}:0.7", f"{second}:-2"], tmp_path / "out")
    merge_checkpoint(base, [first, second], tmp_path / "same", weights=[0.7, -2])
    for ref in li.adapters(model):
        ref.adapter.scaling *= {"a1": 0.7, "a2": -2}[ref.name]
    li.merge(model)
    li.uninject(model, keep_merged=True)
    assert_bit_equal(tensors(tmp_path / "out"), model.state_dict())
    assert_bit_equal(tensors(tmp_path / "same"), model.state_dict())


def test_names_order_metadata_and_untouched_bytes_are_the_bases(tmp_path):
    model = Mixed()
    base = write(model, tmp_path / "base", 3)
    merge_checkpoint(base, adapt(model, tmp_path / "a.safetensors", 1, ["lin"]), tmp_path / "out")
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as old, safe_open(tmp_path / "out" / file.name, "pt") as new:
            assert new.metadata() == old.metadata()
            assert new.offset_keys() == old.offset_keys()
        old_bytes, new_bytes = file.read_bytes(), (tmp_path / "out" / file.name).read_bytes()
        head = 8 + int.from_bytes(old_bytes[:8], "little")
        assert new_bytes[:head] == old_bytes[:head]
    found = tensors(tmp_path / "out")
    before = model.state_dict()
    assert [key for key in found if not torch.equal(found[key], tensors(base)[key])] == ["lin.weight"]
    assert torch.equal(found["lin.bias"], before["lin.bias"])


def test_the_index_is_computed_and_its_other_metadata_kept(tmp_path):
    model = Mixed()
    base = write(model, tmp_path / "base", 2)
    merge_checkpoint(base, adapt(model, tmp_path / "a.safetensors", 1, ["lin"]), tmp_path / "out", dtype="float64")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = tensors(tmp_path / "out")
    assert index["metadata"] == {"total_size": sum(v.numel() * v.element_size() for v in found.values()), "by": "test"}
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]


def test_a_wider_dtype_keeps_what_the_stored_one_would_lose(tmp_path):
    model = Mixed().bfloat16()
    base = write(model, tmp_path / "base")
    adapter = adapt(model, tmp_path / "a.safetensors", 1, ["lin", "stack"], alpha=0.003)
    narrow = merge_checkpoint(base, adapter, tmp_path / "narrow")
    wide = merge_checkpoint(base, adapter, tmp_path / "wide", dtype=torch.float32)
    assert {row.path for row in narrow.lost} == {"lin.weight", "stack"} and "dtype='float32'" in str(narrow)
    assert not wide.lost and all(row.survives > 0.999 for row in wide.rows)
    found = tensors(tmp_path / "wide")
    for ref in li.adapters(model):
        name = ref.adapter.updates[0]
        key = ref.path if ref.adapter.parameter else f"{ref.path}.{name}"
        exact = ref.module._parameters[name].float() + ref.adapter.delta(ref.module)[name]
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key], exact.detach(), rtol=1e-6, atol=1e-7)
    assert found["table.weight"].dtype == torch.bfloat16


def test_a_missing_bias_is_created_beside_its_weight(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4))
    base = write(model, tmp_path / "base")
    merge_checkpoint(base, adapt(model, tmp_path / "a.safetensors", 1, ["0"], bias=True), tmp_path / "out")
    li.merge(model)
    li.uninject(model, keep_merged=True)
    assert_bit_equal(tensors(tmp_path / "out"), model.state_dict())
    (base / "config.json").write_text("{}")
    with pytest.raises(li.UnsupportedError, match="from_pretrained would drop"):
        merge_checkpoint(base, tmp_path / "a.safetensors", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_every_other_file_is_carried_and_other_copies_of_the_weights_stay(tmp_path):
    model = Mixed()
    base = write(model, tmp_path / "base")
    for name in ("tokenizer.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "README.md", "odd name.txt"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(os.urandom(100))
    (base / "empty").write_bytes(b"")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (base / name).write_bytes(b"old weights")
    os.symlink(base / "README.md", base / "link.md")
    report = merge_checkpoint(base, adapt(model, tmp_path / "a.safetensors", 1, ["lin"]), tmp_path / "out")
    out = tmp_path / "out"
    for name in ("tokenizer.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "README.md", "odd name.txt"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert (out / "empty").read_bytes() == b"" and (out / "link.md").read_bytes() == (base / "README.md").read_bytes()
    assert not (out / "link.md").is_symlink()
    assert set(report.plan.left) == {"pytorch_model.bin", "consolidated.safetensors", "model.gguf"}
    assert not any((out / name).exists() for name in report.plan.left)
    assert not (out / ".lora_inject_merge").exists()


def test_a_dry_run_says_everything_and_writes_nothing(tmp_path):
    model = Mixed()
    base = write(model, tmp_path / "base", 2)
    adapter = adapt(model, tmp_path / "a.safetensors", 1)
    report = merge_checkpoint(base, adapter, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists() and report.status == "planned"
    said = report.to_dict()["plan"]
    assert said["bytes"] == sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert {row["key"] for row in said["tensors"]} == {
        "table.weight", "lin.weight", "conv.weight", "up.weight", "pair.weight", "stack",
    }  # fmt: skip
    assert "lin.weight" in str(report) and "41 x 24" in str(report)
    json.dumps(said)


def test_the_report_is_written_beside_the_output(tmp_path):
    model = Mixed()
    base = write(model, tmp_path / "base")
    report = merge_checkpoint(base, adapt(model, tmp_path / "a.safetensors", 1, ["lin"]), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    given = json.loads(json.dumps(report.to_dict()))
    del written["plan"]["bytes_free"], given["plan"]["bytes_free"]
    assert written == given
    assert (tmp_path / "out" / "merge_report.txt").read_text() == f"{report}\n"
    (row,) = report.rows
    ref = next(li.adapters(model))
    weight, delta = ref.module._parameters["weight"].double(), ref.adapter.delta(ref.module)["weight"].detach().double()
    assert math.isclose(row.relative, float(delta.norm() / weight.norm()), rel_tol=1e-4) and row.survives > 0.999


def test_progress_counts_every_byte_once(tmp_path):
    model = Mixed()
    base = write(model, tmp_path / "base", 2)
    seen = []
    adapter = adapt(model, tmp_path / "a.safetensors", 1)
    merge_checkpoint(base, adapter, tmp_path / "out", progress=lambda *args: seen.append(args))
    done, totals, names = zip(*seen, strict=True)
    assert list(done) == sorted(done) and set(names) == {p.name for p in base.glob("*.safetensors")}
    assert set(totals) == {done[-1]} == {sum(path.stat().st_size for path in base.glob("*.safetensors"))}


def test_a_single_file_and_an_unmerged_second_merge(tmp_path):
    model = Mixed()
    base = write(model, tmp_path / "base")
    adapter = adapt(model, tmp_path / "a.safetensors", 1)
    merge_checkpoint(base / "model.safetensors", adapter, tmp_path / "out")
    merge_checkpoint(base, adapter, tmp_path / "other")
    assert_bit_equal(tensors(tmp_path / "out"), tensors(tmp_path / "other"))
    with pytest.raises(li.MismatchError, match=r"other base weights: 6 of 6 sites(.|\n)*merged into already"):
        merge_checkpoint(tmp_path / "out", adapter, tmp_path / "twice")
    merge_checkpoint(tmp_path / "out", adapter, tmp_path / "twice", check_base=False)
    assert not torch.equal(tensors(tmp_path / "twice")["lin.weight"], tensors(tmp_path / "out")["lin.weight"])


def test_what_does_not_fit_is_listed_with_the_nearest_names(tmp_path):
    model = Mixed()
    adapter = adapt(model, tmp_path / "a.safetensors", 1, ["lin", "conv"])
    other = nn.Module()
    other.line, other.conv = nn.Linear(24, 41), nn.Conv2d(6, 10, 3)
    base = write(other, tmp_path / "base")
    with pytest.raises(li.MismatchError, match=r"no weight for 1 of 2 sites:\n  lin \(nearest: line"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    other.lin = nn.Linear(23, 41)
    with pytest.raises(li.MismatchError, match=r"2 tensors do not fit(.|\n)*lin.lora_A: shape \(3, 24\)"):
        merge_checkpoint(write(other, tmp_path / "more"), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)


class Whole(nn.Module):
    """A body and a layer that is named as one of the body's."""

    def __init__(self, body):
        super().__init__()
        self.model, self.first = body, nn.Linear(6, 6)


def test_adapters_with_and_without_the_prefix_add_up(tmp_path):
    body = Body()
    base = write(body, tmp_path / "base")
    whole = nn.ModuleDict({"model": Body()})
    whole["model"].load_state_dict(body.state_dict())
    files = [adapt(whole, tmp_path / "a", 1, "*"), adapt(body, tmp_path / "b", 2, "*")]
    for order in (files, files[::-1]):
        out = tmp_path / "-".join(file.name for file in order)
        merge_checkpoint(base, order, out)
        found = tensors(out)
        for name in ("first", "second"):
            wanted = tensors(base)[f"{name}.weight"].double()
            for file, prefix in ((files[0], "model."), (files[1], "")):
                pair = load_file(file)
                wanted += 5 / 3 * pair[f"{prefix}{name}.lora_B"].double() @ pair[f"{prefix}{name}.lora_A"].double()
            assert (found[f"{name}.weight"].double() - wanted).abs().max() < 1e-6


def test_two_sites_never_end_in_one_weight(tmp_path):
    whole = Whole(Body())
    base = write(whole.model, tmp_path / "base")
    adapter = adapt(whole, tmp_path / "a", 1, "*")
    with pytest.raises(li.MismatchError, match=r"model\.first and first both lead to first\.weight"):
        merge_checkpoint(base, adapter, tmp_path / "out", check_base=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_adapters_that_are_not_finite_leave_nothing_behind(tmp_path, poison):
    model = Mixed()
    base = write(model, tmp_path / "base")
    adapter = adapt(model, tmp_path / "a.safetensors", 1, ["lin"])
    broken = load_file(adapter)
    broken["lin.lora_B"][0, 0] = poison
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata()
    save_file(broken, adapter, metadata)
    with pytest.raises(li.FormatError, match=r"NaN or infinity in 1 tensors"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sum_that_overflows_the_stored_dtype_is_refused(tmp_path):
    model = Mixed().half()
    base = write(model, tmp_path / "base")
    adapter = adapt(model, tmp_path / "a.safetensors", 1, ["lin"])
    with pytest.raises(li.StateError, match=r"lin.weight: \d+ merged elements .* not finite in torch.float16"):
        merge_checkpoint(base, f"{adapter}:1e7", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_checkpoint(base, f"{adapter}:1e7", tmp_path / "out", dtype="float32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [0.9, 1.1])
def test_an_update_overflows_from_half_the_last_distance_on(tmp_path, dtype, share):
    """The largest number stays below it and becomes infinite above it, where the bound has to let the sum be seen."""
    known = torch.finfo(dtype)
    model = Mixed().to(dtype)
    model.lin.weight.data[3, 4] = known.max
    base = write(model, tmp_path / "base")
    li.inject(model, ["lin"], rank=1, alpha=1, dtype=torch.float32)
    adapter = model.lin.adapters["default"]
    adapter.lora_A.data.zero_()[0, 4] = known.max
    adapter.lora_B.data.zero_()[3, 0] = share * known.eps / 4
    file = li.export(model, tmp_path / "a.safetensors")
    if share > 1:
        with pytest.raises(li.StateError, match=r"lin.weight: 1 merged elements .* not finite"):
            merge_checkpoint(base, file, tmp_path / "out")
        return
    merge_checkpoint(base, file, tmp_path / "out")
    assert tensors(tmp_path / "out")["lin.weight"][3, 4] == known.max


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_updates_up_to_the_limit_leave_the_largest_number_finite(dtype):
    known = torch.finfo(dtype)
    value = torch.tensor([known.max, -known.max], dtype=dtype)
    limit = known.max * known.eps / 8
    assert is_too_small(limit, value, value)
    assert not is_too_small(limit * 1.001, value, value)
    assert not is_too_small(math.nan, value, value)
    other = torch.float16 if dtype != torch.float16 else torch.float32
    assert not is_too_small(0.0, value, torch.empty(2, dtype=other)), "rounding itself may overflow there"
    assert not is_too_small(0.0, None, value)
    sums = value.to(torch.promote_types(dtype, torch.float32)) + torch.tensor([limit, -limit], dtype=torch.float64)
    assert torch.equal(sums.to(dtype), value)


def test_infinities_of_the_base_are_its_own(tmp_path):
    model = Mixed()
    model.lin.weight.data[3, 4] = -math.inf
    base = write(model, tmp_path / "base")
    merge_checkpoint(base, adapt(model, tmp_path / "a.safetensors", 1, ["lin"]), tmp_path / "out")
    assert tensors(tmp_path / "out")["lin.weight"][3, 4] == -math.inf


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_and_carried_where_no_adapter_reaches(tmp_path, dtype):
    model = Mixed()
    adapter = adapt(model, tmp_path / "a.safetensors", 1, ["lin"])
    base = tmp_path / "base"
    base.mkdir()
    state = {"lin.weight": torch.zeros(41, 24).to(dtype), "x": torch.ones(3).to(dtype)}
    save_file(state, base / "model.safetensors")
    with pytest.raises(li.UnsupportedError, match="nothing can be merged"):
        merge_checkpoint(base, adapter, tmp_path / "out", check_base=False)
    state["lin.weight"] = model.lin._parameters["weight"].detach()
    save_file(state, base / "model.safetensors")
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_bit_equal({"x": tensors(tmp_path / "out")["x"]}, {"x": state["x"]})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weights": [1.0, 2.0]}, li.ConfigError, "2 weights for 1 adapters"),
        ({"weights": [math.nan]}, li.ConfigError, "must be a finite number"),
        ({"threads": 0}, li.ConfigError, "threads=0"),
        ({"dtype": "int8"}, li.ConfigError, "dtype='int8'"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, options, error, words):
    model = Mixed()
    base = write(model, tmp_path / "base")
    adapter = adapt(model, tmp_path / "a.safetensors", 1, ["lin"])
    with pytest.raises(error, match=words):
        merge_checkpoint(base, adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_output_that_is_or_holds_or_lies_in_the_base(tmp_path):
    model = Mixed()
    base = write(model, tmp_path / "base")
    adapter = adapt(model, tmp_path / "a.safetensors", 1, ["lin"])
    for out in (base, tmp_path, base / "inside"):
        with pytest.raises(li.StateError, match="read and written at once"):
            merge_checkpoint(base, adapter, out, overwrite=True)


PEAK = """
import sys, torch, lora_inject
from lora_inject.checkpoint import merge_checkpoint
def peak():
    return int(next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1]) * 1024
before = peak()
merge_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_does_not_grow_with_the_checkpoint(tmp_path):
    peaks = []
    for count in (16, 64):
        model = nn.Sequential(*[nn.Linear(1024, 2048, bias=False) for _ in range(count)]).to(torch.bfloat16)
        base = write(model, tmp_path / f"base{count}")
        adapter = adapt(model, tmp_path / f"{count}.safetensors", 1, ["*"])
        arguments = [str(base), str(adapter), str(tmp_path / f"out{count}")]
        done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    small, large = peaks
    assert large < 600e6 and large - small < 16e6, peaks
