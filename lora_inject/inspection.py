"""What is in an adapter file: sites, ranks, sizes, norms and the base, without a model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .adapter_file import SiteRecord
from .checkpoint.inputs import Input, read_source
from .config import dtype_name
from .errors import FormatError
from .formats import Source
from .inspected import Inspection, SiteSummary
from .report.base_norms import base_norms
from .report.spectra import core, spectrum_of
from .sites import join

BATCH = 256 * 2**20
"""Bytes of tensors that are held at a time."""


def inspect_adapter(
    path: str | os.PathLike[str],
    *,
    spectra: bool = False,
    base: str | os.PathLike[str] | None = None,
    check_base: bool = True,
) -> Inspection:
    """Returns what an adapter file holds; norms are computed in float64 from the factors, B A is never formed.

    Tensors that are missing or do not fit are told in the site's `problem`; the file is refused only where its header
    or its metadata cannot be understood.

    Args:
        path: an adapter of any known format.
        spectra: compute the singular values of every update too.
        base: the checkpoint that the adapter was trained on, a folder or a `.safetensors` file, to read the norms of
            its weights from.
        check_base: refuse a base that the adapter was not trained on.

    Raises:
        FormatError: the file or the base cannot be read, or the file is no adapter file.
        MismatchError: the base has none of the sites, or other weights.
    """
    file = read_source(path, base)
    shapes = {record.path: _base_shape(file, record) for record in file.sites.values()}
    norms = {} if base is None else base_norms(base, Input(file, 1.0), check_base)
    summaries = []
    for group in _batches(file):
        keys = {record.path: _keys(file, record) for record in group}
        tensors = file.read(key for own in keys.values() for key in own.values())
        for record in group:
            own = {name: tensors[key] for name, key in keys[record.path].items()}
            found = _summary(record, shapes[record.path], own, spectra)
            summaries.append(replace(found, norm_base=norms.get(record.path)))
    strays = sorted(join(site, key) for site, own in file.entries.items() if site not in file.sites for key in own)
    measured = None if base is None else str(base)
    return Inspection(str(path), file.name, file.program, file.size, tuple(summaries), tuple(strays), measured, spectra)


def _keys(file: Source, record: SiteRecord) -> dict[str, str]:
    """Returns the keys of a site's tensors in the file by the names of the parameters."""
    return {name: f"{record.prefix}{name}" for name in file.entries.get(record.path, {})}


def _batches(file: Source) -> Iterator[list[SiteRecord]]:
    """Yields the sites in groups whose tensors take about `BATCH` bytes, as each reading parses the header again."""
    group: list[SiteRecord] = []
    held = 0
    for record in file.sites.values():
        size = sum(math.prod(e.shape) * e.dtype.itemsize for e in file.entries.get(record.path, {}).values())
        if group and held + size > BATCH:
            yield group
            group, held = [], 0
        group.append(record)
        held += size
    yield group


def _summary(record: SiteRecord, shape: tuple[int, ...], tensors: Mapping[str, Tensor], spectra: bool) -> SiteSummary:
    config = record.config
    options = {name: getattr(config, name) for name in ("dropout", "bias", "rslora", "dense", "init", "factorization")}
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    problem = _problem(record, wide)
    update = None if problem else _update(record, wide)
    return SiteSummary(
        path=record.path,
        aliases=record.aliases,
        adapter=record.kind,
        shape=shape,
        rank=config.rank,
        alpha=config.alpha,
        scaling=config.scaling,
        options=options | dict(record.extras),
        dtype="+".join(sorted({dtype_name(tensor.dtype) for tensor in tensors.values()})),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        norm_a=_norm(wide.get("lora_A")),
        norm_b=_norm(wide.get("lora_B")),
        norm_delta=None if update is None else config.scaling * float(update.norm()),
        base=str(record.base["hash"] or "unknown"),
        problem=problem,
        spectrum=spectrum_of(update, config.scaling) if spectra and update is not None else None,
    )


def _base_shape(file: Source, record: SiteRecord) -> tuple[int, ...]:
    shape = record.base["shape"]
    if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
        raise FormatError(f"{file.path}: metadata: base.sites: shape of {record.path!r} is no list of sizes")
    return tuple(shape)


def _problem(record: SiteRecord, tensors: Mapping[str, Tensor]) -> str:
    """Says what keeps the update from being computed, or returns an empty string."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        return f"NaN or infinity in {', '.join(bad)}"
    if "lora_dense" in tensors:
        return ""
    missing = [name for name in ("lora_A", "lora_B") if name not in tensors]
    if missing:
        return f"{' and '.join(missing)} missing"
    a, b = tensors["lora_A"], tensors["lora_B"]
    if _matrices(record, a, b) is None:
        return f"A {tuple(a.shape)} and B {tuple(b.shape)} do not fit rank {record.config.rank}"
    return ""


def _norm(tensor: Tensor | None) -> float | None:
    return None if tensor is None else float(tensor.norm())


def _update(record: SiteRecord, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns what has the norm and the singular values of the update before scaling; the tensors have no problem."""
    if "lora_dense" in tensors:
        dense = tensors["lora_dense"]
        # Stacks of matrices are sites of a parameter; any other weight has its rows in front.
        stacked = record.kind == "parameter" and dense.dim() > 1
        return dense if stacked else dense.flatten(1) if dense.dim() > 1 else dense.reshape(-1, 1)
    matrices = _matrices(record, tensors["lora_A"], tensors["lora_B"])
    assert matrices is not None
    return core(*matrices)


def _matrices(record: SiteRecord, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns A as (..., rank, columns) and B as (..., rows, rank), or None where the shapes do not allow it.

    At the site of a parameter they are stored like that, with one leading axis for packed experts. At the site of a
    module A's first axis and B's second are the rank, and the kernel axes of convolutions follow either.
    """
    rank = record.config.rank
    if min(a.dim(), b.dim()) < 2:
        return None
    if "parameter" not in record.extras:
        fits = a.shape[0] == b.shape[1] == rank
        return (a.reshape(rank, -1), b.movedim(1, -1).reshape(-1, rank)) if fits else None
    fits = a.shape[-2] == b.shape[-1] == rank and a.shape[:-2] == b.shape[:-2]
    return (a, b) if fits else None
