"""Putting adapters into a model and taking them out again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .bulk import uncollected
from .commit import Undo, all_or_nothing
from .errors import StateError, UnsupportedError
from .freezing import adopt, freeze, thaw
from .host import is_host, is_outermost
from .merging import bake_host, merge_again, unmerge_host
from .offload import guard, hooks_on, release
from .plan import Plan, plan_nodes
from .refs import AdapterRef, adapters, by_host, chosen, pick, slots_of
from .sites import Site
from .swap import attach, class_for, detach, restorer
from .ties import Ties, find_ties, share
from .tree import INNER, Node, modules, walk


@uncollected()
def inject(model: nn.Module, targets: object, **options: Any) -> Plan:
    """Puts low-rank adapters into the modules that the targets select, in place, and returns the plan.

    All or nothing: an error, or Ctrl-C, leaves the model as it was, bit for bit and flag for flag. Outputs are equal
    to before until the adapters are trained, because B starts at zero.

    Args:
        model: any module; its selected modules become hosts and stay the same objects.
        targets: a glob such as "*.q_proj", a regular expression after "re:", a `Target`, a list of these, or a
            `Recipe`. Every pattern must select at least one site.
        **options: what follows, each for all sites unless a `Target` overrides it.
            rank (int, 8): inner size of the factors.
            alpha (float, None): scaling = alpha / rank; None means alpha = rank.
            dropout (float, 0.0): dropout on the low-rank path while training.
            exclude (pattern or patterns, ()): paths to leave out.
            name (str, "default"): the name that these adapters share.
            bias (bool, False): biases on A and B, merged into the base's bias.
            rslora (bool, False): scaling = alpha / sqrt(rank).
            dense (bool, False): a full-size update where the factors would hold as many numbers.
            init (str, "kaiming"): how A is drawn: kaiming, gaussian or orthogonal.
            factorization (str, "pointwise"): for convolutions: pointwise or balanced.
            dtype (torch.dtype, None): of A and B; None means float32 for half-precision bases, else the base's.
            train_a (bool, True): False keeps A as it was drawn, so that nothing the size of the input is kept for the
                backward pass (LoRA-FA).
            freeze (bool, True): everything but adapters stops training, until the last adapter goes.
            share_tied (bool, False): sites that hold one and the same weight (a tied embedding and head) share one
                pair A, B, which is trained from all its uses and merged into the weight without untying it.
            seed (int, None): draws A reproducibly, whatever the order of modules; None uses the global generator.

    Raises:
        ConfigError: an option cannot be used.
        TargetError: a pattern selects no site.
        UnsupportedError: a selected module cannot be served exactly.
        StateError: a selected site has an adapter of that name already.
    """
    nodes = walk(model)
    planned = plan_nodes(nodes, targets, options)
    seed = planned.injection.seed
    built = [build(site) for site in planned]
    by_path = {site.path: adapter for site, adapter in zip(planned, built, strict=True)}
    for site, adapter in zip(planned, built, strict=True):
        if site.owner is None:
            adapter.reset(None if seed is None else _generator(seed, site.path))
        else:
            share(by_path[site.owner], adapter)
    insert(nodes, planned, built)
    return planned


def build(site: Site) -> Adapter:
    """Returns a new adapter for the site, its numbers not set, and makes sure that the module's class can change."""
    adapter = site.adapter_class(site.config, site.layout, site.dtype, site.device, site.extras)
    try:
        class_for(site.module, adapter)
    except Exception as error:
        kind = type(site.module).__name__
        raise UnsupportedError(f"{site.path}: {kind} refuses to be subclassed: {error}") from error
    return adapter


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{path}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def insert(nodes: list[Node], planned: Plan, built: list[Adapter]) -> None:
    """Attaches one built adapter per site, and freezes the rest of the walked model if asked to; all or nothing."""
    with all_or_nothing() as undo:
        for site, adapter in zip(planned, built, strict=True):
            undo(restorer(site.module))
            attach(site.module, planned.name, adapter)
        everything = [node.module for node in nodes]
        for hook in hooks_on(everything):
            undo(partial(release, hook))
            guard(hook)
        if planned.injection.freeze:
            freeze(everything, undo)


@uncollected()
def uninject(model: nn.Module, name: str | None = None, *, keep_merged: bool = False) -> None:
    """Takes adapters out: same objects, classes, keys, bytes, flags and hooks as before the injection.

    Merged weights are unmerged first, unless they are to be kept. When the last adapter goes, every parameter gets
    the `requires_grad` back that it had before the injection.

    Args:
        model: a model with adapters.
        name: only the adapters of this name; None means all.
        keep_merged: leave the merged weights in place and remove everything else.

    Raises:
        StateError: no such adapter; `keep_merged` without a merge; or a class that was changed after the injection.
    """
    names = () if name is None else (name,)
    everything = list(modules(model))
    hosts = [(module, slots) for module in everything if (slots := slots_of(module, names))]
    if not hosts:
        pick(model, names)
    ties, merged = Ties(), []
    # Paths are looked up where they are needed: for thousands of hosts that takes as long as taking adapters out.
    if keep_merged or not all(_is_plain(module, slots) for module, slots in hosts):
        refs = chosen(walk(model), names)
        _check_removable(refs, keep_merged)
        ties = find_ties(model)
        merged = _leaving(model, refs, ties)
    with all_or_nothing() as undo:
        _settle(merged, keep_merged, ties, undo)
        for module, slots in hosts:
            undo(restorer(module))
            detach(module, slots)
        if not any(is_host(module) for module in everything):
            for hook in hooks_on(everything):
                undo(partial(guard, hook))
                release(hook)
            thaw(everything, undo)


def _is_plain(host: Any, slots: list[str]) -> bool:
    """Says whether taking these adapters out is nothing but taking them out."""
    held = host._modules[INNER]._modules
    return is_outermost(host) and not any(held[key].merged for key in slots)


def _check_removable(refs: list[AdapterRef], keep_merged: bool) -> None:
    for ref in refs:
        if not is_outermost(ref.module):  # type: ignore[arg-type]
            raise StateError(
                f"{ref.path}: its class was changed to {type(ref.module).__name__} after the injection; undo that "
                "first (last in, first out), then uninject"
            )
        if keep_merged and not ref.adapter.merged:
            raise StateError(
                f"{ref.path}: adapter {ref.name!r} is not merged, so keep_merged=True has nothing to keep: call "
                "lora_inject.merge(model) first, or uninject without keep_merged"
            )


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A merged host that some adapters leave, or that holds a weight of one: what it holds now, and what stays."""

    host: Any
    path: str
    merged: list[str]
    staying: list[str]


def _leaving(model: nn.Module, refs: list[AdapterRef], ties: Ties) -> list[_Leaving]:
    names = {ref.name for ref in refs}
    circle = ties.circle([ref.module for ref in refs if ref.adapter.merged])
    found = []
    for group in by_host(adapters(model)):
        host: Any = group[0].module
        merged = host.adapters.merged_names()
        if id(host) in circle and merged:
            found.append(_Leaving(host, group[0].host_path, merged, [name for name in merged if name not in names]))
    return found


def _settle(hosts: list[_Leaving], keep: bool, ties: Ties, undo: Undo) -> None:
    """Brings the hosts' parameters to what they must be once some adapters leave."""
    again = [one for one in hosts if one.staying]
    for one in again if keep else hosts:
        unmerge_host(one.host, undo)
    if keep:
        merge_again(
            [(one.host, one.path, [n for n in one.merged if n not in one.staying]) for one in again], ties, undo
        )
        for one in hosts:
            adopt(one.host, bake_host(one.host, undo), undo)
    merge_again([(one.host, one.path, one.staying) for one in again], ties, undo)
