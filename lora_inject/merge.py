"""Merging adapters into the weights of a model, and unmerging them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .commit import all_or_nothing
from .config import check_option
from .errors import RoundingWarning, StateError
from .host import Host
from .merge_job import ENOUGH, Merged, MergeOptions
from .merging import Work, merge_host, unmerge_host
from .refs import AdapterRef, adapters, by_host, pick
from .tables import percent, table
from .ties import Ties, find_ties
from .tree import walk


@dataclass(frozen=True, repr=False)
class MergeReport:
    """What `merge` did, a row per parameter; prints as a table."""

    rows: tuple[Merged, ...]

    @property
    def untied(self) -> tuple[str, ...]:
        """Paths of parameters that were shared and have memory of their own while merged."""
        return tuple(row.path for row in self.rows if row.untied)

    @property
    def lossy(self) -> tuple[Merged, ...]:
        """The parameters that keep less than 90 % of their update."""
        return tuple(row for row in self.rows if row.survives < ENOUGH)

    @property
    def advice(self) -> str:
        """What to do about the lossy parameters, or an empty string."""
        if not self.lossy:
            return ""
        worst = min(self.lossy, key=lambda row: row.survives)
        wider = "" if worst.requantized else "merge with dtype=torch.float32 to store them wider, "
        return (
            f"{len(self.lossy)} of {len(self)} merged parameters keep less than {percent(ENOUGH)} of their update "
            f"after rounding, {worst.path} only {percent(max(0.0, worst.survives))}: {wider}merge into a float32 copy "
            "of the base, or keep the adapter unmerged"
        )

    @property
    def kept(self) -> int:
        """Bytes held for `unmerge`."""
        return sum(row.kept for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Merged]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"<MergeReport: {len(self)} parameters, {len(self.untied)} untied>"

    def __str__(self) -> str:
        headers = ("parameter", "adapters", "|dW|/|W|", "survives", "largest error", "note")
        parts = [table(headers, [_cells(row) for row in self.rows]), self.advice]
        return "\n\n".join(filter(None, parts))

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values that JSON can hold."""
        return {"parameters": [asdict(row) for row in self.rows]}


def _cells(row: Merged) -> tuple[object, ...]:
    relative = "-" if row.relative is None else row.relative
    flags = {"untied": row.untied, "created": row.created, "widened": row.widened, "requantized": row.requantized}
    note = ", ".join(flag for flag, is_set in flags.items() if is_set)
    return (row.path, "+".join(row.adapters), relative, percent(max(0.0, row.survives)), row.error, note)


def merge(
    model: nn.Module,
    *names: str,
    keep: str = "residual",
    dtype: torch.dtype | None = None,
    accumulate: torch.dtype = torch.float32,
    requantize: bool = False,
) -> MergeReport:
    """Writes W + delta into the weights of every host, for inference without extra cost; `unmerge` takes it back.

    The sum over all merged adapters is formed in float32 or wider and rounded once to the weight's dtype. A parameter
    that is shared with another module gets memory of its own, so that the other keeps W.

    Args:
        model: a model with adapters.
        *names: the adapters to merge; none means all that are switched on and not merged yet.
        keep: what `unmerge` goes back by: "residual" (the few elements that subtraction does not give back, and a
            checksum), "copy" (the whole weight), or "nothing" (there is no way back).
        dtype: store the weights that lose more than a tenth of their update to rounding in this wider dtype.
        accumulate: form updates in float32, or in float64.
        requantize: merge into quantized weights too: W is dequantized, and the sum rounded to the stored format, whose
            error the report tells. Without it they are refused.

    Returns:
        A row per parameter: size of the update, how much of it the stored dtype keeps, what was untied.

    Warns:
        RoundingWarning: a weight keeps less than 90 % of its update.

    Raises:
        ConfigError: an option's value cannot be used.
        StateError: merged already, switched off, disabled or scaled by an open context, unknown, of a whole block
            (which has no weight), or a sum that is not finite in the weight's dtype. Nothing is changed then.
        UnsupportedError: a parameter that is computed and cannot come out as the sum, or is quantized or offloaded.
    """
    for option, value in (("keep", keep), ("dtype", dtype), ("accumulate", accumulate), ("requantize", requantize)):
        check_option(option, value)
    wanted = pick(model, names)
    refs = [ref for ref in adapters(model) if ref.name in wanted]
    if not names:
        refs = [ref for ref in refs if ref.adapter.enabled and not ref.adapter.merged]
        if not refs:
            raise StateError("nothing to merge: every adapter is merged already or switched off")
    for ref in refs:
        _check_mergeable(ref)
    ties = find_ties(model)
    work = _work(model, refs, ties)
    holding = {id(host): names for host, _, names in work}
    options = MergeOptions(
        keep=keep, dtype=dtype, accumulate=accumulate, requantize=requantize, ties=ties, holding=holding
    )
    rows: list[Merged] = []
    with all_or_nothing() as undo:
        for host, _, _ in work:
            # All before the first is written: a tied weight that is merged for two must be whole when one leaves.
            unmerge_host(host, undo)
        for host, path, holds in work:
            rows += merge_host(host, path, holds, options, undo)
    report = MergeReport(tuple(rows))
    if report.lossy:
        warnings.warn(report.advice, RoundingWarning, stacklevel=2)
    return report


def _work(model: nn.Module, refs: list[AdapterRef], ties: Ties) -> list[Work]:
    """Returns the hosts to merge, and those that are merged now and hold a weight of one of them."""
    found: list[Work] = []
    circle = ties.circle(ref.module for ref in refs)
    for group in by_host(adapters(model)):
        host: Any = group[0].module
        names = tuple(dict.fromkeys((*host.adapters.merged_names(), *(ref.name for ref in refs if ref.module is host))))
        if id(host) in circle and names:
            found.append((host, group[0].host_path, names))
    return found


def _check_mergeable(ref: AdapterRef) -> None:
    where, adapter = f"{ref.path or '(root)'}: adapter {ref.name!r}", ref.adapter
    if adapter.merged:
        raise StateError(f"{where} is merged already: call lora_inject.unmerge(model) first to merge it anew")
    if not adapter.enabled:
        raise StateError(f"{where} is switched off: activate it first, or merge others by name")
    if adapter.muted or adapter.scalings:
        raise StateError(f"{where} is inside disabled() or scaled(): leave that context, then merge")
    if not adapter.mergeable or not adapter.updates:
        raise StateError(f"{where} acts on a whole block, which has no weight to merge into: keep it unmerged")


def unmerge(model: nn.Module) -> None:
    """Gives every merged parameter its original bits back; the adapters act beside the weights again.

    Args:
        model: a model with merged adapters.

    Raises:
        StateError: nothing is merged.
    """
    hosts = merged_hosts(model)
    if not hosts:
        raise StateError("nothing is merged in this model: there is nothing to unmerge")
    with all_or_nothing() as undo:
        for host in hosts.values():
            unmerge_host(host, undo)


def merged_hosts(model: nn.Module) -> dict[str, Any]:
    """Returns the hosts with merged adapters by path."""
    return {
        node.path: node.module
        for node in walk(model)
        if isinstance(node.module, Host) and node.module.adapters.merged_names()
    }
