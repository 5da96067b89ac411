"""Which adapter class serves a module: the first whose `can_adapt` says yes, newest first.

Classes that a program registers are asked first, then those of installed plug-ins, then the built-in ones.
"""

from __future__ import annotations

import threading
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from .adapter import Adapter
from .errors import ConfigError, did_you_mean

PLUGINS = "lora_inject.adapters"
"""Group of the entry points by which installed packages bring adapter classes; each names one class."""

A = TypeVar("A", bound=type[Adapter])
_classes: tuple[type[Adapter], ...] = ()
# What was registered, and what `source_of` found then, by base class: held weakly, because parametrize makes a class
# for each instance.
_sources: WeakKeyDictionary[type, tuple[tuple[type[Adapter], ...], type[Adapter] | None]] = WeakKeyDictionary()
_loading = threading.RLock()
_loaded = _is_loading = False


def register(adapter_class: A) -> A:
    """Adds an adapter class in front of all others; use it as a class decorator.

    Registering a class of the same `kind` again replaces the older one, so that a notebook cell can be run twice.

    Raises:
        ConfigError: not a subclass of `lora_inject.Adapter`, abstract methods left, or no `kind`.
    """
    if not (isinstance(adapter_class, type) and issubclass(adapter_class, Adapter)):
        raise ConfigError(f"register: {adapter_class!r} is not a subclass of lora_inject.Adapter")
    missing = sorted(getattr(adapter_class, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(f"register: {adapter_class.__name__} does not define {', '.join(missing)}")
    if not isinstance(getattr(adapter_class, "kind", None), str):
        raise ConfigError(f'register: {adapter_class.__name__} needs a name for files and tables: kind = "..."')
    global _classes
    _classes = (adapter_class, *(known for known in _classes if known.kind != adapter_class.kind))
    return adapter_class


def registered() -> tuple[type[Adapter], ...]:
    """Returns the registered classes in the order in which they are asked, those of plug-ins included.

    Raises:
        ConfigError: a plug-in cannot be loaded.
    """
    if not _loaded:
        _load_once()
    return _classes


def _load_once() -> None:
    """Loads the plug-ins while other threads wait; later calls take no lock, which an interrupt could leave closed."""
    global _classes, _loaded, _is_loading
    with _loading:
        # A plug-in may plan while it is imported.
        if _loaded or _is_loading:
            return
        before, _is_loading = _classes, True
        try:
            _load_plugins()
            _loaded = True
        except BaseException:
            _classes = before
            raise
        finally:
            _is_loading = False


def _load_plugins() -> None:
    global _classes
    built_in = f"{__package__}.adapters."
    first = [known for known in _classes if not known.__module__.startswith(built_in)]
    for entry in entry_points(group=PLUGINS):
        try:
            register(entry.load())
        except Exception as error:
            raise ConfigError(
                f"the plug-in {_label(entry)} cannot be loaded: {type(error).__name__}: {error}. "
                "Update or uninstall that package"
            ) from error
    taken = {known.kind for known in first}
    _classes = (*first, *(known for known in _classes if known.kind not in taken))


def _label(entry: EntryPoint) -> str:
    package = "" if entry.dist is None else f" of the package {entry.dist.name!r}"
    return f"{entry.name!r} ({entry.value}){package}"


def adapter_for(module: nn.Module) -> type[Adapter] | None:
    """Returns the class that serves the module, or None where none can."""
    for known in registered():
        if not known.on_request and known.can_adapt(module):
            return known
    return None


def adapter_for_parameter(module: nn.Module, name: str) -> type[Adapter] | None:
    """Returns the class that serves one parameter of the module, or None where none can."""
    for known in registered():
        if not known.on_request and known.can_adapt_parameter(module, name):
            return known
    return None


def source_of(base: type) -> type[Adapter] | None:
    """Returns the class that brings further members for hosts of a base class, whichever adapters they carry."""
    classes = registered()
    # Kept with what was registered then, since another thread may register a class between any two lines.
    found = _sources.get(base)
    if found is None or found[0] is not classes:
        found = _sources[base] = classes, next((known for known in classes if known.members(base)), None)
    return found[1]


def by_kind(kind: object) -> type[Adapter]:
    """Returns the registered class of that kind, or the class itself.

    Raises:
        ConfigError: no class of that kind is registered.
    """
    for known in registered():
        if kind is known or kind == known.kind:
            return known
    raise ConfigError(f"adapter {kind!r} is not registered: {did_you_mean(str(kind), [c.kind for c in _classes])}")
