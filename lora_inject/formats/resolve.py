"""From another program's names and layouts to sites: with the model where there is one, else by what the file tells."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from ..adapter import Adapter
from ..adapter_file import SiteRecord
from ..config import SiteConfig
from ..errors import ConfigError, FormatError, MismatchError, listing
from ..factored import FactoredAdapter
from ..host import base_tensor
from ..registry import adapter_for, adapter_for_parameter, by_kind
from ..tree import Node, walk
from .bundle import Bundle, described
from .factors import Factors
from .orient import inward
from .prefixes import aligned


def same(path: str) -> str:
    """Returns the path itself: the file spells paths as the model does."""
    return path


@dataclass(frozen=True, eq=False, kw_only=True)
class Parsed:
    """What a file of another program holds, in its own spelling, every tensor of it in one of the two mappings.

    Attributes:
        path: the file or folder, for messages.
        factors: the low-rank updates.
        full: trained values that replace a parameter, by the parameter's path.
        name: the adapter's name.
        spell: how the file spells the path of a module of the model.
        notes: what the user should know of how the file was understood.
    """

    path: Path
    factors: Iterable[Factors]
    full: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = "default"
    spell: Callable[[str], str] = same
    notes: tuple[str, ...] = ()


def resolve(parsed: Parsed, model: nn.Module | None) -> Bundle:
    """Returns the adapter in the native layout.

    A site that the model lacks keeps the file's spelling and the kind that the file suggests, so that `load` can say
    all that is missing at once.

    Raises:
        FormatError: factors that do not belong together, or one site twice.
        MismatchError: several modules of the model are spelled like one in the file.
    """
    factors = [one.checked(parsed.path) for one in parsed.factors]
    if not factors and not parsed.full:
        raise FormatError(f"{parsed.path}: the file holds no adapter")
    nodes = {path: node for node in walk(model) for path in node.paths} if model is not None else {}
    owners = [one.path for one in factors] + [path.rpartition(".")[0] for path in parsed.full]
    place, note = _places(parsed, owners, nodes)
    sites: dict[str, SiteRecord] = {}
    entries: dict[str, dict[str, Tensor]] = {}
    for one in factors:
        record, tensors = _site(replace(one, path=place(one.path)), nodes)
        if record.path in sites:
            raise FormatError(f"{parsed.path}: site {record.path!r} stands twice")
        sites[record.path], entries[record.path] = record, tensors
    full = {_renamed(path, place): tensor for path, tensor in parsed.full.items()}
    sites = {path: described(record, entries[path]) for path, record in sites.items()}
    notes = (*parsed.notes, *([note] if note else []))
    return Bundle(parsed.path, parsed.name, sites, entries, full, notes)


def _renamed(parameter: str, place: Callable[[str], str]) -> str:
    owner, _, name = parameter.rpartition(".")
    return f"{place(owner)}.{name}".lstrip(".")


def _places(parsed: Parsed, owners: list[str], nodes: Mapping[str, Node]) -> tuple[Callable[[str], str], str]:
    """Returns what turns the file's spelling into the model's paths, and a note where that was not plain."""
    if not nodes:
        return same, ""
    spelled: dict[str, list[str]] = defaultdict(list)
    for path in nodes:
        spelled[parsed.spell(path)].append(path)
    found = aligned(list(dict.fromkeys(owners)), spelled)
    move, note = found or (same, "")
    clashes = [
        f"{owner}: {' or '.join(spelled[move(owner)])}"
        for owner in dict.fromkeys(owners)
        if len({id(nodes[path].module) for path in spelled.get(move(owner), ())}) > 1
    ]
    if clashes:
        raise MismatchError(
            f"{parsed.path}: names of the file fit several modules of the model:\n{listing(clashes)}\n"
            "Convert the file with the program that wrote it into a format with whole paths (PEFT's, say)."
        )
    return (lambda owner: spelled.get(move(owner), [owner])[0]), note


def _site(factors: Factors, nodes: Mapping[str, Node]) -> tuple[SiteRecord, dict[str, Tensor]]:
    node = nodes.get(factors.path)
    kind = _class_by_file(factors) if node is None else _class_by_module(factors, node.module)
    config, tensors = inward(factors, kind)
    if node is not None:
        tensors = _fitted(tensors, kind, node.module, config, factors)
    aliases = () if node is None else tuple(path for path in node.paths if path != factors.path)
    extras = {} if factors.parameter is None else {"parameter": factors.parameter}
    if factors.parameter is not None:
        aliases = tuple(f"{alias}.{factors.parameter}".lstrip(".") for alias in aliases)
    return SiteRecord(factors.site, aliases, kind.kind, config, extras, {}), tensors


def _class_by_file(factors: Factors) -> type[Adapter]:
    try:
        return by_kind(factors.kind)
    except ConfigError as problem:
        raise FormatError(f"{factors.site}: {problem}") from problem


def _class_by_module(factors: Factors, module: nn.Module) -> type[Adapter]:
    owner = adapter_for(module)
    if factors.parameter is not None:
        serves = owner is not None and owner.can_adapt_parameter(module, factors.parameter)
        owner = owner if serves else adapter_for_parameter(module, factors.parameter)
    if owner is None or not issubclass(owner, FactoredAdapter):
        raise MismatchError(
            f"{factors.site}: the file has a low-rank pair for it, and {type(module).__name__} has no weight that one "
            "could update: it was made for another model"
        )
    return owner


def _fitted(
    tensors: dict[str, Tensor], kind: type[Adapter], module: nn.Module, config: SiteConfig, factors: Factors
) -> dict[str, Tensor]:
    """Returns the tensors with axes of size 1 added or left out, where that is all that tells them from the layout.

    A convolution with a kernel of 1 and a linear layer do the same, and programs store either like the other.
    """
    extras = {} if factors.parameter is None else {"parameter": factors.parameter}
    if factors.parameter is None and base_tensor(module, kind.touches(extras)[0]) is None:
        return tensors
    layout = kind.layout(module, config, extras)

    def fit(name: str, tensor: Tensor) -> Tensor:
        shape = layout.get(name, tuple(tensor.shape))
        bare = [size for size in tensor.shape if size != 1], [size for size in shape if size != 1]
        same_size = math.prod(tensor.shape) == math.prod(shape)
        return tensor.reshape(shape) if same_size and bare[0] == bare[1] else tensor

    return {name: fit(name, tensor) for name, tensor in tensors.items()}
