"""The parameters of a checkpoint's model, and which kind of adapter each of them gets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..adapter import Adapter
from ..checkpoint.base import Base
from ..checkpoint.model_names import ModelNames
from ..checkpoint.names import HeaderNames, Names
from ..errors import LoraInjectError
from ..registry import adapter_for, adapter_for_parameter, by_kind
from ..sites import join
from ..tree import walk

_EMBEDDING = re.compile(
    r"(.*_)?(embed|embeds|embedding|embeddings|embed_tokens|embed_positions|wte|wpe|relative_attention_bias)|shared"
)
_EITHER_WAY = re.compile(r"c_attn|c_proj|c_fc|q_attn")
_TRANSPOSED = re.compile(r".*(transpose|deconv|up_?conv).*", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Place:
    """The site that a parameter gets: the class that serves it, and how the file names it."""

    kind: type[Adapter]
    paths: tuple[str, ...]
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter of the model.

    Attributes:
        owners: the paths of its module, the first one first.
        name: its name there.
        shape: its shape.
        place: the site that it gets, or None where it is neither a matrix nor a stack of such.
    """

    owners: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    place: Place | None

    @property
    def paths(self) -> tuple[str, ...]:
        """Its own paths."""
        return tuple(join(owner, self.name) for owner in self.owners)

    @property
    def whole(self) -> Place:
        """The site that it gets where it is stored whole."""
        return Place(by_kind("full"), self.paths, {"parameter": self.name})


def find_names(base: Base) -> tuple[Names, str]:
    """Returns the names of a checkpoint, from the model of its config where there is one, and a note on how."""
    if "model_type" not in (base.config or {}):
        return HeaderNames(base), "kinds of adapters were chosen by names and shapes: there is no config of a model"
    try:
        return ModelNames(base), "kinds of adapters are those of the model that config.json describes"
    except LoraInjectError as error:
        return HeaderNames(base), f"kinds of adapters were chosen by names and shapes: {error}"


def parameters(names: Names, base: Base) -> list[Parameter]:
    """Returns the parameters of the model; of the headers where that is all that is known."""
    return list(_of_model(names.model) if isinstance(names, ModelNames) else _of_headers(base))


def _of_model(model: nn.Module) -> Iterator[Parameter]:
    for node in walk(model):
        for name, parameter in node.module._parameters.items():
            if parameter is not None:
                paths = tuple(node.paths)
                yield Parameter(paths, name, tuple(parameter.shape), _place(node.module, paths, name))


def _place(module: nn.Module, owners: tuple[str, ...], name: str) -> Place | None:
    """Returns the site that `inject` would give the parameter."""
    kind = adapter_for(module)
    if kind is not None and kind.stacks and kind.parts(module) is None and kind.touches({})[:1] == (name,):
        return Place(kind, owners)
    own = adapter_for_parameter(module, name)
    if own is None or not own.stacks:
        return None
    return Place(own, tuple(join(owner, name) for owner in owners), {"parameter": name})


def _of_headers(base: Base) -> Iterator[Parameter]:
    for key, place in base.tensors.items():
        owner, _, name = key.rpartition(".")
        yield Parameter((owner,), name, place.entry.shape, _guess(owner, name, place.entry.shape))


def _guess(owner: str, name: str, shape: tuple[int, ...]) -> Place | None:
    """Returns the likely site of a tensor; the adapter of a single parameter wherever a name may mean two classes."""
    last, axes = owner.rpartition(".")[2], len(shape)
    known = name == "weight" and owner
    if known and axes == 2 and not _EITHER_WAY.fullmatch(last):
        return Place(by_kind("embedding" if _EMBEDDING.fullmatch(last) else "linear"), (owner,))
    if known and axes in (3, 4, 5):
        return Place(by_kind("conv_transpose" if _TRANSPOSED.fullmatch(last) else "conv"), (owner,))
    if axes in (2, 3):
        return Place(by_kind("parameter"), (join(owner, name),), {"parameter": name})
    return None
