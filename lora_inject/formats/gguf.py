"""llama.cpp's format: one GGUF file of pairs by the names of its tensors, and one alpha for all of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError, MismatchError, UnsupportedError, listing
from ..safewrite import write_whole
from .bundle import Bundle, Source
from .content import Content
from .experts import experts_of
from .factors import Factors
from .format import Format
from .gguf_file import Q8_0, GgufFile, read_gguf, read_tensors
from .gguf_names import EMBEDDING, Names, gguf_names, gguf_package
from .pairs import Suffixes, paired, rank_of
from .refusals import matrices_of, refuse
from .resolve import Parsed, resolve
from .rotary import to_halves, to_pairs
from .sizes import check_sizes
from .uniform import common, rescaled

SUFFIXES = Suffixes(".lora_a", ".lora_b", {"_norm.weight": "a norm that was trained as a whole"})
ALPHA = "adapter.lora.alpha"


class Gguf(Format):
    """`<tensor>.lora_a` (rank, in) and `.lora_b` (out, rank), stacks of experts, the token embedding's A transposed."""

    name = "gguf"

    def recognises(self, content: Content) -> bool:
        return content.magic == b"GGUF"

    def read(self, content: Content, model: nn.Module | None) -> Source:
        file = read_gguf(content.file)
        alpha = _alpha(file)
        stems = paired(file.tensors, SUFFIXES, file.path)
        names = gguf_names(model, file.path)
        _check_owner(file, stems, names)
        _check_ranks(file, stems, names)
        check_sizes({name: entry.shape for name, entry in file.tensors.items()}, model, file.path)
        tensors = read_tensors(file, file.tensors)
        plain: list[Factors] = []
        stacks: dict[str, dict[str, Factors]] = defaultdict(dict)
        for stem in stems:
            one = _factors(stem, tensors, alpha, names)
            if one.parameter is None:
                plain.append(one)
            else:
                stacks[one.path][one.parameter] = one
        experts = [
            one
            for path, own in stacks.items()
            for one in experts_of(names.text.modules[path], path).join(own, file.path)
        ]
        small = any(tensor.kind == Q8_0 for tensor in file.tensors.values())
        notes = ("tensors of type Q8_0 are read as float32",) if small else ()
        return resolve(Parsed(path=file.path, factors=[*plain, *experts], notes=notes), model)

    def write_sites(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        factors, names = matrices_of(bundle, "llama.cpp"), gguf_names(model, bundle.path)
        refuse(bundle.path, "llama.cpp", [line for one in factors if (line := _problem(one, names))])
        factors = [part for one in factors for part in _stacks(one, names)]
        missing = [f"{one.path}: llama.cpp has no tensor for it" for one in factors if names.theirs(one.path) is None]
        refuse(bundle.path, "llama.cpp", missing)
        alpha, factors = _one_alpha(factors, bundle.path)
        tensors: dict[str, Tensor] = {}
        for one in factors:
            stem = str(names.theirs(one.path))
            heads = names.heads(stem)
            tensors[stem + SUFFIXES.a] = one.a.t() if stem == EMBEDDING else one.a
            tensors[stem + SUFFIXES.b] = one.b if heads is None else to_pairs(one.b, heads, one.path)
        return write_whole(path, lambda beside: _write(beside, names.architecture, alpha, tensors))


def _alpha(file: GgufFile) -> float:
    """Returns the alpha of an adapter, 0 where llama.cpp would take 0, which there means a scale of 1."""
    kinds = [file.fields.get(key) for key in ("general.type", "adapter.type")]
    if kinds != ["adapter", "lora"]:
        raise FormatError(
            f"{file.path}: general.type {str(kinds[0])[:40]!r}, adapter.type {str(kinds[1])[:40]!r}: not a LoRA, which "
            "has 'adapter' and 'lora' there"
        )
    if "adapter.alora.invocation_tokens" in file.fields:
        raise UnsupportedError(
            f"{file.path}: adapter.alora.invocation_tokens: an adapter that acts behind certain tokens alone has no "
            "counterpart in lora_inject"
        )
    alpha = file.fields.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise FormatError(f"{file.path}: {ALPHA}: must be a finite float, is {str(alpha)[:40]}")
    return alpha


def _check_owner(file: GgufFile, stems: Iterable[str], names: Names) -> None:
    """Checks that the adapter is for the model's architecture and for tensors that it has."""
    architecture = file.fields.get("general.architecture")
    if architecture != names.architecture:
        raise MismatchError(
            f"{file.path}: made for the architecture {str(architecture)[:40]!r}, and the model, a {names.text.family}, "
            f"is {names.architecture!r} in GGUF"
        )
    strangers = [stem for stem in stems if stem not in names.ours]
    if strangers:
        raise MismatchError(f"{file.path}: the model has no tensors of these names:\n{listing(strangers)}")


def _check_ranks(file: GgufFile, stems: Iterable[str], names: Names) -> None:
    for stem in stems:
        a, b = (file.tensors[stem + suffix].shape for suffix in (SUFFIXES.a, SUFFIXES.b))
        inner = (-1, -1) if stem == EMBEDDING else (-2, -1)
        rank_of(stem, a, b, file.path, inner=inner, axes=3 if names.stacked(stem) else 2)


def _factors(stem: str, tensors: Mapping[str, Tensor], alpha: float, names: Names) -> Factors:
    path, heads = names.ours[stem], names.heads(stem)
    a, b = tensors[stem + SUFFIXES.a], tensors[stem + SUFFIXES.b]
    stacked = names.stacked(stem)
    if stacked:
        path, _, piece = path.rpartition(".")
    one = Factors(
        path=path,
        a=a.t() if stem == EMBEDDING else a,
        b=b if heads is None else to_halves(b, heads, stem),
        alpha=alpha,
        kind="embedding" if stem == EMBEDDING else "linear",
        parameter=piece if stacked else None,
    )
    return replace(one, alpha=alpha or float(one.rank))


def _problem(one: Factors, names: Names) -> str:
    """Returns why a site cannot go into the file, "" where it can."""
    if torch.float64 in (one.a.dtype, one.b.dtype):
        return f"{one.site}: float64, which llama.cpp does not compute in"
    if names.tied and one.path in (names.text.embedding, names.text.head):
        return f"{one.site}: llama.cpp uses one matrix as embedding and output layer, and takes no adapter for that"
    if one.path not in names.text.modules:
        return f"{one.site}: the model has no such module"
    if one.parameter is None and one.kind != "embedding" and not isinstance(names.text.modules[one.path], nn.Linear):
        return f"{one.site}: no linear layer"
    return ""


def _stacks(one: Factors, names: Names) -> list[Factors]:
    """Returns the updates of the stacks of experts, from that of a packed parameter; a plain update as it is."""
    if one.parameter is None:
        return [one]
    parts = experts_of(names.text.modules[one.path], one.path).split(one)
    return [replace(part, path=f"{one.path}.{name}") for name, part in parts.items()]


def _one_alpha(factors: list[Factors], where: Path) -> tuple[float, list[Factors]]:
    """Returns an alpha that float32 holds, and the same updates scaled by it over their own rank.

    An alpha that float32 does not hold is rounded to it; other differences go into B.
    """
    alphas = [float(torch.tensor(one.scaling * one.rank, dtype=torch.float32)) for one in factors]
    alpha = common(alphas)
    if not 2.0**-126 <= alpha < math.inf:
        raise UnsupportedError(f"{where}: alpha {alpha} is beyond float32, in which GGUF stores it")
    return alpha, [
        replace(one, alpha=alpha, rslora=False) if own == alpha else rescaled(one, alpha / one.rank)
        for one, own in zip(factors, alphas, strict=True)
    ]


def _write(path: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    gguf: Any = gguf_package()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(ALPHA, alpha)
    for name, tensor in tensors.items():
        data, bfloat = tensor.detach().cpu().contiguous(), tensor.dtype == torch.bfloat16
        if bfloat:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, data.view(torch.uint8).numpy(), raw_dtype=kind)
        else:
            writer.add_tensor(name, data.numpy())
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
