"""The files of the output that hold no weights, and the moment when all files get their final names."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch

from ..safefile import read_header
from .base import INDEX
from .carry import REPORTS
from .journal import Journal
from .layout import Copy
from .plan import CheckpointPlan, all_names
from .report import CheckpointReport
from .stream import copy_bytes


def publish(plan: CheckpointPlan, journal: Journal, report: CheckpointReport) -> None:
    """Stages every file that holds no weights and gives all files their final names; or goes on with that."""
    state = journal.state()
    if state is not None and state.get("publish"):
        journal.finish(state)
        return
    for name in plan.carried:
        carry(plan, journal, name)
    if plan.base.index is not None:
        journal.write(plan.base.index_name, _index(plan, journal))
    if plan.config is not None:
        journal.write("config.json", plan.config)
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"
    journal.write(REPORTS[0], text.encode("utf-8", "surrogatepass"))
    journal.write(REPORTS[1], f"{report}\n".encode("utf-8", "surrogatepass"))
    names = all_names(plan)
    journal.publish(names, _stale(plan, names))


def carry(plan: CheckpointPlan, journal: Journal, name: str) -> None:
    """Copies a file of the base among those that are whole."""
    assert plan.base.folder is not None
    source = plan.base.folder / name
    number = os.open(source, os.O_RDONLY)
    try:
        size = os.fstat(number).st_size
        into = journal.create(name)
        try:
            copy_bytes(number, into, Copy(source, 0, 0, size))
        except BaseException:
            journal.abandon(name, into)
            raise
        journal.complete(name, into)
    finally:
        os.close(number)


def _index(plan: CheckpointPlan, journal: Journal) -> bytes:
    """Returns the index, computed from the headers of the files that were written."""
    assert plan.base.index is not None
    where: dict[str, str] = {}
    size = count = 0
    for shard in plan.shards:
        header = read_header(journal.files / shard.name)
        where |= dict.fromkeys(header.tensors, shard.name)
        size += sum(entry.end - entry.start for entry in header.tensors.values())
        count += sum(torch.Size(entry.shape).numel() for entry in header.tensors.values())
    known = plan.base.index.get("metadata")
    metadata = dict(known) if isinstance(known, dict) else {}
    metadata["total_size"] = size
    if "total_parameters" in metadata:
        metadata["total_parameters"] = count
    index = dict(plan.base.index) | {"metadata": metadata, "weight_map": where}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8", "surrogatepass")


def _stale(plan: CheckpointPlan, names: Sequence[str]) -> list[str]:
    """Returns weights of an older checkpoint in the output folder that would be taken for part of the new one."""
    found = [place.name for place in plan.out.iterdir() if place.is_file()]
    return [name for name in found if name.endswith((".safetensors", INDEX)) and name not in names]
