"""Loading an adapter file into a model: everything is checked before the model is touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .adapter_file import SiteRecord
from .bulk import uncollected
from .config import Injection, check_name, dtype_name
from .errors import ConfigError, FormatError, LoraInjectError, MismatchError, listing
from .fingerprint import fingerprints
from .formats import Bundle, Source, read_adapter
from .formats.prefixes import aligned
from .formats.trained import as_updates
from .plan import Plan, count_parameters
from .registry import adapter_for, by_kind
from .safefile import all_finite
from .sites import Site, make_site
from .surgery import build, insert
from .targets import nearest_paths
from .ties import share
from .tree import Node, walk


@uncollected()
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    strict: bool = True,
    check_base: bool = True,
) -> Plan:
    """Injects the adapters that a file describes and fills them with its tensors; all or nothing.

    `training` flags and other adapters stay as they are; the base is frozen as by `inject`.

    Args:
        model: the base model.
        path: a file written by `export`.
        name: the adapters' name in this model; None means the name in the file.
        strict: False allows the model to lack some of the file's sites, and nothing else.
        check_base: False accepts base weights that differ from those that the adapter was trained on.

    Returns:
        The plan of what was injected.

    Raises:
        FormatError: the file cannot be read or contradicts itself.
        MismatchError: sites, tensors, shapes or base weights do not fit; lists all of them.
        StateError: a site has an adapter of that name already.
    """
    file = read_adapter(path, model)
    if isinstance(file, Bundle):
        file = as_updates(file, model)
    nodes = walk(model)
    injection = Injection(name=check_name(file.name if name is None else name))
    placed, note = _place(file, nodes, strict)
    sites = _sites(file, placed, injection.name)
    if check_base:
        _check_base(file, sites, placed)
    every = tuple(site for group in sites.values() for site in group)
    notes = (*file.notes, *([note] if note else []))
    plan = Plan(injection, every, (), {str(path): len(every)}, count_parameters(nodes), notes)
    insert(nodes, plan, _filled(file, sites, placed))
    return plan


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a site of the file is in the model.

    Attributes:
        nodes: its module, and any further modules that its aliases lead to.
        absent: paths of the file that lead nowhere, each with the kind of adapter that served it, or "" where the file
            does not tell.
    """

    nodes: list[Node]
    absent: tuple[tuple[str, str], ...]


Placed = dict[str, _Place]
"""By the path of a site in the file."""


def _place(file: Source, nodes: Sequence[Node], strict: bool) -> tuple[Placed, str]:
    """Returns the modules of every site of the file, and a note where the paths differ by a prefix.

    Aliases lead to the same module, or, where an adapter was shared by tied weights, to another one. One that was a
    single module for the exporting model and is two in this one gets the same pair in both.
    """
    by_path = {path: node for node in nodes for path in node.paths}
    move, note = _aligned(file, by_path)
    placed: Placed = {}
    missing: list[str] = []
    for record in file.sites.values():
        known = {path: by_path.get(move(record.owner(path))) for path in (record.path, *record.aliases)}
        # Above the part of the model that the others are in, where paths have no prefix to lose or gain.
        known |= {path: by_path.get(path) for path in record.tied if known[path] is None}
        found = list({id(node): node for node in known.values() if node is not None}.values())
        if not found:
            near = nearest_paths(record.path, by_path)[:2]
            missing.append(record.path + (f" (nearest: {', '.join(near)})" if near else ""))
        else:
            kinds = {record.path: record.kind, **record.tied}
            absent = tuple((path, kinds.get(path, "")) for path, node in known.items() if node is None)
            placed[record.path] = _Place(found, absent)
    stray = sorted(set(file.entries) - set(file.sites))
    if stray:
        raise FormatError(f"{file.path}: tensors that belong to no site of the file:\n{listing(stray)}")
    if missing and (strict or not placed):
        raise MismatchError(
            f"{file.path}: the model has no module for {len(missing)} of {len(file.sites)} sites:\n"
            f"{listing(missing)}\nLoad it into the model that it was made for"
            + ("." if not placed else ", or pass strict=False to load the sites that are there.")
        )
    return placed, note


def _aligned(file: Source, known: Mapping[str, Node]) -> tuple[Callable[[str], str], str]:
    """Returns what turns the file's paths into the model's, and a note where that is not the path itself."""
    return aligned([record.owner(record.path) for record in file.sites.values()], known) or (str, "")


def _sites(file: Source, placed: Placed, name: str) -> dict[str, list[Site]]:
    """Returns the checked sites of every placed record; their layout equals the shapes in the file."""
    sites: dict[str, list[Site]] = {}
    problems: list[LoraInjectError] = []
    wrong: list[str] = []
    for path, place in placed.items():
        record = file.sites[path]
        for node in place.nodes:
            try:
                adapter_class = _class_for(record, node.module)
                if adapter_class is None:
                    wrong.append(f"{path}: adapter {record.kind!r} does not serve {type(node.module).__name__}")
                    continue
                site = make_site(node, adapter_class, record.config, name, record.extras)
            except ConfigError as problem:
                raise FormatError(f"{file.path}: {path}: {problem}") from problem
            except LoraInjectError as problem:
                problems.append(type(problem)(f"{path or '(root)'}: {problem}"))
                continue
            wrong += _compare(file, record, site)
            group = sites.setdefault(path, [])
            group.append(replace(site, owner=group[0].path) if group else site)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems[:12])))
    if wrong:
        raise MismatchError(f"{file.path}: {len(wrong)} tensors do not fit:\n{listing(wrong)}")
    return sites


def _class_for(record: SiteRecord, module: nn.Module) -> type[Adapter] | None:
    """Returns the class of the record's kind, or what stands for it here, or serves the module as a further user."""
    adapter_class, parameter = by_kind(record.kind), record.extras.get("parameter")
    if _serves(adapter_class, module, parameter):
        return adapter_class
    found = adapter_for(module) if parameter is None else None
    return found if found is not None and (record.aliases or found.stored_as == record.kind) else None


def _serves(adapter_class: type[Adapter], module: nn.Module, parameter: str | None) -> bool:
    """Says whether the class serves the module, or that parameter of it."""
    if parameter is None:
        return adapter_class.can_adapt(module)
    return module._parameters.get(parameter) is not None and adapter_class.can_adapt_parameter(module, parameter)


def _compare(file: Source, record: SiteRecord, site: Site) -> list[str]:
    """Returns a line for every tensor that is missing, unexpected, or of another shape or dtype."""
    entries = file.entries.get(record.path, {})
    lines = [f"{record.prefix}{key}: missing in the file" for key in site.layout if key not in entries]
    for key, entry in entries.items():
        where = f"{record.prefix}{key}"
        if key not in site.layout:
            lines.append(f"{where}: unexpected")
        elif entry.shape != tuple(site.layout[key]):
            lines.append(f"{where}: shape {entry.shape} in the file, {tuple(site.layout[key])} wanted by the model")
        elif entry.dtype != site.dtype:
            lines.append(f"{where}: dtype {dtype_name(entry.dtype)}, its metadata say {dtype_name(site.dtype)}")
    return lines


def _check_base(file: Source, sites: Mapping[str, list[Site]], placed: Placed) -> None:
    known = [
        (path, node, site.adapter_class.touches(site.extras))
        for path, group in sites.items()
        for site, node in zip(group, placed[path].nodes, strict=True)
        if site.device.type != "meta" and file.sites[path].base.get("hash") is not None
    ]
    found = fingerprints((node, names) for _, node, names in known)
    differ = [path for (path, _, _), base in zip(known, found, strict=True) if base != file.sites[path].base]
    if differ:
        raise MismatchError(
            f"{file.path}: made for other base weights: {len(differ)} of {len(sites)} sites differ:\n"
            f"{listing(differ)}\nLoad it into its own base, or pass check_base=False if you know that this one will do."
        )


@torch.no_grad()
def _filled(file: Source, sites: Mapping[str, list[Site]], placed: Placed) -> list[Adapter]:
    """Returns one adapter per site, holding the file's numbers; those of one record share them."""
    keys = [f"{file.sites[path].prefix}{key}" for path, group in sites.items() for key in group[0].layout]
    tensors = file.read(keys)
    if not all_finite(tensors.values()):
        bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        raise FormatError(f"{file.path}: NaN or infinity in {len(bad)} tensors:\n{listing(bad)}")
    built: list[Adapter] = []
    empty: list[Tensor] = []
    for path, group in sites.items():
        owner, *members = [build(site) for site in group]
        empty += [owner._parameters[key] for key in group[0].layout]  # type: ignore[misc]
        for member in members:
            share(owner, member)
        if placed[path].absent:
            # A module that is not here may have trained rows that the others leave out, as an embedding its padding
            # row; where none did, these rows are zero, so that nothing is lost by taking them for shared.
            owner.shared, owner.absent = True, placed[path].absent
        built += [owner, *members]
    # In one call: both follow the order of the sites and their layouts.
    torch._foreach_copy_(empty, [tensors[key] for key in keys])
    return built
