"""Walks a module tree once: each module once, with every path that leads to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""Children under which torch.compile and activation checkpointing hide the module that they wrap."""

INNER = "adapters"
"""The child of a host that holds its adapters; the walk does not enter it."""


@dataclass(frozen=True, slots=True)
class Away:
    """Where accelerate keeps a module's tensors while nothing runs; their own entries are on the meta device then."""

    hook: Any
    start: int
    """Length of the state-dict prefix of the module that the hook sits on; it may hold whole subtrees."""

    @property
    def device(self) -> torch.device | None:
        """Where the tensors are while the module runs."""
        found = self.hook.execution_device
        return None if found is None else torch.device(found)

    def tensor(self, key: str) -> torch.Tensor:
        """Returns the tensor with this key of the model's state dict."""
        found: torch.Tensor = self.hook.weights_map[key[self.start :]]
        return found


def offloading(hook: Any) -> list[Any]:
    """Returns those of accelerate's hooks, chained or single, that put a module's tensors away; none for None."""
    return [one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False)]


@dataclass(slots=True)
class Node:
    """One module of the tree.

    Attributes:
        module: the module itself.
        paths: its dotted paths without wrapper segments, first found first; the rest are aliases.
        key: the prefix of its entries in the model's state dict ("" for the root, else ends with ".").
        away: where its tensors are, if accelerate offloads them.
    """

    module: nn.Module
    paths: list[str]
    key: str
    away: Away | None = None

    @property
    def path(self) -> str:
        """The first path."""
        return self.paths[0]


def _unwrap(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    for name in WRAPPERS:
        # Not get(): TorchScript's table of children has none.
        if name in module._modules:
            # CheckpointWrapper takes its own segment out of state-dict keys, torch.compile does not.
            inner: Any = module._modules[name]
            return _unwrap(inner, key if name == "_checkpoint_wrapped_module" else f"{key}{name}.")
    return module, key


def _is_host(module: nn.Module) -> bool:
    return getattr(type(module), "is_lora_host", False)


def walk(model: nn.Module, key: str = "", away: Away | None = None) -> list[Node]:
    """Returns every module of the model once, in the order of `named_modules()`, adapters left out.

    Args:
        model: the root of the walk.
        key: the prefix of its entries in the state dict, where it is part of a larger model.
        away: where its tensors are, if a module above it has them offloaded.
    """
    nodes: dict[int, Node] = {}
    above: set[int] = set()

    def visit(module: nn.Module, path: str, key: str, away: Away | None) -> None:
        if module._modules:
            module, key = _unwrap(module, key)
        ident = id(module)
        if ident in above:
            return
        if "_hf_hook" in module.__dict__:
            for hook in offloading(module.__dict__["_hf_hook"]):
                away = Away(hook, len(key))
        node = nodes.get(ident)
        if node is None:
            nodes[ident] = Node(module, [path], key, away)
        elif path not in node.paths:
            node.paths.append(path)
        children = module._modules
        if not children:
            return
        above.add(ident)
        inherited = away if away is not None and away.hook.place_submodules else None
        start = f"{path}." if path else ""
        for name, child in children.items():
            if child is not None and not (name == INNER and _is_host(module)):
                visit(child, start + name, f"{key}{name}.", inherited)
        above.discard(ident)

    visit(model, "", key, away)
    return list(nodes.values())


def modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules of a walk, in its order, without what it knows of them, which takes most of its time."""
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module._modules:
            module, _ = _unwrap(module, "")
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        below = [
            child
            for name, child in module._modules.items()
            if child is not None and not (name == INNER and _is_host(module))
        ]
        waiting += below[::-1]


Held = tuple[nn.Module, str, torch.Tensor]
"""A parameter with the module and the name that it is held under."""


def held(nodes: Iterable[Node]) -> Iterator[Held]:
    """Yields every parameter once for each module that holds it."""
    for node in nodes:
        for name, parameter in node.module._parameters.items():
            if parameter is not None:
                yield node.module, name, parameter


def tied(parameters: Iterable[Held]) -> frozenset[tuple[int, str]]:
    """Returns (id of module, parameter name) of every parameter that shares memory with one held elsewhere."""
    holders: dict[int, list[tuple[int, int, int, str]]] = defaultdict(list)
    for module, name, parameter in parameters:
        storage, start, end = _extent(parameter)
        holders[storage].append((start, end, id(module), name))
    found: set[tuple[int, str]] = set()
    for group in holders.values():
        group.sort()
        for i, (_, end, holder, name) in enumerate(group):
            for start, _, other, other_name in group[i + 1 :]:
                if start >= end:
                    break
                found |= {(holder, name), (other, other_name)}
    return frozenset(found)


def _extent(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Returns the storage of a tensor and the range of elements that it covers there."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return id(tensor), 0, 1
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return int(tensor.untyped_storage()._cdata), start, start + max(1, int(span))
