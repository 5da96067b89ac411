"""Loading an adapter file into a model: everything is checked before the model is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .adapter import Adapter, parameters_of
from .adapter_file import AdapterFile, SiteRecord, read_adapter_file
from .bulk import uncollected
from .config import Injection, check_name, dtype_name
from .errors import ConfigError, FormatError, LoraInjectError, MismatchError, listing
from .fingerprint import fingerprints
from .plan import Plan, count_parameters
from .registry import by_kind
from .safefile import all_finite, read_tensors
from .sites import Site, make_site
from .surgery import build, insert
from .targets import nearest_paths
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
    file = read_adapter_file(path)
    nodes = walk(model)
    injection = Injection(name=check_name(file.name if name is None else name))
    placed = _place(file, nodes, strict)
    sites = _sites(file, placed, injection.name)
    if check_base:
        _check_base(file, sites)
    plan = Plan(injection, tuple(sites.values()), (), {str(path): len(sites)}, count_parameters(nodes))
    insert(nodes, plan, _filled(file, sites))
    return plan


def _place(file: AdapterFile, nodes: Sequence[Node], strict: bool) -> dict[str, Node]:
    """Returns the module of every site of the file, by the path in the file."""
    by_path = {path: node for node in nodes for path in node.paths}
    placed: dict[str, Node] = {}
    missing: list[str] = []
    for record in file.sites.values():
        owners = [record.owner(path) for path in (record.path, *record.aliases)]
        node = next((by_path[path] for path in owners if path in by_path), None)
        if node is None:
            near = nearest_paths(record.path, by_path)[:2]
            missing.append(record.path + (f" (nearest: {', '.join(near)})" if near else ""))
        else:
            placed[record.path] = node
    stray = sorted(set(file.entries) - set(file.sites))
    if stray:
        raise FormatError(f"{file.header.path}: tensors that belong to no site of the file:\n{listing(stray)}")
    if missing and (strict or not placed):
        raise MismatchError(
            f"{file.header.path}: the model has no module for {len(missing)} of {len(file.sites)} sites:\n"
            f"{listing(missing)}\nLoad it into the model that it was made for"
            + ("." if not placed else ", or pass strict=False to load the sites that are there.")
        )
    return placed


def _sites(file: AdapterFile, placed: Mapping[str, Node], name: str) -> dict[str, Site]:
    """Returns a checked site for every placed record; its layout equals the shapes in the file."""
    sites: dict[str, Site] = {}
    problems: list[LoraInjectError] = []
    wrong: list[str] = []
    for path, node in placed.items():
        record = file.sites[path]
        try:
            adapter_class = by_kind(record.kind)
            if not _serves(adapter_class, node.module, record.extras.get("parameter")):
                wrong.append(f"{path}: adapter {record.kind!r} does not serve {type(node.module).__name__}")
                continue
            site = make_site(node, adapter_class, record.config, name, record.extras)
        except ConfigError as problem:
            raise FormatError(f"{file.header.path}: {path}: {problem}") from problem
        except LoraInjectError as problem:
            problems.append(type(problem)(f"{path or '(root)'}: {problem}"))
            continue
        wrong += _compare(file, record, site)
        sites[path] = site
    if problems:
        raise type(problems[0])("\n".join(map(str, problems[:12])))
    if wrong:
        raise MismatchError(f"{file.header.path}: {len(wrong)} tensors do not fit:\n{listing(wrong)}")
    return sites


def _serves(adapter_class: type[Adapter], module: nn.Module, parameter: str | None) -> bool:
    """Says whether the class serves the module, or that parameter of it."""
    if parameter is None:
        return adapter_class.can_adapt(module)
    return module._parameters.get(parameter) is not None and adapter_class.can_adapt_parameter(module, parameter)


def _compare(file: AdapterFile, record: SiteRecord, site: Site) -> list[str]:
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


def _check_base(file: AdapterFile, sites: Mapping[str, Site]) -> None:
    real = {path: site for path, site in sites.items() if site.device.type != "meta"}
    found = fingerprints((site.module, site.adapter_class.touches(site.extras)) for site in real.values())
    differ = [path for path, base in zip(real, found, strict=True) if base != file.sites[path].base]
    if differ:
        raise MismatchError(
            f"{file.header.path}: made for other base weights: {len(differ)} of {len(sites)} sites differ:\n"
            f"{listing(differ)}\nLoad it into its own base, or pass check_base=False if you know that this one will do."
        )


@torch.no_grad()
def _filled(file: AdapterFile, sites: Mapping[str, Site]) -> list[Adapter]:
    """Returns one adapter per site, holding the file's numbers."""
    keys = [f"{file.sites[path].prefix}{key}" for path, site in sites.items() for key in site.layout]
    tensors = read_tensors(file.header, keys)
    if not all_finite(tensors.values()):
        bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        raise FormatError(f"{file.header.path}: NaN or infinity in {len(bad)} tensors:\n{listing(bad)}")
    built = []
    for path, site in sites.items():
        adapter = build(site)
        prefix = file.sites[path].prefix
        for key, parameter in parameters_of(adapter):
            parameter.copy_(tensors[prefix + key])
        built.append(adapter)
    return built
