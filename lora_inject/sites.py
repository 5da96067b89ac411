"""Sites: what one module gets, and the checks that say whether it can be served exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, Layout
from .config import SiteConfig, derive
from .errors import ConfigError, StateError, TargetError, UnsupportedError, did_you_mean
from .host import Host, base_class, base_tensor, is_outermost
from .slots import slot
from .swap import family_for
from .tree import INNER, Node
from .weights import weight_of


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """One place that a target selected.

    Attributes:
        path: the first path of the module, or of the parameter where that is the site.
        aliases: further paths of the same object.
        module: the module object, untouched by planning.
        adapter_class: the class that will serve it.
        config: its options, overrides applied.
        extras: options of the adapter class alone.
        layout: names and shapes of the adapter's parameters.
        shape: shape of the adapted weight, () for a whole block.
        key: prefix of the module's entries in the state dict.
        dtype: dtype of the adapter's parameters.
        device: device of the adapter's parameters.
        owner: path of the site whose adapter's parameters this one shares, or None.
    """

    path: str
    aliases: tuple[str, ...]
    module: nn.Module
    adapter_class: type[Adapter]
    config: SiteConfig
    extras: Mapping[str, Any]
    layout: Layout
    shape: tuple[int, ...]
    key: str
    dtype: torch.dtype
    device: torch.device
    owner: str | None = None

    @property
    def parameters(self) -> int:
        """How many numbers the adapter holds of its own."""
        return 0 if self.owner is not None else sum(math.prod(shape) for shape in self.layout.values())

    @property
    def prefix(self) -> str:
        """What stands before the parameters' names in a file."""
        return f"{self.path}." if self.path else ""


def make_site(
    node: Node, adapter_class: type[Adapter], config: SiteConfig, name: str, extras: Mapping[str, Any]
) -> Site:
    """Returns the site of one module after every check.

    Args:
        node: the module and its paths.
        adapter_class: the class that serves it.
        config: its options.
        name: the injection's name.
        extras: options of the adapter class alone.

    Raises:
        ConfigError: an extra option that the class does not know.
        StateError: the module has an adapter of that name.
        UnsupportedError: the module, in its present state, cannot be served exactly.
    """
    module = node.module
    for option in extras:
        if option not in adapter_class.extras:
            raise ConfigError(
                f"adapter {adapter_class.kind!r} has no option {option!r}: {did_you_mean(option, adapter_class.extras)}"
            )
    parameter = extras.get("parameter")
    if parameter is None and not adapter_class.can_adapt(module):
        raise UnsupportedError(f"adapter {adapter_class.kind!r} does not serve {base_class(module).__name__}")
    names = adapter_class.touches(extras)
    _check_free(module, slot(name, parameter))
    _check_class(module, adapter_class, names)
    dtype, device = weight_of(node, adapter_class, names)
    if config.dtype is None:
        half = dtype.itemsize < 4
        config = derive(config, (("dtype", torch.float32 if half else dtype),))
    return Site(
        path=join(node.path, parameter),
        aliases=tuple(join(path, parameter) for path in node.paths[1:]),
        module=module,
        adapter_class=adapter_class,
        config=config,
        extras=extras,
        layout=adapter_class.layout(module, config, extras),
        shape=adapter_class.shape(module, extras),
        key=node.key,
        dtype=config.dtype,  # type: ignore[arg-type]
        device=device,
    )


def join(path: str, parameter: str | None) -> str:
    """Returns the path of a parameter, or of its module where none is given."""
    return path if parameter is None else f"{path}.{parameter}" if path else parameter


def _check_free(module: nn.Module, key: str) -> None:
    if isinstance(module, Host):
        if key in module.adapters:
            name = key.partition("@")[0]
            raise StateError(
                f"already carries an adapter named {name!r}: give another name=, or uninject(model, {name!r}) first"
            )
        if module.adapters.kept:
            raise StateError("adapters are merged into it: call lora_inject.unmerge(model) first")
    elif INNER in module._modules or INNER in module.__dict__ or hasattr(type(module), INNER):
        raise UnsupportedError(
            f"{type(module).__name__} has an attribute {INNER!r} of its own, where the adapters would go: exclude it, "
            "or rename that attribute"
        )


def _check_class(module: nn.Module, adapter_class: type[Adapter], names: tuple[str, ...]) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError("a TorchScript module cannot be changed: inject before torch.jit.script or trace")
    family = family_for(adapter_class, module)
    if family is None and not (names and adapter_class.readable):
        raise UnsupportedError(
            "its forward was replaced on the instance, past which an adapter of a whole block or of a quantized weight "
            "cannot act: take that forward away, inject, and put it there again"
        )
    if not isinstance(module, Host):
        return
    if None not in (module.lora_family, family) and module.lora_family is not family:
        raise UnsupportedError(
            f"carries adapters of kind {module.lora_family.kind!r}, beside which {adapter_class.kind!r} cannot work: "
            "uninject those first"
        )
    reshaped = not adapter_class.readable and module.lora_family is None
    if not is_outermost(module) and (reshaped or not set(names) <= set(module.lora_names)):
        raise UnsupportedError(
            f"its class was changed to {type(module).__name__} after it got adapters: undo that first (last in, "
            "first out)"
        )


def share_sites(sites: Sequence[Site]) -> list[Site]:
    """Returns the sites with one owner for all that hold one and the same weight.

    Raises:
        TargetError: no two sites hold the same weight.
        UnsupportedError: sites that hold the same weight and cannot share; says what to change.
    """
    groups: dict[int, list[Site]] = {}
    for site in sites:
        for name in site.adapter_class.touches(site.extras)[:1]:
            groups.setdefault(id(base_tensor(site.module, name)), []).append(site)
    owners = {id(site.module): group[0] for group in groups.values() for site in group[1:]}
    if not owners:
        raise TargetError(
            "share_tied=True, but no two selected sites hold the same weight: let the targets select every module that "
            "does (the embedding and the head, say), or leave share_tied out"
        )
    for group in groups.values():
        for site in group[1:]:
            _check_shareable(group[0], site)
    return [replace(site, owner=owners[id(site.module)].path) if id(site.module) in owners else site for site in sites]


def _check_shareable(owner: Site, site: Site) -> None:
    if "parameter" in owner.extras or "parameter" in site.extras:
        why = "are single parameters: select the modules"
    elif owner.config != site.config:
        why = "differ in their options: give both targets the same"
    elif owner.config.bias:
        why = "would need biases at different places: use bias=False"
    elif owner.layout != site.layout:
        why = f"need factors of other shapes ({owner.layout} and {site.layout}): leave share_tied out"
    else:
        return
    raise UnsupportedError(
        f"{owner.path} and {site.path} hold one weight, but cannot share one adapter, since they {why}"
    )
