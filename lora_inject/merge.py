"""Merging adapters into the weights of a model, and unmerging them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .commit import all_or_nothing
from .errors import StateError
from .host import Host
from .merging import Merged, merge_host, unmerge_host
from .refs import AdapterRef, adapters, by_host, pick
from .tables import percent, table
from .tree import tied, walk


@dataclass(frozen=True, repr=False)
class MergeReport:
    """What `merge` did, a row per parameter; prints as a table."""

    rows: tuple[Merged, ...]

    @property
    def untied(self) -> tuple[str, ...]:
        """Paths of parameters that were shared and have memory of their own while merged."""
        return tuple(row.path for row in self.rows if row.untied)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Merged]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"<MergeReport: {len(self)} parameters, {len(self.untied)} untied>"

    def __str__(self) -> str:
        headers = ("parameter", "adapters", "|dW|/|W|", "survives", "largest error", "note")
        return table(headers, [_cells(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values that JSON can hold."""
        return {"parameters": [asdict(row) for row in self.rows]}


def _cells(row: Merged) -> tuple[object, ...]:
    relative = "-" if row.relative is None else row.relative
    note = "untied" if row.untied else "created" if row.created else ""
    return (row.path, "+".join(row.adapters), relative, percent(row.survives), row.error, note)


def merge(model: nn.Module, *names: str) -> MergeReport:
    """Writes W + delta into the weights of every host, for inference without extra cost; `unmerge` takes it back.

    The sum over all merged adapters is formed in float32 or wider and rounded once to the weight's dtype. A parameter
    that is shared with another module gets memory of its own, so that the other keeps W.

    Args:
        model: a model with adapters.
        *names: the adapters to merge; none means all that are switched on and not merged yet.

    Returns:
        A row per parameter: size of the update, how much of it the stored dtype keeps, what was untied.

    Raises:
        StateError: merged already, switched off, disabled or scaled by an open context, unknown, of a whole block
            (which has no weight), or a sum that is not finite in the weight's dtype. Nothing is changed then.
        UnsupportedError: a parameter that is computed, so that nothing can be written into it.
    """
    wanted = pick(model, names)
    refs = [ref for ref in adapters(model) if ref.name in wanted]
    if not names:
        refs = [ref for ref in refs if ref.adapter.enabled and not ref.adapter.merged]
        if not refs:
            raise StateError("nothing to merge: every adapter is merged already or switched off")
    for ref in refs:
        _check_mergeable(ref)
    nodes = walk(model)
    shared = tied(nodes)
    rows: list[Merged] = []
    with all_or_nothing() as undo:
        for group in by_host(refs):
            host: Any = group[0].module
            held = dict.fromkeys((*host.adapters.merged_names(), *(ref.name for ref in group)))
            rows += merge_host(host, group[0].host_path, tuple(held), shared, undo)
    return MergeReport(tuple(rows))


def _check_mergeable(ref: AdapterRef) -> None:
    where, adapter = f"{ref.path or '(root)'}: adapter {ref.name!r}", ref.adapter
    if adapter.merged:
        raise StateError(f"{where} is merged already: call lora_inject.unmerge(model) first to merge it anew")
    if not adapter.enabled:
        raise StateError(f"{where} is switched off: activate it first, or merge others by name")
    if adapter.muted or adapter.factor != 1.0:
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
