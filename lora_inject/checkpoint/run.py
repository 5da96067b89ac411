"""Merging adapters into a checkpoint on disk, from the plan to the last rename."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, FormatError
from ..safefile import parse_json
from .base import read_base
from .carry import REPORTS
from .finish import publish
from .inputs import Paths, read_inputs
from .journal import Journal, check_free
from .patching import Sample
from .plan import CheckpointPlan, all_names, free_space, make_plan
from .ranks import Ranks, ranks
from .report import CheckpointReport
from .stream import Advance, write_shards
from .via_model import merge_via_model

Progress = Callable[[int, int, str], None]
SPARE = 2**22
"""Bytes that must be free beyond the weights, for the other files."""


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Paths,
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    via_model: bool = False,
    check_base: bool = True,
    dtype: torch.dtype | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CheckpointReport:
    """Writes a checkpoint with adapters merged into its weights, without building the model.

    Bit for bit what loading, `merge` and saving would write, shard by shard under the base's names; tensors that no
    adapter reaches are copied as bytes. Memory does not grow with the checkpoint. A run that is killed at any moment
    is continued by the same call; under final names only complete files appear. Started by torchrun, the ranks share
    the shards.

    Args:
        base: a folder with `*.safetensors`, or one such file.
        adapters: files written by `export`, one or several; "path:0.7" takes 0.7 of an update.
        out: the folder to write.
        weights: one number per adapter, in place of those in the strings.
        dry_run: plan and check everything, write nothing.
        overwrite: replace what `out` holds; its files stay whole until all new ones are.
        via_model: load, merge and save with transformers, in memory, for checkpoints whose names or packing the
            headers do not show.
        check_base: False accepts base weights that an adapter was not trained on.
        dtype: dtype of the tensors that change; None keeps the base's.
        threads: how many threads read, compute and write; None chooses.
        progress: called with bytes done, bytes in all, and the file at work, from any thread.

    Returns:
        The report; it is also written as merge_report.json and merge_report.txt.

    Raises:
        ConfigError: a weight, dtype or number of threads that cannot be used.
        FormatError: files that cannot be read or written, or contradict themselves; a disk that is too small.
        MismatchError: adapters that do not fit the base: names, shapes, or base weights.
        UnsupportedError: quantized weights, or weights packed in a way that rows cannot describe.
        StateError: `out` exists, or holds an unfinished merge of other inputs; sums that are not finite.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ConfigError(f"threads={threads!r}: must be a whole number of at least 1")
    target, inputs = Path(out), read_inputs(adapters, weights, base)
    if via_model:
        return merge_via_model(base, inputs, target, dry_run, overwrite, check_base, dtype)
    with _older_objects_set_aside():
        plan = make_plan(read_base(base), inputs, target, dtype, check_base)
        if dry_run:
            return CheckpointReport(plan)
        try:
            with ranks() as group:
                return _run(plan, group, overwrite, threads or _threads(), progress)
        except OSError as error:
            raise FormatError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _older_objects_set_aside() -> Iterator[None]:
    """Spares the garbage collector the objects of torch, which are many: all threads wait while it walks them."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _run(
    plan: CheckpointPlan, group: Ranks, overwrite: bool, threads: int, progress: Progress | None
) -> CheckpointReport:
    began = time.monotonic()
    binding = plan.binding()
    journal = Journal(plan.out, binding)
    rows = _finished(plan, journal)
    if rows is not None:
        group.agree(None)
        if group.rank == 0:
            # What a kill left between the last rename and the end.
            journal.discard()
        return CheckpointReport(plan, rows, binding, "complete already", time.monotonic() - began)
    continued = group.tell(_attempt(group, lambda: _begin(plan, journal, overwrite)))
    try:
        _write(plan, journal, group, threads, progress)
        rows = group.tell(_attempt(group, lambda: _measured(plan, journal)))
        status = "continued" if continued else "merged"
        report = CheckpointReport(plan, rows, binding, status, time.monotonic() - began)
        _attempt(group, lambda: publish(plan, journal, report))
    except BaseException:
        if group.rank == 0:
            journal.drop_if_empty()
        raise
    finally:
        journal.release()
    return report


def _measured(plan: CheckpointPlan, journal: Journal) -> tuple[Sample, ...]:
    return tuple(row for shard in plan.shards for row in journal.measured(shard.name))


def _attempt(group: Ranks, step: Callable[[], Any]) -> Any:
    """Lets rank 0 do something; every rank learns of an error."""
    error, value = None, None
    if group.rank == 0:
        try:
            value = step()
        except BaseException as problem:
            error = problem
    group.agree(error)
    return value


def _begin(plan: CheckpointPlan, journal: Journal, overwrite: bool) -> bool:
    state = journal.state()
    if state is None or state.get("binding") != journal.binding:
        check_free(plan.out, overwrite)
        _check_space(plan, 0)
    elif not overwrite and not state.get("publish"):
        check_free(plan.out, overwrite)
    continued = journal.begin(overwrite)
    if continued:
        done = sum(shard.size for shard in plan.shards if journal.has(shard.name, shard.size))
        _check_space(plan, done)
    return continued


def _check_space(plan: CheckpointPlan, done: int) -> None:
    needed, free = plan.size - done + SPARE, free_space(plan.out)
    if needed > free:
        raise FormatError(
            f"{plan.out}: needs {needed:,} bytes and {free:,} are free: free some, or choose another disk; nothing was "
            "written"
        )


def _write(plan: CheckpointPlan, journal: Journal, group: Ranks, threads: int, progress: Progress | None) -> None:
    """Writes what this rank has to write and is not complete yet, and waits for the others."""
    error: BaseException | None = None
    try:
        state = journal.state()
        if state is not None and not state.get("publish"):
            mine = group.share(plan.shards)
            left = [shard for shard in mine if not journal.has(shard.name, shard.size)]
            total = sum(shard.size for shard in mine)
            advance = _counter(total - sum(shard.size for shard in left), total, progress)
            write_shards(left, journal, threads, advance)
    except BaseException as problem:
        error = problem
    group.agree(error)


def _counter(done: int, total: int, progress: Progress | None) -> Advance:
    lock, held = threading.Lock(), [done]

    def advance(count: int, name: str) -> None:
        with lock:
            held[0] += count
            if progress is not None:
                progress(held[0], total, name)

    return advance


def _finished(plan: CheckpointPlan, journal: Journal) -> tuple[Sample, ...] | None:
    """Returns the rows of a merge of the same inputs that is complete already, or None."""
    place = plan.out / REPORTS[0]
    if journal.state() is not None or not place.is_file():
        return None
    try:
        found = parse_json(place.read_bytes(), str(place))
        same = found["binding"] == journal.binding
        rows = tuple(Sample(**(row | {"adapters": tuple(row["adapters"])})) for row in found["parameters"])
    except (FormatError, KeyError, TypeError):
        return None
    whole = all((plan.out / name).is_file() for name in all_names(plan))
    sizes = whole and all((plan.out / shard.name).stat().st_size == shard.size for shard in plan.shards)
    return rows if same and sizes else None
