"""Tied weights: which parameters are one, and which adapters share one pair because of that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .adapter import Adapter, parameters_of
from .host import Host
from .keeping import Replaced
from .tree import Held, held, tied, walk

Place = tuple[int, str]
"""Id of a module, and the name of one of its parameters."""


@dataclass(frozen=True, slots=True)
class Ties:
    """The parameters that are shared with other modules, as they are without any merge.

    Attributes:
        shared: places whose memory others hold too.
        one: for places that hold one and the same Parameter: all of them, in the order of the model.
    """

    shared: frozenset[Place] = frozenset()
    one: Mapping[Place, tuple[tuple[Any, str], ...]] = field(default_factory=dict)

    def leader(self, host: Any, key: str, holding: Mapping[int, Collection[str]]) -> tuple[Any, str] | None:
        """Returns the first holder of a parameter that all of its holders update by the same pairs, or None.

        Args:
            host: the module.
            key: the name of its parameter.
            holding: by id of a host, the adapters that it holds merged when all is done; others stay as they are.
        """
        group = self.one.get((id(host), key), ())
        pairs = {_pairs(module, name, holding) for module, name in group}
        return group[0] if len(pairs) == 1 and pairs != {()} else None

    def circle(self, hosts: Iterable[Any]) -> set[int]:
        """Returns the ids of these hosts and of all that hold one of their parameters."""
        ids = {id(host) for host in hosts}
        groups = [group for place, group in self.one.items() if place[0] in ids]
        return ids | {id(module) for group in groups for module, _ in group}


def _pairs(module: Any, key: str, holding: Mapping[int, Collection[str]]) -> tuple[tuple[int, float], ...]:
    """Returns what tells the updates of a parameter apart: the pairs that make them, and their scaling."""
    if not isinstance(module, Host):
        return ()
    names = holding.get(id(module), module.adapters.merged_names())
    using = [adapter for adapter in module.adapters.of(names) if key in adapter.delta_names(module)]
    return tuple((pair_of(adapter), adapter.scaling) for adapter in using)


def pair_of(adapter: Adapter) -> int:
    """Returns what adapters that share their parameters have in common."""
    return id(next((parameter for _, parameter in parameters_of(adapter)), adapter))


def share(owner: Adapter, member: Adapter) -> None:
    """Gives the second adapter the parameters of the first."""
    member._parameters.update(owner._parameters)
    owner.shared = member.shared = True


def find_ties(model: nn.Module) -> Ties:
    """Returns which parameters of the model are shared."""
    nodes = walk(model)
    originals = [
        (node.module, key, way.parameter)
        for node in nodes
        if isinstance(node.module, Host)
        for key, way in node.module.adapters.kept.items()
        if isinstance(way, Replaced) and way.parameter is not None
    ]
    replaced = {(id(module), key) for module, key, _ in originals}
    everything = [entry for entry in held(nodes) if (id(entry[0]), entry[1]) not in replaced] + originals
    return Ties(tied(everything), _one(everything))


def _one(everything: list[Held]) -> dict[Place, tuple[tuple[Any, str], ...]]:
    holders: dict[int, list[Held]] = defaultdict(list)
    for entry in everything:
        holders[id(entry[2])].append(entry)
    # A parameter that is a view of another one is in nobody's group: writing into it would reach the other.
    views = tied([group[0] for group in holders.values()])
    groups = [group for group in holders.values() if len(group) > 1 and (id(group[0][0]), group[0][1]) not in views]
    return {(id(one), key): tuple((m, name) for m, name, _ in group) for group in groups for one, key, _ in group}
