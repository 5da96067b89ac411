"""The plan of a merge on disk, from headers only: what changes, what is copied, what is written where."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import as_dtype, dtype_name
from ..errors import ConfigError, FormatError, StateError
from ..safefile import stamp
from ..tables import dims, table
from ..version import VERSION
from .base import Base
from .carry import REPORTS, files_beside, may_be_tied, new_config
from .changes import STORED, Target, find_targets
from .identity import check_base
from .inputs import Input
from .layout import Patch, Shard, lay_out
from .model_names import ModelNames
from .names import HeaderNames, Names, find_names
from .updates import Update, needs_model, read_updates


@dataclass(frozen=True, eq=False, repr=False)
class CheckpointPlan:
    """What merging adapters into a checkpoint would write; prints as a table.

    Attributes:
        base: the checkpoint, headers only.
        inputs: the adapters and their weights.
        out: the folder to write.
        shards: the files of weights that will be written.
        targets: the tensors in them that are not copies of the base's tensor of that name.
        untied: parameters that shared numbers and get tensors of their own.
        carried: other files that go along unchanged.
        left: other files that stay behind: copies of the weights in other formats.
        config: the new config.json where it changes, else None.
        note: how names were found, where they are not those of the headers.
    """

    base: Base
    inputs: tuple[Input, ...]
    out: Path
    shards: tuple[Shard, ...]
    targets: tuple[Target, ...]
    untied: tuple[str, ...]
    carried: tuple[str, ...]
    left: tuple[str, ...]
    config: bytes | None
    note: str

    @property
    def size(self) -> int:
        """Bytes of all weights that will be written."""
        return sum(shard.size for shard in self.shards)

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The tensors that are computed."""
        return tuple(patch for shard in self.shards for patch in shard.patches)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return f"<CheckpointPlan: {len(self)} tensors in {len(self.shards)} shards, {self.size:,} bytes>"

    def __str__(self) -> str:
        rows = [_row(target) for target in self.targets]
        parts = [table(("tensor", "shape", "dtype", "adapters", "note"), rows, limit=200)]
        files = [(shard.name, shard.size, len(shard.patches)) for shard in self.shards]
        parts.append(table(("shard", "bytes", "changed tensors"), files, limit=40))
        lines = [f"{len(self.patches)} tensors change, {self.size:,} bytes of weights, {free_space(self.out):,} free"]
        lines += [f"carried over: {', '.join(self.carried)}"] if self.carried else []
        lines += [f"left behind: {', '.join(self.left)}"] if self.left else []
        lines += [f"untied: {', '.join(self.untied)}"] if self.untied else []
        lines += [self.note] if self.note else []
        return "\n\n".join([*parts, "\n".join(lines)])

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as values that JSON can hold."""
        return {
            "base": str(self.base.root),
            "adapters": [_input_dict(entry) for entry in self.inputs],
            "out": str(self.out),
            "bytes": self.size,
            "bytes_free": free_space(self.out),
            "shards": [{"name": s.name, "bytes": s.size, "changed": len(s.patches)} for s in self.shards],
            "tensors": [_target_dict(target) for target in self.targets],
            "untied": list(self.untied),
            "carried": list(self.carried),
            "left_behind": list(self.left),
            "note": self.note,
        }

    def binding(self) -> str:
        """Returns a hash of all that decides the output: headers, sizes and times of the files, weights, dtypes."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.base.shards:
            digest.update(stamp(shard.path, shard.data))
        for entry in self.inputs:
            digest.update(entry.file.stamp() + repr(entry.weight).encode())
        for shard_out in self.shards:
            digest.update(hashlib.blake2b(shard_out.head).digest())
        rest = [VERSION, [[p.target.key, dtype_name(p.target.dtype)] for p in self.patches], self.carried, self.untied]
        digest.update(json.dumps(rest).encode())
        return digest.hexdigest()


def _note(target: Target) -> str:
    return "untied" if target.untied else "created" if target.place is None else ""


def _names(target: Target) -> list[str]:
    return [update.input.file.name for change, _ in target.parts for update in change.updates]


def _row(target: Target) -> tuple[object, ...]:
    added = "+".join(dict.fromkeys(_names(target))) or "-"
    return target.key, dims(target.shape), dtype_name(target.dtype), added, _note(target)


def _target_dict(target: Target) -> dict[str, Any]:
    return {
        "key": target.key,
        "shape": list(target.shape),
        "dtype": dtype_name(target.dtype),
        "parameters": [change.path for change, _ in target.parts],
        "note": _note(target),
    }


def _input_dict(entry: Input) -> dict[str, Any]:
    return {"path": str(entry.path), "name": entry.file.name, "weight": entry.weight, "sites": len(entry.file.sites)}


def make_plan(
    base: Base, inputs: tuple[Input, ...], out: Path, dtype: object = None, check: bool = True
) -> CheckpointPlan:
    """Returns the plan; reads headers, and a few elements of the base to recognise it.

    Args:
        base: the checkpoint.
        inputs: the adapters.
        out: the folder to write.
        dtype: a torch dtype or its name for all tensors that change; None keeps the base's.
        check: refuse base weights that an adapter was not trained on.

    Raises:
        LoraInjectError: anything that does not fit, each kind as `merge_checkpoint` lists it.
    """
    check_place(base, inputs, out)
    stored = _dtype(dtype)
    names = _names_for(base, inputs)
    updates = read_updates(inputs, names)
    if isinstance(names, HeaderNames) and _needs_ties(base, updates):
        names = ModelNames(base)
        updates = read_updates(inputs, names)
    targets, untied = find_targets(base, names, updates, stored)
    if check:
        check_base(base, names, updates)
    carried, left = files_beside(base)
    config = new_config(base, bool(untied))
    if config is not None:
        carried.remove("config.json")
    return CheckpointPlan(
        base=base,
        inputs=inputs,
        out=out,
        shards=tuple(lay_out(base, targets)),
        targets=tuple(targets),
        untied=tuple(untied),
        carried=tuple(carried),
        left=tuple(left),
        config=config,
        note=names.note,
    )


def _dtype(dtype: object) -> torch.dtype | None:
    found = as_dtype(dtype)
    if found is not None and found not in STORED:
        raise ConfigError(f"dtype={dtype!r}: must be None or one of {', '.join(map(dtype_name, STORED))}")
    return found  # type: ignore[no-any-return]


def _names_for(base: Base, inputs: Sequence[Input]) -> Names:
    """Returns the headers' names where they will do, else those of the model, which needs transformers."""
    names = find_names(base, inputs)
    unknown = any(
        all(names.module(record.owner(path)) is None for path in (record.path, *record.aliases))
        for entry in inputs
        for record in entry.file.sites.values()
    )
    asking = needs_model(inputs)
    if base.config is not None and "model_type" in base.config and (unknown or asking):
        return ModelNames(base)
    if asking:
        raise FormatError(
            f"{base.root}: {asking[0]}: its update depends on more than the weights tell (a padding row, say), and "
            "there is no config.json of transformers beside them: merge in memory instead"
        )
    return names


def _needs_ties(base: Base, updates: Sequence[Update]) -> bool:
    """Says whether an adapted weight could be shared with another one that the headers do not list."""
    rows = {int(update.host._parameters[update.weight_name].shape[0]) for update in updates}  # type: ignore[union-attr]
    return "model_type" in (base.config or {}) and any(may_be_tied(base, count) for count in rows)


def check_place(base: Base, inputs: Sequence[Input], out: Path) -> None:
    """Refuses an output that is, holds or lies in what is read."""
    target, root = out.resolve(), base.root.resolve()
    if target == root or target in root.parents or (root.is_dir() and root in target.parents):
        raise StateError(
            f"{out}: is the base, holds it or lies in it, which would be read and written at once: choose another"
        )
    for entry in inputs:
        if target == entry.path.resolve():
            raise StateError(f"{out}: is one of the adapters: choose another folder")


def free_space(out: Path) -> int:
    """Returns the free bytes where the folder is, or will be."""
    place = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    return shutil.disk_usage(place).free


def all_names(plan: CheckpointPlan) -> list[str]:
    """Returns the relative paths of all files that a merge writes, in the order in which they get their final names."""
    index = [plan.base.index_name] if plan.base.index is not None else []
    config = ["config.json"] if plan.config is not None else []
    return [*(shard.name for shard in plan.shards), *plan.carried, *index, *config, *REPORTS]
