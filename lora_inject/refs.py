"""Finding the adapters that a model carries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from .adapter import Adapter, parameters_of
from .errors import StateError, did_you_mean
from .host import Host
from .sites import join
from .tree import INNER, Node, modules, walk


class AdapterRef(NamedTuple):
    """One adapter in a model: its site's path, its name, the host and the adapter itself."""

    path: str
    name: str
    module: nn.Module
    adapter: Adapter

    @property
    def host_path(self) -> str:
        """The path of the host, which is that of the site unless the site is a parameter."""
        parameter = self.adapter.parameter
        return self.path if parameter is None else self.path[: -len(parameter)].rstrip(".")


Placed = tuple[Node, AdapterRef]
"""An adapter and the place of its host."""


def adapters(model: nn.Module) -> Iterator[AdapterRef]:
    """Returns an iterator over every adapter in the model, in the order of the modules, then of injection."""
    return adapters_in(walk(model))


def adapters_in(nodes: Iterable[Node]) -> Iterator[AdapterRef]:
    """Yields every adapter in the modules of a walk."""
    return (ref for _, ref in placed_in(nodes))


def placed_in(nodes: Iterable[Node], names: tuple[str, ...] = ()) -> Iterator[Placed]:
    """Yields every adapter in the modules of a walk, or those of the given names, and the place of its host."""
    for node in nodes:
        module = node.module
        if isinstance(module, Host):
            # Past nn.Module's __getattr__, which takes longer than all else here.
            for name, adapter in module._modules[INNER].named(names):  # type: ignore[union-attr, operator]
                yield node, AdapterRef(join(node.paths[0], adapter.parameter), name, module, adapter)


def by_host(refs: Iterable[AdapterRef]) -> list[list[AdapterRef]]:
    """Returns the adapters in groups of one host each, in order."""
    groups: dict[int, list[AdapterRef]] = {}
    for ref in refs:
        groups.setdefault(id(ref.module), []).append(ref)
    return list(groups.values())


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Returns the adapters' parameters by their keys in the model's state dict, to hand to an optimizer.

    Args:
        model: a model with adapters.
        name: only the adapters of this name; None means all.

    Raises:
        StateError: no adapter has that name.
    """
    names = pick(model, () if name is None else (name,))
    found = {
        f"{node.key}adapters.{held}.{key}": parameter
        for node in walk(model)
        if isinstance(node.module, Host)
        for held, adapter in node.module.adapters.items()
        if held.partition("@")[0] in names
        for key, parameter in parameters_of(adapter)
    }
    return unique(found)


T = TypeVar("T", bound=Tensor)


def unique(tensors: Mapping[str, T]) -> dict[str, T]:
    """Returns the tensors that several adapters share once, under the first of their keys."""
    first: dict[int, str] = {}
    for key, tensor in tensors.items():
        first.setdefault(id(tensor), key)
    return {key: tensors[key] for key in first.values()}


def pick(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the given names after checking each, or all names that the model has where none is given.

    Raises:
        StateError: the model carries no adapters, or none of one of the names.
    """
    return _checked((name for name, _ in held_adapters(model)), names)


def held_adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yields the name and the adapter of `adapters(model)` without their paths, which take longest to form."""
    for module in modules(model):
        if isinstance(module, Host):
            yield from module._modules[INNER].named()  # type: ignore[union-attr, operator]


def slots_of(module: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Returns the slots of a module's adapters of these names, or of all where none is given; none if it is no host."""
    return module._modules[INNER].slots(names) if isinstance(module, Host) else []  # type: ignore[union-attr, operator]


def named(model: nn.Module, names: tuple[str, ...]) -> list[Adapter]:
    """Returns the adapters of these names.

    Raises:
        StateError: as `pick` does.
    """
    held = [(name, adapter) for name, adapter in held_adapters(model) if name in names]
    if not {name for name, _ in held}.issuperset(names):
        pick(model, names)
    return [adapter for _, adapter in held]


def chosen(nodes: Sequence[Node], names: tuple[str, ...]) -> list[AdapterRef]:
    """Returns the adapters of the given names in the modules of a walk, or all where none is given.

    Raises:
        StateError: as `pick` does.
    """
    return [ref for _, ref in chosen_places(nodes, names)]


def chosen_places(nodes: Sequence[Node], names: tuple[str, ...]) -> Iterator[Placed]:
    """Yields what `chosen` returns, and the place of each host.

    Raises:
        StateError: as `pick` does, once all were yielded.
    """
    seen: set[str] = set()
    for entry in placed_in(nodes, names):
        seen.add(entry[1].name)
        yield entry
    if not seen or not seen.issuperset(names):
        _checked((ref.name for ref in adapters_in(nodes)), names)


def _checked(held: Iterable[str], names: tuple[str, ...]) -> tuple[str, ...]:
    known = tuple(dict.fromkeys(held))
    if not known:
        raise StateError("the model carries no adapters: call lora_inject.inject or load first")
    for name in names:
        if name not in known:
            raise StateError(f"no adapter is named {name!r}: {did_you_mean(str(name), known)}")
    return names or known
