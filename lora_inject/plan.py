"""Planning: which sites a set of targets selects, with every check, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .bulk import uncollected
from .config import Injection, SiteConfig, derive, dtype_name
from .errors import LoraInjectError, TargetError, UnsupportedError, listing
from .host import base_class, base_tensor
from .recipe import Recipe
from .selection import Candidate, Selection
from .sites import Site, make_site, share_sites
from .tables import dims, percent, table
from .targets import Target, as_targets, is_literal, matcher, nearest_paths
from .tree import Node, walk
from .weights import why_not


@dataclass(frozen=True, slots=True)
class Skipped:
    """A module that a pattern matched and that gets no adapter, and why."""

    path: str
    kind: str
    why: str


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """The ordered sites of one injection, what was skipped and why, and the hits of every pattern.

    A value: planning changes nothing, and printing it shows a table. `len(plan)` counts the sites.
    """

    injection: Injection
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    hits: Mapping[str, int]
    model_parameters: int
    notes: tuple[str, ...] = ()
    """What the user should know of how a loaded file was understood."""

    @property
    def name(self) -> str:
        """The name that the adapters share."""
        return self.injection.name

    @property
    def parameters(self) -> int:
        """How many numbers the adapters of all sites hold."""
        return sum(site.parameters for site in self.sites)

    @property
    def share(self) -> float:
        """The adapters' numbers as a share of the model's."""
        return self.parameters / max(1, self.model_parameters)

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __repr__(self) -> str:
        return f"<Plan {self.name!r}: {len(self)} sites, {self.parameters:,} parameters>"

    def __str__(self) -> str:
        headers = ("path", "module", "shape", "adapter", "rank", "parameters", "share")
        parts = [table(headers, [_row(site, self.model_parameters) for site in self.sites])]
        parts.append(f"{len(self)} sites, {self.parameters:,} parameters, {percent(self.share)} of the model")
        parts.append(table(("pattern", "sites"), list(self.hits.items())))
        if self.skipped:
            rows = [(skip.path or "(root)", skip.kind, skip.why) for skip in self.skipped]
            parts.append(table(("skipped", "module", "why"), rows, limit=20))
        if self.notes:
            parts.append("\n".join(self.notes))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as values that JSON can hold."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "model_parameters": self.model_parameters,
            "share": self.share,
            "hits": dict(self.hits),
            "sites": [_site_dict(site) for site in self.sites],
            "skipped": [{"path": skip.path, "module": skip.kind, "why": skip.why} for skip in self.skipped],
            "notes": list(self.notes),
        }


def _row(site: Site, total: int) -> tuple[object, ...]:
    kind = base_class(site.module).__name__
    share = percent(site.parameters / max(1, total))
    return (
        site.path or "(root)",
        kind,
        dims(site.shape),
        site.adapter_class.kind if site.owner is None else f"{site.adapter_class.kind}, shares {site.owner}",
        site.config.rank,
        site.parameters,
        share,
    )


def _site_dict(site: Site) -> dict[str, Any]:
    return {
        "path": site.path,
        "aliases": list(site.aliases),
        "module": base_class(site.module).__name__,
        "shape": list(site.shape),
        "adapter": site.adapter_class.kind,
        "rank": site.config.rank,
        "scaling": site.config.scaling,
        "dtype": dtype_name(site.dtype),
        "parameters": site.parameters,
        "owner": site.owner,
    }


@uncollected()
def plan(model: nn.Module, targets: object, **options: Any) -> Plan:
    """Returns what `inject` with the same arguments would do; changes nothing.

    Args:
        model: the model, on any device, the meta device included.
        targets: a pattern, a `Target`, a list of both, or a `Recipe`.
        **options: those of `inject`.

    Raises:
        ConfigError: an option or a name cannot be used.
        TargetError: a pattern selects no site; names the nearest paths.
        UnsupportedError: a selected module cannot be served exactly.
        StateError: a selected site has an adapter of that name already.
    """
    return plan_nodes(walk(model), targets, options)


def plan_nodes(nodes: Sequence[Node], targets: object, options: Mapping[str, Any]) -> Plan:
    """Returns what `plan` does, for a model that was walked already."""
    recipe = targets if isinstance(targets, Recipe) else Recipe(as_targets(targets))
    injection = recipe.injection.override(options)
    selection = Selection(recipe.targets)
    candidates = selection.candidates(nodes)
    sites, skipped, hits = _choose(candidates, recipe.targets, injection)
    for position, count in enumerate(hits):
        if not count:
            raise _no_site(selection, position, nodes, [c for c in candidates if position in c.hits], skipped)
    if injection.share_tied:
        sites = share_sites(sites)
    labels = [target.label for target in recipe.targets]
    return Plan(injection, tuple(sites), tuple(skipped), dict(zip(labels, hits, strict=True)), count_parameters(nodes))


def _choose(
    candidates: Sequence[Candidate], targets: Sequence[Target], injection: Injection
) -> tuple[list[Site], list[Skipped], list[int]]:
    """Returns the checked sites, what is skipped, and how many sites each target has."""
    excludes = [matcher(pattern) for pattern in injection.exclude]
    sites: list[Site] = []
    skipped: list[Skipped] = []
    hits = [0] * len(targets)
    problems: list[LoraInjectError] = []
    settings = _Settings(targets, injection)
    for candidate in candidates:
        why = _reason_to_skip(candidate, excludes)
        if why:
            skipped.append(Skipped(candidate.paths[0], base_class(candidate.node.module).__name__, why))
            continue
        try:
            sites.append(_site(candidate, settings))
        except LoraInjectError as problem:
            problems.append(type(problem)(f"{candidate.label}: {problem}"))
        for position in candidate.hits:
            hits[position] += 1
    if len(problems) > 1:
        raise type(problems[0])(f"{len(problems)} sites cannot be adapted:\n" + listing([str(p) for p in problems]))
    if problems:
        raise problems[0]
    return sites, skipped, hits


def _reason_to_skip(candidate: Candidate, excludes: Sequence[Callable[[str], bool]]) -> str:
    if any(matches(path) for matches in excludes for path in (*candidate.paths, *candidate.node.paths)):
        return "excluded"
    if candidate.adapter_class is not None:
        return ""
    if candidate.parameter is not None:
        tensor: Any = base_tensor(candidate.node.module, candidate.parameter)
        return why_not(tensor, tensor.dtype) or (
            f"it has {tensor.dim()} axes, and only parameters of two or three can be factored: "
            'Target(..., adapter="full") trains it as a whole'
        )
    if isinstance(candidate.node.module, torch.jit.ScriptModule):
        return "a TorchScript module cannot be changed: inject before torch.jit.script or trace"
    return f"no adapter class serves {base_class(candidate.node.module).__name__}"


class _Settings(dict[tuple[int, ...], tuple[SiteConfig, dict[str, Any]]]):
    """Options and extras of a site by the targets that select it, formed once; the last target that says one wins."""

    def __init__(self, targets: Sequence[Target], injection: Injection) -> None:
        self.targets, self.injection = targets, injection

    def __missing__(self, hits: tuple[int, ...]) -> tuple[SiteConfig, dict[str, Any]]:
        options: dict[str, Any] = {}
        extras: dict[str, Any] = {}
        for position in hits:
            options.update(self.targets[position].options)
            extras.update(self.targets[position].extras)
        self[hits] = derive(self.injection.site, tuple(options.items())), extras
        return self[hits]


def _site(candidate: Candidate, settings: _Settings) -> Site:
    config, extras = settings[candidate.hits]
    if candidate.parameter is not None:
        extras = {**extras, "parameter": candidate.parameter}
    assert candidate.adapter_class is not None
    return make_site(candidate.node, candidate.adapter_class, config, settings.injection.name, extras)


def _no_site(
    selection: Selection, position: int, nodes: Sequence[Node], matched: Sequence[Candidate], skipped: Sequence[Skipped]
) -> LoraInjectError:
    """Returns the error for a target that selects no site."""
    target = selection.targets[position]
    if matched:
        paths = {candidate.paths[0] for candidate in matched}
        lines = [f"{skip.path or '(root)'} ({skip.kind}): {skip.why}" for skip in skipped if skip.path in paths]
        kind = UnsupportedError if is_literal(target.pattern) and not lines[0].endswith("excluded") else TargetError
        return kind(
            f"target {target.pattern!r} matches {len(matched)} places, but none can be adapted:\n{listing(lines)}\n"
            "Choose modules inside them, or register an adapter class for them."
        )
    other = sorted({base_class(node.module).__name__ for node in nodes if selection.matches(position, node)})
    if other:
        kinds = ", ".join(other)
        if target.type is None:
            return TargetError(
                f"target {target.pattern!r}: adapter={target.adapter!r} finds nothing to serve in {kinds} itself: "
                f"select what is inside, for example {f'{target.pattern}.*'!r}"
            )
        return TargetError(f"target {target.pattern!r}: type={target.type!r} fits none of its modules ({kinds})")
    return TargetError(
        f"target {target.pattern!r} matches no module: a pattern covers the whole dotted path. "
        + _hint(target.pattern, [path for node in nodes for path in node.paths])
    )


def _hint(pattern: str, paths: Sequence[str]) -> str:
    near = nearest_paths(pattern, paths)
    hint = f"The nearest paths are:\n{listing(near)}" if near else "Print lora_inject.plan(model, '*') to see them all."
    deeper = f"*.{pattern}"
    below = 0 if pattern.startswith(("re:", "*")) else sum(map(matcher(deeper), paths))
    return f"{hint}\nThe pattern {deeper!r} would match {below} modules." if below else hint


def count_parameters(nodes: Sequence[Node]) -> int:
    """Returns how many numbers the modules' parameters hold, shared ones once, adapters left out."""
    unique = {id(p): p for node in nodes for p in node.module._parameters.values() if p is not None}
    shaped = (p for p in unique.values() if type(p) is nn.Parameter or not nn.parameter.is_lazy(p))
    return sum(p.numel() for p in shaped)
