"""Freezing what is no adapter, and giving every parameter back the flag that it had."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn

from .commit import Undo
from .host import beside

FROZEN = "_lora_inject_frozen"
"""Attribute of a module that names its parameters that trained before the injection."""


def freeze(modules: Iterable[nn.Module], undo: Undo) -> None:
    """Stops the training of the modules' own parameters, and marks those that trained."""
    # Looked up for all before the first is frozen: a tied parameter is marked in each of its modules.
    trained = [(module, _training(module)) for module in modules]
    for module, names in trained:
        if names:
            known = module.__dict__.get(FROZEN, ())
            undo(partial(_thaw, module, names, known))
            module.__dict__[FROZEN] = tuple(dict.fromkeys((*known, *names)))
            _train(module, names, False)


def thaw(modules: Iterable[nn.Module], undo: Undo) -> None:
    """Lets the marked parameters train again, and takes the marks away."""
    for module in modules:
        mark = module.__dict__.get(FROZEN)
        if mark:
            undo(partial(_refreeze, module, mark))
            _thaw(module, mark)


def adopt(host: Any, created: list[str], undo: Undo) -> None:
    """Marks parameters that a merge created as trained before if the weight was."""
    mark = host.__dict__.get(FROZEN, ())
    trained = [name for name in created if beside(host, name) in mark]
    if trained:
        undo(partial(host.__dict__.__setitem__, FROZEN, mark))
        host.__dict__[FROZEN] = (*mark, *trained)


def _training(module: nn.Module) -> list[str]:
    return [name for name, p in module._parameters.items() if p is not None and p.requires_grad]


def _train(module: nn.Module, names: Sequence[str], on: bool) -> None:
    # Not get(), which TorchScript's table lacks, and not requires_grad_(), which parameters without a shape yet refuse.
    for name, parameter in module._parameters.items():
        if name in names and parameter is not None:
            parameter.requires_grad = on


def _thaw(module: nn.Module, names: Sequence[str], mark: tuple[str, ...] = ()) -> None:
    _train(module, names, True)
    if mark:
        module.__dict__[FROZEN] = mark
    else:
        module.__dict__.pop(FROZEN, None)


def _refreeze(module: nn.Module, mark: tuple[str, ...]) -> None:
    module.__dict__[FROZEN] = mark
    _train(module, mark, False)
