"""What a host holds: its adapters by slot, and what a merge has kept to go back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from .bulk import init_module
from .errors import UnsupportedError
from .keeping import Kept


def slot(name: str, parameter: str | None = None) -> str:
    """Returns the key of an adapter in its host: its name, and the parameter it serves if it serves one alone."""
    return name if parameter is None else f"{name}@{parameter}"


class Adapters(nn.ModuleDict):
    """The child of a host, by whose name it stands in the tree and in the state dict."""

    kept: dict[str, Kept]
    merged_by: Any
    """The options of the last merge, by which others make it again; None before the first."""

    def __init__(self, training: bool) -> None:
        init_module(self, training=training, kept={}, merged_by=None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tells what is wrong where a module calls its children one by one, this one among them.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "a module that carries adapters calls every child that it has, and its adapters are one: uninject, and "
            "adapt the modules inside it instead"
        )

    def named(self, names: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
        """Yields the name and the adapter of every slot, or of those of these names where any is given."""
        for key, adapter in self._modules.items():
            name = key.partition("@")[0]
            if not names or name in names:
                yield name, adapter

    def slots(self, names: Collection[str]) -> list[str]:
        """Returns the slots of the adapters of these names, or all where none is given."""
        return [key for key in self._modules if not names or key.partition("@")[0] in names]

    def of(self, names: Collection[str]) -> list[Any]:
        """Returns the adapters of these names."""
        return [adapter for name, adapter in self.named() if name in names]

    def merged_names(self) -> list[str]:
        """Returns the names of the adapters that the host's parameters hold now."""
        return list(dict.fromkeys(name for name, adapter in self.named() if adapter.merged))
