"""What a module is while it carries adapters, and how it reads.

Its class is a cached subclass `Adapted<Base>` whose adapted parameters are properties: whoever reads them from outside
gets W + delta, while `_parameters` and the state dict keep W. If the adapter class knows the base's forward, the host
computes from `_parameters` and adds the low-rank path to the output; if not, the base's own forward runs and reads the
properties.
"""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .errors import StateError, UnsupportedError
from .offload import host_forward, host_hook
from .rows import wide
from .slots import Adapters
from .tree import INNER


class Host:
    """Mixed into the class of a module while it carries adapters."""

    is_lora_host = True
    adapters: Adapters
    # Prefixed, because a class attribute hides a parameter or child of that name from its own module.
    lora_type: type
    lora_base: type
    lora_names: tuple[str, ...]
    lora_family: Any
    lora_source: type[Adapter] | None
    _hf_hook = host_hook
    _old_forward = host_forward

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        if not isinstance(made, tuple) or made[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise UnsupportedError(
                f"{base_class(self).__name__} pickles in a way of its own, which would lose its adapters: "
                "export them and uninject first"
            )
        return (_revive, recipe_of(self), *made[2:])

    def _lora_live(self) -> list[Any]:
        """Returns the adapters that act beside the parameters now."""
        inner = self._modules.get(INNER)  # type: ignore[attr-defined]
        return [] if inner is None else [adapter for adapter in inner._modules.values() if adapter.live]

    def __delattr__(self, name: str) -> None:
        if name in self.lora_names:
            raise StateError(
                f"{name} cannot be taken from a module that carries adapters (parametrize does so before it wraps): "
                "parametrize first and inject then, or uninject"
            )
        super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A merged host that is cast or moved takes the originals along, or unmerge would give back the old ones.
        kept = self.adapters.kept
        for key, way in list(kept.items()):
            kept[key] = way.secured(self, key)
        super()._apply(fn, recurse)  # type: ignore[misc]
        with torch.no_grad():
            for way in kept.values():
                way.apply(fn)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        waiting = [name for key, way in self.adapters.kept.items() for name in way.entries(key)]
        merged = [name for name in waiting if prefix + name in state_dict]
        if merged:
            raise StateError(
                f"{prefix}{merged[0]}: cannot load base weights while adapters are merged into them: "
                "call lora_inject.unmerge(model) first"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


class OutputHost(Host):
    """A host whose base forward is known: it adds each adapter's path to the base's output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the base's output with the update of every live adapter added."""
        live = self._lora_live()
        family = self.lora_family
        for adapter in live:
            if not isinstance(adapter, family):
                return self._lora_mixed(live, *args, **kwargs)
        return family.host_forward(self, live, *args, **kwargs)

    def _lora_mixed(self, live: list[Any], *args: Any, **kwargs: Any) -> Any:
        # One of another kind (of a single parameter, say) works in weight space, and so do all that readers see.
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        for adapter in live:
            if not adapter.readable:
                output = adapter.update(self, output, *args, **kwargs)
        return output


def base_tensor(module: nn.Module, name: str) -> Any:
    """Returns what a parameter is without adapters: never W + delta, on a host or elsewhere."""
    if name in module._parameters:
        return module._parameters[name]
    if name in module.__dict__:
        return module.__dict__[name]
    if isinstance(module, Host):
        return getattr(super(module.lora_type, module), name, None)
    return getattr(module, name, None)


def unmerged_tensor(module: nn.Module, name: str) -> Any:
    """Returns what a parameter is without adapters and without what is merged into it.

    Raises:
        StateError: it is merged, and the original cannot be had or not be proven.
    """
    kept = module.adapters.kept.get(name) if isinstance(module, Host) else None
    return base_tensor(module, name) if kept is None else kept.original(module, name)


def effective(host: Any, name: str) -> Any:
    """Returns W + delta over the live adapters, rounded once to W's dtype; W itself where there are none."""
    base = base_tensor(host, name)
    if hasattr(base, "device_mesh") or (base is not None and base.is_meta):
        # FSDP looks for its shard here between two forwards, accelerate for its placeholder; inside, `_parameters`
        # holds the whole weight.
        return base
    total: Any = None
    for adapter in host._lora_live():
        update = adapter.reading(host, name)
        if update is not None:
            update = update * adapter.factor
            total = update if total is None else total + update
    if total is None:
        return base
    if base is None:
        return total.to(base_tensor(host, beside(host, name)).dtype)
    return (wide(base) + total).to(base.dtype)


def beside(host: Any, name: str) -> str:
    """Returns the name of the weight that a parameter goes with: the first that the same adapter updates."""
    first: str = next(adapter.updates[0] for adapter in host.adapters.values() if name in adapter.updates)
    return first


def _view(name: str) -> property:
    def read(host: Any) -> Any:
        return effective(host, name)

    def write(host: Any, value: Any) -> None:
        # Only tensors that are no Parameters come here: nn.Module keeps Parameters in `_parameters`.
        host.__dict__[name] = value

    return property(read, write, doc=f"{name} with the live adapters' updates added; `_parameters` keeps the base's.")


# Values are held weakly, because parametrize makes a base class per instance: the last host takes its class along.
_host_classes: weakref.WeakValueDictionary[tuple[Any, ...], type] = weakref.WeakValueDictionary()


def host_class(
    base: type, names: tuple[str, ...], family: type[Adapter] | None, source: type[Adapter] | None = None
) -> type:
    """Returns the subclass of `base` for hosts, made once.

    Args:
        base: the class that the module has now.
        names: the adapted parameters, which become properties.
        family: the adapter class that knows the base's forward, or None where that runs itself.
        source: the adapter class that brings the further members that hosts of this base need, or None.
    """
    key = (base, names, family, source)
    made = _host_classes.get(key)
    if made is None:
        body: dict[str, Any] = {name: _view(name) for name in names}
        body |= {} if source is None else source.members(base)
        # transformers looks up by `str(type(model))` which hidden states and attentions a model can give.
        body |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        body |= {"lora_base": base, "lora_names": names, "lora_family": family, "lora_source": source}
        made = type(f"Adapted{base.__name__}", (Host if family is None else OutputHost, base), body)
        made.lora_type = made  # type: ignore[attr-defined]
        _host_classes[key] = made
    return made


def is_host(module: object) -> bool:
    """Says whether the module carries adapters."""
    return isinstance(module, Host)


def base_class(module: object) -> type:
    """Returns the class that the module has without adapters."""
    return module.lora_base if isinstance(module, Host) else type(module)


def recipe_of(host: Host) -> tuple[Any, ...]:
    """Returns what `host_class` needs to make the class of this host again."""
    return host.lora_base, host.lora_names, host.lora_family, host.lora_source


def _revive(*recipe: Any) -> Any:
    made: Any = host_class(*recipe)
    return made.__new__(made)


def is_outermost(host: Host) -> bool:
    """Says whether the class is the one that `attach` gave: nothing else was swapped in on top of it."""
    return type(host) is host.lora_type
