"""The updates to merge: every site of every adapter beside the module that it changes, all of it checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..adapter import Adapter, Layout
from ..adapter_file import SiteRecord
from ..config import dtype_name
from ..errors import ConfigError, FormatError, LoraInjectError, MismatchError, listing
from ..registry import adapter_for, by_kind
from ..targets import nearest_paths
from .inputs import Input
from .names import Names, StandIn


@dataclass(frozen=True, eq=False)
class Update:
    """One site of one adapter file; its numbers are on disk.

    Attributes:
        input: the file and its weight.
        record: what the file says of the site.
        kind: the class that serves the module.
        path: the path of its module in the checkpoint's model.
        host: that module, or a stand-in, on the meta device.
        layout: names and shapes of the adapter's parameters.
        names: the host's parameters that it updates.
        row_axes: how many leading axes of the weight count as rows.
        shared: whether the record has updates of further modules, of this checkpoint or of the one it was made for.
    """

    input: Input
    record: SiteRecord
    kind: type[Adapter]
    path: str
    host: nn.Module
    layout: Layout
    names: tuple[str, ...]
    row_axes: int
    shared: bool

    @property
    def weight_name(self) -> str:
        """The name of the weight that it updates."""
        return self.names[0]

    @property
    def outputs(self) -> int:
        """How many numbers the bias has that comes with it: the size of the last bias that its layout lists."""
        return self.layout[list(self.layout)[-1]][0]

    def load(self) -> Adapter:
        """Returns the adapter with its numbers, on the CPU, weight included."""
        adapter = _build(self.kind, self.record, self.layout, torch.device("cpu"))
        adapter.shared = self.shared
        self.input.fill(adapter, self.record)
        return adapter


def needs_model(inputs: Iterable[Input]) -> list[str]:
    """Returns the sites whose update depends on more of the model than a checkpoint's headers tell."""
    return [
        record.path
        for entry in inputs
        for record in entry.file.sites.values()
        if by_kind(record.kind).needs_host(record.config)
    ]


def read_updates(inputs: Sequence[Input], names: Names) -> list[Update]:
    """Returns the updates of all adapters in order, each tensor of each file used exactly once.

    Raises:
        FormatError: tensors or options that belong to no site or contradict it.
        MismatchError: modules that the checkpoint does not have, or tensors that do not fit; lists all of them.
        UnsupportedError: an adapter of a whole block, or one that needs the model itself.
    """
    found: list[Update] = []
    for entry in inputs:
        missing, wrong = [], []
        for record in entry.file.sites.values():
            try:
                updates = _updates(entry, record, names)
            except ConfigError as problem:
                raise FormatError(f"{entry.path}: {record.path}: {problem}") from problem
            except LoraInjectError as problem:
                raise type(problem)(f"{entry.path}: {record.path or '(root)'}: {problem}") from problem
            if not updates:
                missing.append(record.path)
            for update in updates:
                wrong += _compare(update)
            found += updates
        _refuse(entry, missing, wrong, names)
        _refuse_doubles(entry, [update for update in found if update.input is entry])
    return found


def _refuse_doubles(entry: Input, updates: Sequence[Update]) -> None:
    first: dict[tuple[int, str], Update] = {}
    for update in updates:
        other = first.setdefault((id(update.host), update.weight_name), update)
        one, two = (found.record.owner(found.record.path) for found in (other, update))
        if one != two:
            raise MismatchError(
                f"{entry.path}: {one} and {two} both lead to {update.path}.{update.weight_name} of the base, so the "
                "adapter is for a model that holds more than this base: merge it into that one"
            )


def _updates(entry: Input, record: SiteRecord, names: Names) -> list[Update]:
    """Returns an update for every module that the record's paths lead to: one, or all that share a tied weight."""
    hosts: dict[int, tuple[str, nn.Module]] = {}
    owners = [record.owner(path) for path in (record.path, *record.aliases)]
    found_at = {path: names.module(path) for path in owners}
    for path, host in found_at.items():
        if host is not None:
            hosts.setdefault(id(host), (names.own(path), host))
    # A module that is not here may have trained rows that the others leave out, as an embedding its padding row.
    shared = len(hosts) > 1 or None in found_at.values()
    found = [_update(entry, record, path, host, shared) for path, host in hosts.values()]
    return [update for update in found if update is not None]


def _update(entry: Input, record: SiteRecord, path: str, host: nn.Module, shared: bool) -> Update | None:
    kind, parameter = by_kind(record.kind), record.extras.get("parameter")
    if not kind.mergeable or not kind.touches(record.extras):
        raise MismatchError("acts on a whole block, which has no weight to merge into: leave it out of the merge")
    touched = kind.touches(record.extras)[0]
    if host._parameters.get(touched) is None:
        return None
    if not isinstance(host, StandIn):
        serves = kind.can_adapt(host) if parameter is None else kind.can_adapt_parameter(host, parameter)
        if not serves and shared and parameter is None:
            kind = adapter_for(host) or kind
            serves = kind.can_adapt(host)
        if not serves:
            raise MismatchError(f"adapter {record.kind!r} does not serve {type(host).__name__}")
    if record.config.dtype is None:
        raise FormatError("its metadata do not say the dtype of its tensors: export the adapter again")
    layout = kind.layout(host, record.config, record.extras)
    adapter = _build(kind, record, layout, torch.device("meta"))
    return Update(entry, record, kind, path, host, layout, adapter.delta_names(host), adapter.row_axes, shared)


def _build(kind: type[Adapter], record: SiteRecord, layout: Layout, device: torch.device) -> Adapter:
    dtype = record.config.dtype
    assert dtype is not None
    return kind(record.config, layout, dtype, device, record.extras)


def _compare(update: Update) -> list[str]:
    """Returns a line for every tensor that is missing, unexpected, or of another shape or dtype."""
    record, entries = update.record, update.input.file.entries.get(update.record.path, {})
    lines = [f"{record.prefix}{key}: missing in the file" for key in update.layout if key not in entries]
    for key, entry in entries.items():
        where, wanted = f"{record.prefix}{key}", update.layout.get(key)
        if wanted is None:
            lines.append(f"{where}: unexpected")
        elif entry.shape != tuple(wanted):
            lines.append(f"{where}: shape {entry.shape} in the file, {tuple(wanted)} wanted by the base")
        elif entry.dtype != record.config.dtype:
            lines.append(f"{where}: dtype {dtype_name(entry.dtype)}, not the one that its metadata say")
    return lines


def _refuse(entry: Input, missing: list[str], wrong: list[str], names: Names) -> None:
    stray = sorted(set(entry.file.entries) - set(entry.file.sites))
    if stray:
        raise FormatError(f"{entry.path}: tensors that belong to no site of the file:\n{listing(stray)}")
    if missing:
        known = names.paths()
        lines = []
        for path in missing[:12]:
            near = nearest_paths(path, known)[:2]
            lines.append(path + (f" (nearest: {', '.join(near)})" if near else ""))
        more = len(missing) - len(lines)
        raise MismatchError(
            f"{entry.path}: the base has no weight for {len(missing)} of {len(entry.file.sites)} sites:\n"
            f"{listing(lines)}{f'{chr(10)}  ... and {more} more' if more else ''}\n"
            "Merge it into the base that it was made for; where transformers names or packs the weights otherwise "
            "than the checkpoint does, use via_model=True (--via-model)."
        )
    if wrong:
        raise MismatchError(f"{entry.path}: {len(wrong)} tensors do not fit:\n{listing(wrong)}")
