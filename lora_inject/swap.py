"""The only code that touches `__class__`: a module becomes a host, and stops being one.

The module object stays what it is. Which class it gets follows from its base and from the adapters that it carries.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn

from .adapter import Adapter
from .host import Host, OutputHost, base_class, host_class, recipe_of
from .registry import source_of
from .slots import Adapters, slot
from .tree import INNER


def family_for(adapter_class: type[Adapter], module: nn.Module) -> type[Adapter] | None:
    """Returns the class whose `base_forward` serves the module, or None where its own forward must run.

    A forward set on the instance (by some patchers) is unknown to the adapter class, and calls the base's forward,
    which reads the properties. Where it is known to call the class's forward, the host's can stand there for those
    whose update no reader sees.
    """
    replaced = "forward" in module.__dict__ and (adapter_class.readable or _called_at(module) is None)
    return adapter_class if not replaced and adapter_class.knows_forward(module) else None


def _called_at(module: nn.Module) -> str | None:
    """Returns the instance attribute with the class's forward that the instance's calls, or None if that is unknown.

    A hook of accelerate calls the forward that it found, and leaves it as the instance's own when it goes.
    """
    own = module.__dict__
    hook = getattr(own.get("forward"), "func", None)
    key = "_old_forward" if getattr(hook, "__module__", None) == "accelerate.hooks" else "forward"
    called: Any = own.get(key)
    is_own = isinstance(called, types.MethodType) and called.__self__ is module
    return key if is_own and called.__func__ is type(module).forward else None


def class_for(module: nn.Module, adapter: Adapter) -> type:
    """Returns the host class that the module has with this adapter added."""
    kind = type(adapter)
    if not isinstance(module, Host):
        base = type(module)
        return host_class(base, adapter.updates, family_for(kind, module), source_of(base))
    family = module.lora_family
    if not adapter.readable and family is None:
        # Who reads the weight would miss it, so the host must act on the output from now on.
        family = family_for(kind, module)
    return _class_with(module, (*module.lora_names, *adapter.updates), family)


def _class_without(host: Host, left: Collection[Any]) -> type:
    """Returns the host class for the adapters that are left: nothing of those that went binds those to come."""
    family = host.lora_family
    served = family is not None and any(isinstance(adapter, family) for adapter in left)
    return _class_with(host, [name for adapter in left for name in adapter.updates], family if served else None)


def _class_with(host: Host, names: Iterable[str], family: type[Adapter] | None) -> type:
    known = host.lora_base, tuple(dict.fromkeys(names)), family, host.lora_source
    return type(host) if known == recipe_of(host) else host_class(*known)


def _swap(module: nn.Module, cls: type) -> None:
    # Past nn.Module's own __setattr__, which is slow and looks for parameters.
    object.__setattr__(module, "__class__", cls)


def attach(module: nn.Module, name: str, adapter: Adapter) -> None:
    """Puts an adapter into a module and makes it a host if it is none yet; all checks lie behind the caller."""
    if adapter.training != module.training:
        adapter.train(module.training)
    swapped, called = class_for(module, adapter), _called_at(module)
    if not isinstance(module, Host):
        module._modules[INNER] = Adapters(module.training)
    module._modules[INNER]._modules[slot(name, adapter.parameter)] = adapter  # type: ignore[union-attr]
    _swap(module, swapped)
    if called is not None and isinstance(module, OutputHost):
        module.__dict__[called] = types.MethodType(OutputHost.forward, module)


def detach(module: nn.Module, slots: Iterable[str]) -> None:
    """Takes the adapters in these slots out; the last one out gives the module its class back."""
    inner: Any = module._modules[INNER]
    for key in slots:
        del inner._modules[key]
    if inner._modules:
        _swap(module, _class_without(module, inner._modules.values()))  # type: ignore[arg-type]
        drop_stale_forward(module)
        return
    source = module.lora_source
    _swap(module, base_class(module))
    del module._modules[INNER]
    drop_stale_forward(module)
    if source is not None:
        source.settle(module)  # type: ignore[union-attr, operator]


def drop_stale_forward(module: nn.Module) -> None:
    """Frees the instance of bound methods of its former host class.

    accelerate keeps the forward that it found, the host's, in `_old_forward`, and sets it as the instance's forward
    when its hook goes.
    """
    if isinstance(module, OutputHost):
        return
    own = module.__dict__
    for key in [key for key, value in own.items() if type(value) is types.MethodType]:
        if own[key].__func__ is OutputHost.forward:
            if key == "forward":
                del module.__dict__[key]
            else:
                module.__dict__[key] = types.MethodType(type(module).forward, module)


def restorer(module: nn.Module) -> Callable[[], None]:
    """Returns a function that gives the module the class, adapters and instance attributes that it has now."""
    cls, inner, own = type(module), module._modules.get(INNER), dict(module.__dict__)
    held = dict(inner._modules) if isinstance(inner, Adapters) else None

    def restore() -> None:
        _swap(module, cls)
        module.__dict__.update(own)
        if held is None:
            if isinstance(module._modules.get(INNER), Adapters):
                del module._modules[INNER]
            return
        module._modules[INNER] = inner
        inner._modules.clear()  # type: ignore[union-attr]
        inner._modules.update(held)  # type: ignore[union-attr]

    return restore
