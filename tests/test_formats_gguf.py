"""GGUF adapters: read by the gguf package's own reader, added by hand to the base, read back to the bit, and broken."""

from __future__ import annotations

import struct
import sys
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from causal_models import ATTENTION, MLP, PACKED, adapted, assert_bits, causal, changed, logits, state, turned

import lora_inject as li
from lora_inject.formats import read_adapter

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
HEADS = {"attn_q": 6, "attn_k": 2}
REORDERED = ("llama", "mistral", "mixtral")
FUSED = ["*.qkv_proj", "*.o_proj", "*.gate_up_proj", "*.down_proj", "lm_head", "*.embed_tokens"]
TARGETS = {
    "llama": [*ATTENTION, *MLP, "lm_head", "*.embed_tokens"],
    "mistral": [*ATTENTION, *MLP, "lm_head", "*.embed_tokens"],
    "qwen2": [*ATTENTION, *MLP, "lm_head", "*.embed_tokens"],
    "qwen3": [*ATTENTION, *MLP],
    "gemma": [*ATTENTION, *MLP],
    "gemma2": [*ATTENTION, *MLP],
    "phi3": FUSED,
    "mixtral": [*ATTENTION, *PACKED, "lm_head", "*.embed_tokens"],
    "qwen3_moe": [*ATTENTION, *PACKED, "lm_head"],
}
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}


def fields_of(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Returns what gguf's own reader finds, BF16 widened by its own function."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert list(data.shape) == [int(size) for size in reversed(tensor.shape)]
        tensors[tensor.name] = torch.from_numpy(numpy.array(data, dtype=numpy.float64))
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def by_llama_cpp(path: Path, family: str) -> dict[str, torch.Tensor]:
    """Returns what the adapter adds to transformers' parameters, from the file alone and as llama.cpp applies it."""
    fields, tensors = fields_of(path)
    found: dict[str, torch.Tensor] = {}
    for stem in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        a, b = tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"]
        scale = fields["adapter.lora.alpha"] / b.shape[-1] if fields["adapter.lora.alpha"] else 1.0
        if stem == "token_embd.weight":
            found["model.embed_tokens.weight"] = scale * a @ b.T
        elif stem == "output.weight":
            found["lm_head.weight"] = scale * b @ a
        else:
            _, layer, name, _ = stem.split(".")
            delta = scale * b @ a
            if family in REORDERED and name in HEADS:
                delta = turned(delta, HEADS[name])
            if family == "phi3" and name == "ffn_up":
                name = "mlp.gate_up_proj"
            end = "" if name.endswith("_exps") else ".weight"
            found[f"model.layers.{layer}.{NAMES.get(name, name) if 'mlp' not in name else name}{end}"] = delta
    for layer in range(2):
        stem = f"model.layers.{layer}."
        if f"{stem}ffn_gate_exps" in found:
            halves = [found.pop(f"{stem}ffn_{half}_exps") for half in ("gate", "up")]
            found[f"{stem}mlp.experts.gate_up_proj"] = torch.cat(halves, 1)
    return found


@pytest.mark.parametrize("family", TARGETS)
def test_llama_cpp_adds_what_the_adapter_adds(family, tmp_path):
    model = adapted(causal(family), TARGETS[family], alpha=6)
    path = li.export(model, tmp_path / "adapter.gguf", format="gguf")
    fields = fields_of(path)[0]
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == ARCHITECTURES.get(family, family)
    assert fields["adapter.lora.alpha"] == 6.0
    added = by_llama_cpp(path, family)
    assert len(added) == len(list(li.adapters(model)))
    # The models' norms, and the products of packed experts, are computed in float32 whatever the weights are.
    torch.testing.assert_close(logits(changed(causal(family), added)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", TARGETS)
def test_a_round_trip_keeps_every_bit(family, dtype, tmp_path):
    model = adapted(causal(family), TARGETS[family], dtype, alpha=6)
    path = li.export(model, tmp_path / "adapter.gguf", format="gguf")
    again = causal(family)
    li.load(again, path)
    assert_bits(state(model), state(again))
    assert {ref.adapter.config.scaling for ref in li.adapters(again)} == {1.5}
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == {{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]}
    assert li.export(again, tmp_path / "again", format="gguf").read_bytes() == path.read_bytes()


def test_the_names_and_shapes_are_llama_cpps(tmp_path):
    model = adapted(causal("mixtral"), ["*.k_proj", *PACKED, "*.embed_tokens"], rank=2)
    tensors = fields_of(li.export(model, tmp_path / "a.gguf", format="gguf"))[1]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items() if "blk.1." not in name} == {
        "token_embd.weight.lora_a": (29, 2),
        "token_embd.weight.lora_b": (24, 2),
        "blk.0.attn_k.weight.lora_a": (2, 24),
        "blk.0.attn_k.weight.lora_b": (8, 2),
        "blk.0.ffn_gate_exps.weight.lora_a": (3, 2, 24),
        "blk.0.ffn_gate_exps.weight.lora_b": (3, 20, 2),
        "blk.0.ffn_up_exps.weight.lora_a": (3, 2, 24),
        "blk.0.ffn_up_exps.weight.lora_b": (3, 20, 2),
        "blk.0.ffn_down_exps.weight.lora_a": (3, 2, 20),
        "blk.0.ffn_down_exps.weight.lora_b": (3, 24, 2),
    }


def test_reordering_matters(tmp_path):
    path = li.export(adapted(causal("llama"), ["*.q_proj"]), tmp_path / "a.gguf", format="gguf")
    plain, turned_ = by_llama_cpp(path, "qwen2"), by_llama_cpp(path, "llama")
    assert all((plain[name] - turned_[name]).abs().max() > 0.1 for name in plain)


def test_one_alpha_for_ranks_and_scales_that_differ(tmp_path):
    targets = [
        li.Target("*.q_proj", rank=4, alpha=8),
        li.Target("*.k_proj", rank=2, alpha=8),
        li.Target("*.v_proj", rank=8, alpha=32),
        li.Target("*.o_proj", rank=3, alpha=5),
    ]
    model = adapted(causal("llama"), targets, torch.bfloat16)
    path = li.export(model, tmp_path / "a.gguf", format="gguf")
    assert fields_of(path)[0]["adapter.lora.alpha"] == 8.0
    again = causal("llama")
    li.load(again, path)
    found = {ref.path: ref.adapter for ref in li.adapters(again)}
    for ref in li.adapters(model):
        one, other = ref.adapter, found[ref.path]
        wanted = (one.lora_B.double() @ one.lora_A.double() * one.config.scaling).detach()
        update = (other.lora_B.double() @ other.lora_A.double() * other.config.scaling).detach()
        exact = "o_proj" not in ref.path
        assert other.config.rank == one.config.rank
        assert other.lora_B.dtype == (torch.bfloat16 if exact else torch.float32)
        torch.testing.assert_close(update, wanted, rtol=0, atol=0.0 if exact else 1e-7 * float(wanted.abs().max()))


def test_an_alpha_that_float32_lacks_is_rounded_once(tmp_path):
    model = adapted(causal("llama"), ["*.q_proj"], rank=8, alpha=16, rslora=True)
    path = li.export(model, tmp_path / "a.gguf", format="gguf")
    again = causal("llama")
    li.load(again, path)
    assert_bits(state(model), state(again))
    (scaling,) = {ref.adapter.config.scaling for ref in li.adapters(again)}
    assert abs(scaling / (16 / 8**0.5) - 1) < 2**-24


def written(path: Path, tensors: dict[str, numpy.ndarray], alpha: float | None = 4.0, **fields: str) -> Path:
    """Writes a GGUF file by the gguf package alone."""
    values = {"general.type": "adapter", "adapter.type": "lora"} | {k.replace("_", "."): v for k, v in fields.items()}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    for name, value in values.items():
        writer.add_string(name, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        if tensor.dtype == numpy.uint8:
            writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(stem: str = "blk.0.attn_v.weight", inner: int = 24, outer: int = 8, rank: int = 2) -> dict[str, numpy.ndarray]:
    rng = numpy.random.default_rng(0)
    a = rng.standard_normal((rank, inner)).astype(numpy.float32)
    return {f"{stem}.lora_a": a, f"{stem}.lora_b": rng.standard_normal((outer, rank)).astype(numpy.float32)}


@pytest.mark.parametrize(("alpha", "scaling"), [(4.0, 2.0), (0.0, 1.0), (None, 1.0), (-3.0, 1.5)])
def test_alpha_0_means_scale_1(alpha, scaling, tmp_path):
    tensors, model = pair(), causal("llama")
    li.load(model, written(tmp_path / "a.gguf", tensors, alpha))
    (ref,) = li.adapters(model)
    sign = -1 if alpha is not None and alpha < 0 else 1
    assert ref.adapter.config.scaling == scaling
    assert torch.equal(ref.adapter.lora_B, sign * torch.from_numpy(tensors["blk.0.attn_v.weight.lora_b"]))


def test_q8_0_is_read_as_ggufs_own_reader_reads_it(tmp_path):
    tensors = pair("blk.0.ffn_down.weight", inner=64, outer=24, rank=32)
    packed = {name: gguf.quantize(tensor, gguf.GGMLQuantizationType.Q8_0) for name, tensor in tensors.items()}
    path = written(tmp_path / "a.gguf", packed)
    model = causal("llama", intermediate_size=64)
    li.load(model, path)
    (ref,) = li.adapters(model)
    found = fields_of(path)[1]
    for ours, theirs in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
        assert torch.equal(getattr(ref.adapter, ours).double(), found[f"blk.0.ffn_down.weight.{theirs}"])


@pytest.mark.parametrize(
    ("family", "targets", "options", "why"),
    [
        ("llama", ["*.q_proj"], {"bias": True}, "self_attn.q_proj: a bias"),
        ("llama", ["*.q_proj"], {"dtype": torch.float64}, "float64"),
        ("gpt_oss", ["*.q_proj"], {}, "family 'gpt_oss'"),
        ("mixtral", ["*.mlp.gate.weight"], {}, "a parameter without a module"),
        ("gemma2", ["lm_head"], {}, "lm_head: llama.cpp uses one matrix"),
        ("gemma", ["*.embed_tokens"], {}, "embed_tokens: llama.cpp uses one matrix"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_named(family, targets, options, why, tmp_path):
    model = adapted(causal(family), targets, **options)
    with pytest.raises(li.UnsupportedError, match=why):
        li.export(model, tmp_path / "a.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["lm_head", "*.embed_tokens"])
def test_tied_ends_are_refused(target, tmp_path):
    model = adapted(causal("qwen2", tie_word_embeddings=True), [target])
    with pytest.raises(li.UnsupportedError, match="uses one matrix"):
        li.export(model, tmp_path / "a.gguf", format="gguf")


def test_a_model_is_needed_and_the_gguf_package(tmp_path, monkeypatch):
    path = written(tmp_path / "a.gguf", pair())
    with pytest.raises(li.UnsupportedError, match="--model"):
        read_adapter(path, None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(li.LoraInjectError, match=r"pip install 'lora_inject\[gguf\]'"):
        li.load(causal("llama"), path)


NAN = {name: numpy.full_like(tensor, numpy.nan) for name, tensor in pair().items()}
READABLE = {
    "another architecture": (pair(), {"general_architecture": "qwen2"}, "architecture 'qwen2'"),
    "a model": (pair(), {"general_type": "model"}, "not a LoRA"),
    "another adapter": (pair(), {"adapter_type": "control_vector"}, "not a LoRA"),
    "a norm": (pair() | {"blk.0.attn_norm.weight": numpy.ones(24, numpy.float32)}, {}, "norm"),
    "a whole tensor": (pair() | {"output.weight": numpy.ones((29, 24), numpy.float32)}, {}, "no part of a pair"),
    "half": (dict(list(pair().items())[:1]), {}, "its other factor is missing"),
    "nothing": ({}, {}, "holds no adapter"),
    "NaN": (NAN, {}, "NaN or infinity"),
    "unknown tensor": (pair("blk.9.attn_v.weight"), {}, "no tensors of these names"),
    "path": (pair("../x"), {}, "no tensors of these names"),
    "other shape": (pair(inner=23), {}, "do not fit"),
    "other rank": (
        pair() | {"blk.0.attn_v.weight.lora_b": pair(rank=3)["blk.0.attn_v.weight.lora_b"]},
        {},
        "share a rank",
    ),
    "no heads": (pair("blk.0.attn_k.weight", outer=9), {}, "not 2 rotary heads"),
}


@pytest.mark.parametrize("case", READABLE)
def test_files_that_do_not_fit_are_refused_and_the_model_stays(case, tmp_path):
    tensors, fields, message = READABLE[case]
    path, model = written(tmp_path / "a.gguf", tensors, **fields), causal("llama")
    with pytest.raises(li.LoraInjectError, match=message):
        li.load(model, path)
    assert not list(li.adapters(model))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str = "x.lora_a", shape: tuple[int, ...] = (2, 2), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def file(*parts: bytes, tensors: int = 0, fields: int = 0, version: int = 3, data: int = 64) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)
    return header + bytes(-len(header) % 32) + bytes(data)


ARRAY = struct.pack("<IQ", 4, 2**60)
HOSTILE = {
    "tensor count": file(tensors=2**60),
    "field count": file(fields=2**60),
    "many tensors": file(tensors=2**16 + 1),
    "string length": file(struct.pack("<Q", 2**62), fields=1),
    "string length of 2^64": file(struct.pack("<Q", 2**64 - 1), fields=1),
    "value length": file(text("a") + struct.pack("<IQ", 8, 2**62), fields=1),
    "array length": file(field("a", 9, ARRAY), fields=1),
    "array of arrays": file(field("a", 9, struct.pack("<IQ", 9, 1) * 50), fields=1),
    "array of strings beyond the end": file(field("a", 9, struct.pack("<IQ", 8, 60000)), fields=1),
    "type of a value": file(field("a", 99, b""), fields=1),
    "no UTF-8": file(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 0), fields=1),
    "a field twice": file(field("a", 0, b"1") * 2, fields=2),
    "a tensor twice": file(info(), info(offset=32), tensors=2),
    "dims": file(text("x") + struct.pack("<I", 2**31), tensors=1),
    "no dims": file(info(shape=()), tensors=1),
    "five dims": file(info(shape=(1,) * 5), tensors=1),
    "sizes whose product overflows": file(info(shape=(2**32, 2**32, 2**32)), tensors=1),
    "size 0": file(info(shape=(2, 0)), tensors=1),
    "size beyond the file": file(info(shape=(2**18, 2**18)), tensors=1),
    "unknown type": file(info(kind=12345), tensors=1),
    "type of a codebook": file(info(kind=19), tensors=1),
    "blocks that do not fit": file(info(kind=8), tensors=1),
    "offset beyond the file": file(info(offset=2**63), tensors=1),
    "offset of 2^64 - 1": file(info(offset=2**64 - 1), tensors=1),
    "overlap": file(info(), info("x.lora_b", offset=0), tensors=2),
    "gap": file(info(), info("x.lora_b", offset=4096), tensors=2, data=8192),
    "longer than its tensors": file(info(), tensors=1, data=4096),
    "alignment 0": file(field("general.alignment", 4, bytes(4)), fields=1),
    "alignment of 3": file(field("general.alignment", 4, struct.pack("<I", 3)), fields=1),
    "alignment of text": file(field("general.alignment", 8, text("32")), fields=1),
    "alignment huge": file(field("general.alignment", 10, struct.pack("<Q", 2**40)), fields=1),
    "version 1": file(version=1),
    "other byte order": file(version=0x03000000),
    "empty": b"GGUF",
    "alpha of text": file(
        field("general.type", 8, text("adapter")),
        field("adapter.type", 8, text("lora")),
        field("adapter.lora.alpha", 8, text("1")),
        fields=3,
        data=0,
    ),
    "alpha not finite": file(
        field("general.type", 8, text("adapter")),
        field("adapter.type", 8, text("lora")),
        field("adapter.lora.alpha", 6, struct.pack("<f", float("inf"))),
        fields=3,
        data=0,
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_at_once(case, tmp_path):
    path, model = tmp_path / "a.gguf", causal("llama")
    path.write_bytes(HOSTILE[case])
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(li.FormatError if "type" not in case else li.LoraInjectError):
        li.load(model, path)
    took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 1 and peak < 50 * 2**20
    assert not list(li.adapters(model))


def test_a_rank_of_a_million_is_refused_before_it_is_read(tmp_path):
    """The file is as large as its header says, but sparse: reading it would take a gigabyte."""
    stem, rank, path = "blk.0.attn_v.weight.lora_", 2**23, tmp_path / "a.gguf"
    kinds = field("general.type", 8, text("adapter")) + field("adapter.type", 8, text("lora"))
    kinds += field("general.architecture", 8, text("llama"))
    infos = info(f"{stem}a", (24, rank)) + info(f"{stem}b", (rank, 8), offset=24 * rank * 4)
    header = file(kinds, infos, tensors=2, fields=3, data=0)
    path.write_bytes(header)
    with path.open("r+b") as opened:
        opened.truncate(len(header) + 32 * rank * 4)
    model, began = causal("llama"), time.process_time()
    tracemalloc.start()
    with pytest.raises(li.FormatError, match="a rank, or one beyond 65536"):
        li.load(model, path)
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20 and time.process_time() - began < 1
    tracemalloc.stop()


def test_a_header_full_of_strings_ends_in_time(tmp_path):
    """The slowest header that the limits let through."""
    strings = field("a", 9, struct.pack("<IQ", 8, 60000) + text("") * 60000)
    many = b"".join(strings.replace(text("a"), text(chr(97 + i)), 1) for i in range(17))
    path = tmp_path / "a.gguf"
    path.write_bytes(file(many, fields=17))
    assert len(many) > 8e6
    began = time.process_time()
    with pytest.raises(li.FormatError):
        li.load(causal("llama"), path)
    assert time.process_time() - began < 2


def test_every_truncation_is_refused(tmp_path):
    path = li.export(adapted(causal("llama"), ["*.0.*.q_proj"]), tmp_path / "a.gguf", format="gguf")
    whole, cut, model = path.read_bytes(), tmp_path / "cut.gguf", causal("llama")
    for length in [*range(4, 400), *range(400, len(whole) - 32, 97), len(whole) - 33]:
        cut.write_bytes(whole[:length])
        with pytest.raises(li.FormatError):
            li.load(model, cut)
    assert not list(li.adapters(model))
