"""Which modules and parameters a list of targets selects, before any check of whether they can be served."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn.utils.parametrize import ParametrizationList

from .adapter import Adapter
from .host import base_class
from .registry import adapter_for, adapter_for_parameter, by_kind
from .sites import join
from .targets import Target, matcher
from .tree import Node


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module, or one of its parameters, that a target selects.

    Attributes:
        node: the module and its paths.
        parameter: the name of the parameter, or None for the module as a whole.
        adapter_class: the class that serves it, or None where none can.
        hits: positions of the targets that select it, in order.
    """

    node: Node
    parameter: str | None
    adapter_class: type[Adapter] | None
    hits: tuple[int, ...]

    @property
    def paths(self) -> list[str]:
        """All paths of the module or parameter."""
        return [join(path, self.parameter) for path in self.node.paths]

    @property
    def label(self) -> str:
        """Path and class, for messages."""
        return f"{self.paths[0] or '(root)'} ({base_class(self.node.module).__name__})"


class Selection:
    """Applies targets to a tree: patterns meet each module's paths, and parameters where no class serves the module."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = targets
        self.tests: list[Callable[[str], bool]] = [matcher(target.pattern) for target in targets]
        self.asking = any(target.adapter is not None for target in targets)

    def candidates(self, nodes: Sequence[Node]) -> list[Candidate]:
        """Returns everything that a target selects, in the order of the tree, each module or parameter once."""
        inherited: dict[int, set[int]] = defaultdict(set)
        return [candidate for node in nodes for candidate in self._of(node, inherited)]

    def matches(self, position: int, node: Node, parameter: str | None = None) -> bool:
        """Says whether a target selects the module, or its parameter, by path; its type is left aside."""
        paths = node.paths if parameter is None else [join(path, parameter) for path in node.paths]
        return any(map(self.tests[position], paths))

    def _hits(self, node: Node, parameter: str | None = None) -> set[int]:
        positions = range(len(self.tests))
        return {i for i in positions if self.matches(i, node, parameter) and self.targets[i].accepts(node.module)}

    def _of(self, node: Node, inherited: dict[int, set[int]]) -> Iterator[Candidate]:
        module = node.module
        hits = self._hits(node) | inherited.pop(id(module), set())
        if not hits and not module._parameters:
            return
        adapter_class = self._asked(hits) or adapter_for(module)
        parts = adapter_class.parts(module) if adapter_class is not None else ()
        if parts is None:
            if hits:
                yield Candidate(node, None, adapter_class, tuple(sorted(hits)))
            if self.asking:
                yield from self._asked_parameters(node)
            return
        if adapter_class is None and hits:
            yield Candidate(node, None, None, tuple(sorted(hits)))
        if adapter_class is not None:
            for name in adapter_class.also(module):
                inherited[id(module._modules[name])] |= hits
        yield from self._parameters(node, adapter_class, parts, hits)

    def _asked(self, hits: set[int]) -> type[Adapter] | None:
        """Returns the class that the last of these targets with a wish asks for, or None."""
        asked = [self.targets[i].adapter for i in sorted(hits) if self.targets[i].adapter is not None]
        return by_kind(asked[-1]) if asked else None

    def _asked_parameters(self, node: Node) -> Iterator[Candidate]:
        """Yields parameters of a module served as a whole that a target selects by path with a class of its own."""
        for name, parameter in node.module._parameters.items():
            hits = self._hits(node, name) if parameter is not None else set()
            asked = self._asked(hits)
            if asked is not None:
                served = asked if asked.can_adapt_parameter(node.module, name) else None
                yield Candidate(node, name, served, tuple(sorted(hits)))

    def _parameters(
        self, node: Node, owner: type[Adapter] | None, parts: tuple[str, ...], hits: set[int]
    ) -> Iterator[Candidate]:
        """Yields the parameters that come with the module (its parts), and those that a pattern selects by path."""
        parameters: dict[str, Any] = node.module._parameters
        if isinstance(node.module, ParametrizationList):
            # The weight that they compute is the site, on the module that is parametrized.
            return
        for name, parameter in parameters.items():
            if parameter is None:
                continue
            own = self._hits(node, name)
            wanted = own | hits if name in parts else own
            served: type[Adapter] | None = self._asked(own) or owner
            if served is None:
                served = adapter_for_parameter(node.module, name) if wanted else None
            elif not served.can_adapt_parameter(node.module, name):
                served = None
            # A bias or norm that matches only because its module does is not worth a line in the plan.
            if wanted and (served is not None or name in parts or not own <= hits):
                yield Candidate(node, name, served, tuple(sorted(wanted)))
