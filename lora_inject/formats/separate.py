"""A pair that several modules share, as one pair for each: other programs' files know no other way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..adapter_file import SiteRecord
from ..errors import UnsupportedError, listing
from ..registry import adapter_for
from ..tree import Node, walk
from .bundle import Bundle


def separated(bundle: Bundle, model: nn.Module | None) -> Bundle:
    """Returns the adapter with a site for every module that uses a pair, and no site with a second path.

    Tied weights have one update for all their modules, so that the same numbers, in the native layout, serve each.

    Raises:
        UnsupportedError: neither the file nor a model tells tied modules from one module at several paths, or one
            module has several holders, of which other programs put their layer into one alone.
    """
    shared = [record for record in bundle.sites.values() if record.aliases]
    if not shared:
        return bundle
    if model is None:
        if is_told(bundle):
            return _split(
                bundle, {own.path: (own, path) for path, record in bundle.sites.items() for own in _told(record)}
            )
        raise UnsupportedError(
            f"{bundle.path}: these sites have several paths, and only the model tells whether those are tied modules "
            f"or one:\n{listing([_names(record) for record in shared])}\nName the model (--model DIR)."
        )
    nodes = {path: node for node in walk(model) for path in node.paths}
    sites = {own.path: (own, path) for path, record in bundle.sites.items() for own in _each(record, nodes)}
    owners = [nodes[own.owner(own.path)] for own, _ in sites.values() if own.owner(own.path) in nodes]
    several = [" = ".join(node.paths) for node in owners if len(_holders(node, nodes)) > 1]
    if several:
        raise UnsupportedError(
            f"{bundle.path}: one module stands at several places of the model, and other programs adapt it at one of "
            f"them alone:\n{listing(list(dict.fromkeys(several)))}\n"
            "Keep lora_inject's format, or merge these sites into the base."
        )
    return _split(bundle, sites)


def is_told(bundle: Bundle) -> bool:
    """Says whether the adapter itself tells that every further path is that of a tied module."""
    return all(set(record.aliases) == set(record.tied) for record in bundle.sites.values())


def _split(bundle: Bundle, sites: Mapping[str, tuple[SiteRecord, str]]) -> Bundle:
    """Returns the adapter with these sites, each with the path of the one whose tensors it has."""
    entries = {path: bundle.entries[origin] for path, (_, origin) in sites.items()}
    return replace(bundle, sites={path: record for path, (record, _) in sites.items()}, entries=entries)


def _told(record: SiteRecord) -> list[SiteRecord]:
    kinds = {record.path: record.kind, **record.tied}
    return [record._replace(path=path, aliases=(), tied={}, kind=kind) for path, kind in kinds.items()]


def _names(record: SiteRecord) -> str:
    return " = ".join((record.path, *record.aliases))


def _each(record: SiteRecord, nodes: Mapping[str, Node]) -> list[SiteRecord]:
    """Returns a record for every module of the model that one leads to, or the record alone where there is none."""
    found: dict[int, SiteRecord] = {}
    for path in (record.path, *record.aliases):
        node = nodes.get(record.owner(path))
        if node is not None and id(node.module) not in found:
            serving = adapter_for(node.module) if path != record.path and "parameter" not in record.extras else None
            kind = record.kind if serving is None else serving.stored_as or serving.kind
            found[id(node.module)] = record._replace(path=path, aliases=(), tied={}, kind=kind)
    return list(found.values()) or [record._replace(aliases=(), tied={})]


def _holders(node: Node, nodes: Mapping[str, Node]) -> set[tuple[int, str]]:
    """Returns the modules that have this one as a child, and the child's names in them."""
    split = [path.rpartition(".") for path in node.paths]
    return {(id(nodes[owner].module), name) for owner, _, name in split if owner in nodes}
