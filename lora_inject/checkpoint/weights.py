"""Single weights of a model, read from its checkpoint on disk while the model itself stays on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import MismatchError
from ..safefile import read_tensors
from ..tree import walk
from .model_names import ModelNames


def weight(names: ModelNames, parameter: str) -> Tensor:
    """Returns a parameter of the model from the checkpoint, in the dtype in which it is stored.

    Raises:
        MismatchError: the checkpoint does not hold it.
        FormatError: the checkpoint cannot be read.
    """
    shape = names.shapes[parameter]
    axes = max(1, len(shape) - 1)
    found = (names.pieces(other, axes) for other in names.shared(parameter))
    pieces = next((held for held in found if held), ())
    if not pieces:
        raise MismatchError(f"{parameter}: the checkpoint {names.base.root} does not hold it")
    rows: list[Tensor] = []
    for piece in pieces:
        stored = read_tensors(names.base.tensors[piece.key].header, [piece.key])[piece.key]
        # A stack may lie in the file matrix by matrix: its rows are what counts, whatever stands before them.
        stored = stored.flatten(0, -2) if stored.dim() > 1 else stored.reshape(-1)
        rows.append(stored[piece.row : piece.row + piece.stop - piece.start])
    return torch.cat(rows).reshape(shape)


@contextmanager
def materialised(names: ModelNames, parameters: tuple[str, ...]) -> Iterator[None]:
    """Gives the model on the meta device its real values of some parameters for as long as the context is open."""
    modules = {path: node.module for node in walk(names.model) for path in node.paths}
    places = [(modules[path.rpartition(".")[0]], path.rpartition(".")[2]) for path in parameters]
    before = [module._parameters[name] for module, name in places]
    values = [weight(names, path) for path in parameters]
    try:
        for (module, name), value in zip(places, values, strict=True):
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for (module, name), old in zip(places, before, strict=True):
            module._parameters[name] = old
