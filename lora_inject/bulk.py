"""What makes thousands of modules at once cheap: no garbage collection in between, no setting up piece by piece."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def uncollected() -> Iterator[None]:
    """Puts off garbage collection while its block makes many objects that stay; also a decorator.

    The collector would look through all of them again and again as their number grows, and find nothing.
    """
    was_on = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():
                # Moves all objects to the oldest generation, so that the next collection does not begin with these.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


_FRESH = nn.Module().__dict__
"""What `nn.Module.__init__` sets, in whichever version of torch this is."""
_CONTAINERS = [(key, type(value)) for key, value in _FRESH.items() if isinstance(value, (dict, set))]
_VALUES = {key: value for key, value in _FRESH.items() if not isinstance(value, (dict, set))}


def init_module(module: nn.Module, **attributes: Any) -> None:
    """Does what `nn.Module.__init__` does and sets further attributes, none of them a parameter or module.

    `nn.Module.__setattr__` would look each value over for parameters, buffers and modules.
    """
    state = module.__dict__
    state.update(_VALUES)
    for key, make in _CONTAINERS:
        state[key] = make()
    state.update(attributes)
