"""accelerate's offloading beside adapters: its hooks meet the base alone, and A and B stay where the module runs.

accelerate's hook walks over all tensors of a module before and after each forward, reads them as attributes, and puts
new Parameters in their place. On a host it would read W + delta, copy its `requires_grad` to the base, and look for A
and B among the weights that it had put away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from .tree import INNER, offloading

_GUARDED = ("pre_forward", "post_forward")
_HOOK, _FORWARD, _FLAGS = "_hf_hook", "_old_forward", "_lora_flags"


def guard(hook: Any) -> None:
    """Makes an offloading hook work as if the hosts that it meets carried no adapters; harmless when it does so."""
    for name in _GUARDED:
        if not _is_guarded(hook, name):
            hook.__dict__[name] = partial(_aside, getattr(hook, name))


def release(hook: Any) -> None:
    """Makes a guarded hook what it was."""
    for name in _GUARDED:
        if _is_guarded(hook, name):
            del hook.__dict__[name]


def hooks_on(modules: Iterable[nn.Module]) -> list[Any]:
    """Returns the offloading hooks that sit on these modules, each once."""
    hooked = (module.__dict__[_HOOK] for module in modules if _HOOK in module.__dict__)
    return list({id(one): one for hook in hooked for one in offloading(hook)}.values())


def _is_guarded(hook: Any, name: str) -> bool:
    return getattr(hook.__dict__.get(name), "func", None) is _aside


def _aside(method: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of the hook while no host has adapters: each reads as its base then."""
    reach = list(module.modules()) if method.__self__.place_submodules else [module]
    hosts = [(one, one._modules) for one in reach if getattr(type(one), "is_lora_host", False)]
    for host, children in hosts:
        host.__dict__["_modules"] = {name: child for name, child in children.items() if name != INNER}
    try:
        return method(module, *args, **kwargs)
    finally:
        for host, children in hosts:
            host.__dict__["_modules"] = children


def _entry(name: str, arrive: Callable[[Any, Any], bool]) -> property:
    """Returns an instance attribute that may be absent, as a property; `arrive` says whether a new value is kept."""

    def read(module: Any) -> Any:
        if name in module.__dict__:
            return module.__dict__[name]
        raise AttributeError(name)

    def write(module: Any, value: Any) -> None:
        if arrive(module, value):
            module.__dict__[name] = value

    def remove(module: Any) -> None:
        del module.__dict__[name]

    return property(read, write, remove, "What accelerate keeps on a module that it has hooked.")


def _note_flags(host: Any, forward: Any) -> bool:
    """Remembers `requires_grad` before a hook reads the host: the first thing that `add_hook_to_module` does."""
    host.__dict__[_FLAGS] = {name: p.requires_grad for name, p in host._parameters.items() if p is not None}
    return True


def _host_hooked(host: Any, hook: Any) -> bool:
    """Guards a new hook, and gives back the flags that its start has taken from W + delta."""
    for name, flag in host.__dict__.pop(_FLAGS, {}).items():
        host._parameters[name].requires_grad_(flag)
    for one in offloading(hook):
        guard(one)
    return True


def _adapter_hooked(adapter: Any, hook: Any) -> bool:
    """Takes A and B back from an offloading hook: nobody calls an adapter, so they would never return by themselves."""
    hooks = offloading(hook)
    for one in hooks:
        one.detach_hook(adapter)
        if one.execution_device is not None:
            adapter.to(one.execution_device)
    return not hooks


host_hook = _entry(_HOOK, _host_hooked)
host_forward = _entry(_FORWARD, _note_flags)
adapter_hook = _entry(_HOOK, _adapter_hooked)
