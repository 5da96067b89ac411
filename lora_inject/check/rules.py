"""Rules that readers of adapters have, each a row: what it finds in an adapter, and what to do about it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..formats.peft_patterns import ends, last, selects
from .facts import Facts

Severity = Literal["refused", "dropped", "mis-scaled", "fine"]
Finds = Callable[[Facts], Sequence[str]]
STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that servers stack into one matrix."""


@dataclass(frozen=True)
class Rule:
    """One rule of a reader.

    Attributes:
        name: its name, for reports.
        severity: what happens to what it finds: the reader says no, it leaves it out without a word, it scales it
            otherwise, or it copes.
        finds: returns the sites, or other places, that break the rule.
        what: what happens.
        do: what to do about it.
    """

    name: str
    severity: Severity
    finds: Finds
    what: str
    do: str


@dataclass(frozen=True)
class Finding:
    """A rule that an adapter breaks, and where.

    Attributes:
        rule: name of the rule.
        severity: "refused", "dropped", "mis-scaled" or "fine".
        what: what happens.
        do: what to do about it.
        sites: where.
    """

    rule: str
    severity: Severity
    what: str
    do: str
    sites: tuple[str, ...]


def broken(rule: Rule, facts: Facts) -> Finding | None:
    """Returns what a rule finds in an adapter, or None."""
    sites = tuple(rule.finds(facts))
    return Finding(rule.name, rule.severity, rule.what, rule.do, sites) if sites else None


def biases(facts: Facts) -> list[str]:
    """Finds pairs with a bias."""
    return [one.site for one in facts.pairs if one.bias is not None]


def features(facts: Facts) -> list[str]:
    """Finds tensors of something other than low-rank pairs."""
    return [f"{feature}: {name}" for feature, names in facts.features.items() for name in names]


def unreadable(facts: Facts) -> list[str]:
    """Finds an adapter that lora_inject itself cannot read for a reason that no other rule names."""
    return [facts.problem] if facts.problem and not facts.features else []


def whole(facts: Facts) -> Sequence[str]:
    """Finds parameters trained as a whole."""
    return facts.full


def not_of(*kinds: str) -> Finds:
    """Finds pairs of other kinds than these, and sites that no other program knows."""
    return lambda facts: [
        *(f"{one.site}: {one.kind}" for one in facts.pairs if one.kind not in kinds),
        *facts.others,
    ]


def rank_above(limit: int) -> Finds:
    """Finds pairs of a higher rank."""
    return lambda facts: [f"{one.site}: rank {one.rank}" for one in facts.pairs if one.rank > limit]


def ranks_differ(facts: Facts) -> list[str]:
    """Finds pairs of another rank than most."""
    rank = facts.header[1]
    return [f"{one.site}: rank {one.rank}, others {rank}" for one in facts.pairs if one.rank != rank]


def scale_of_header(facts: Facts) -> list[str]:
    """Finds pairs whose scale is not the one of the config's first keys, patterns left out."""
    alpha, rank, root = facts.header
    return facts.scaled(alpha, rank, root)


def scale_without_root(facts: Facts) -> list[str]:
    """Finds pairs whose scale is not lora_alpha / r."""
    alpha, rank, _ = facts.header
    return facts.scaled(alpha, rank)


def scale_by_own_rank(facts: Facts) -> list[str]:
    """Finds pairs whose scale is not lora_alpha / their own rank."""
    return facts.scaled(facts.header[0])


def wide(facts: Facts) -> list[str]:
    """Finds pairs that are wider than half precision."""
    return facts.dtypes()


def expression(facts: Facts) -> list[str]:
    """Finds target_modules that is an expression instead of a list."""
    targets = facts.config.get("target_modules")
    return [f"target_modules = {targets[:80]!r}"] if isinstance(targets, str) and targets != "all-linear" else []


def unselected(facts: Facts) -> list[str]:
    """Finds pairs of modules that the config's own target_modules and exclude_modules leave out."""
    if facts.format != "peft":
        return []
    where = f"{facts.path}: adapter_config.json"
    parameters = facts.config.get("target_parameters") or []
    return [
        one.site
        for one in facts.pairs
        if not ends(one.site, parameters) and not selects(facts.config, _wrapped(one.path, one.kind, facts), where)
    ]


def _wrapped(path: str, kind: str, facts: Facts) -> str:
    """Returns the module that PEFT wraps for a site: the attention for its output projection."""
    owner = path.removesuffix(".out_proj")
    attentions = {one.path for one in facts.pairs if one.kind == "attention"}
    return owner if owner in attentions else path


def part_of_a_stack(facts: Facts) -> list[str]:
    """Finds layers that are stacked with others of which some have no pair."""
    members: dict[tuple[str, tuple[str, ...]], set[str]] = defaultdict(set)
    for one in facts.pairs:
        stack = next((stack for stack in STACKS if last(one.path) in stack), None)
        if stack is not None:
            members[one.path.rpartition(".")[0], stack].add(last(one.path))
    return [
        f"{owner}: {', '.join(sorted(found))} without {', '.join(name for name in stack if name not in found)}"
        for (owner, stack), found in members.items()
        if len(found) < len(stack)
    ]


def gaps(facts: Facts) -> list[str]:
    """Finds layers without a pair, of a kind (last segment) of which others have one.

    Without a model, only numbers that another kind of layer has tell of a gap.
    """
    have = {one.path for one in facts.pairs}
    if facts.layers is not None:
        used = {last(path) for path in have}
        return sorted(path for path in facts.layers - have if last(path) in used)
    numbered = [(match[1], match[2], match[3]) for path in have if (match := re.match(r"(.*?\.)(\d+)(\..*)", path))]
    counts: dict[str, set[str]] = defaultdict(set)
    for head, number, _ in numbered:
        counts[head].add(number)
    kinds = {(head, tail) for head, _, tail in numbered}
    return sorted(
        f"{head}{number}{tail}"
        for head, tail in kinds
        for number in counts[head]
        if (head, number, tail) not in numbered
    )
