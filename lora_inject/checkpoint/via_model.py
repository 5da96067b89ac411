"""The way through transformers: load the model, merge in memory, save, for checkpoints that headers do not explain."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ..config import as_dtype, dtype_name
from ..errors import ConfigError, FormatError
from ..loading import load
from ..merge import MergeReport, merge
from ..models import load_pretrained
from ..refs import adapters
from ..surgery import uninject
from .base import read_base
from .carry import REPORTS, files_beside
from .changes import TIE
from .finish import carry
from .inputs import Input
from .journal import Journal
from .patching import Sample
from .plan import CheckpointPlan, check_place
from .report import CheckpointReport

SHARD = "5GB"
"""Size of the shards that are written where the base has several."""


def merge_via_model(
    base: str | os.PathLike[str],
    inputs: tuple[Input, ...],
    out: Path,
    dry_run: bool,
    overwrite: bool,
    check_base: bool,
    dtype: Any,
) -> CheckpointReport:
    """Writes the merged checkpoint by way of the model in memory; not resumed, but all or nothing like the other way.

    Raises:
        ConfigError: `dtype` with this way, which saves the model in its own dtype.
        FormatError: the base is no folder that transformers can load.
        LoraInjectError: whatever `load` and `merge` refuse.
    """
    if as_dtype(dtype) is not None:
        raise ConfigError(f"dtype={dtype_name(as_dtype(dtype))!r} cannot be combined with via_model=True")
    began = time.monotonic()
    read = read_base(base)
    if read.folder is None:
        raise FormatError(f"{base}: via_model=True needs the folder of a transformers model, not a single file")
    check_place(read, inputs, out)
    carried, left = files_beside(read)
    plan = CheckpointPlan(
        read, inputs, out, (), (), (), tuple(carried), tuple(left), None, "through transformers, in memory"
    )
    if dry_run:
        return CheckpointReport(plan)
    model: Any = load_pretrained(str(read.folder))
    merged = _merge(model, inputs, check_base)
    binding = "-".join(entry.file.stamp().hex()[-16:] for entry in inputs)
    journal = Journal(out, f"via-model-{time.time_ns()}-{binding}")
    try:
        journal.begin(overwrite)
        shard = SHARD if read.index is not None else "1000GB"
        model.save_pretrained(journal.files, max_shard_size=shard)
        report = CheckpointReport(plan, _rows(merged), journal.binding, "merged", time.monotonic() - began)
        _publish(plan, journal, report)
    except BaseException:
        journal.discard()
        raise
    finally:
        journal.release()
    return report


def _merge(model: Any, inputs: tuple[Input, ...], check_base: bool) -> MergeReport:
    """Merges all adapters into the model and takes them out, and unties in its config what was untied."""
    for number, entry in enumerate(inputs):
        load(model, entry.path, f"merge_{number}", check_base=check_base)
    for ref in adapters(model):
        ref.adapter.scaling *= inputs[int(ref.name.removeprefix("merge_"))].weight
    merged = merge(model)
    uninject(model, keep_merged=True)
    if merged.untied:
        setattr(model.config, TIE, False)
        model.all_tied_weights_keys = {}
    return merged


def _rows(merged: MergeReport) -> tuple[Sample, ...]:
    return tuple(Sample(r.path, r.path, r.adapters, r.relative, r.survives, r.error) for r in merged)


def _publish(plan: CheckpointPlan, journal: Journal, report: CheckpointReport) -> None:
    written = {place.name for place in journal.files.iterdir()}
    for name in plan.carried:
        if name not in written:
            carry(plan, journal, name)
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"
    journal.write(REPORTS[0], text.encode("utf-8", "surrogatepass"))
    journal.write(REPORTS[1], f"{report}\n".encode("utf-8", "surrogatepass"))
    names = [
        place.relative_to(journal.files).as_posix() for place in sorted(journal.files.rglob("*")) if place.is_file()
    ]
    for name in names:
        with (journal.files / name).open("rb") as file:
            os.fsync(file.fileno())
    stale = [p.name for p in plan.out.iterdir() if p.suffix == ".safetensors" and p.name not in names]
    journal.publish(names, stale)
