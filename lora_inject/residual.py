"""Going back from a merged weight without a copy of it: subtract, repair what differs, prove the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .commit import Undo
from .errors import StateError
from .keeping import Copy, Kept, bits, checksum
from .rows import Rows, add_rows, row_blocks, total_rows, wide


class InPlace:
    """Writes a weight block by block, and can go back from wherever it was stopped."""

    def __init__(self, flat: Tensor, blocks: Sequence[slice]) -> None:
        self.flat, self.blocks = flat, blocks
        self.pending: tuple[int, Tensor] | None = None

    def write(self, position: int, value: Tensor) -> None:
        """Writes one block; blocks come in order."""
        rows = self.blocks[position]
        self.pending = (position, self.flat[rows].clone())
        self.flat[rows] = value

    @torch.no_grad()
    def back(self, inverse: Callable[[int], Tensor]) -> None:
        """Gives every written block its former value: the last one from memory, those before by `inverse`."""
        if self.pending is not None:
            position, saved = self.pending
            self.flat[self.blocks[position]] = saved
            for earlier in range(position):
                self.flat[self.blocks[earlier]] = inverse(earlier)


class Residual(Kept):
    """The elements that subtraction does not give back, and a checksum that proves the rest.

    With W' = round(W + D), R = round(W' - D) agrees with W but for few elements, which are recorded block by block. D
    is made again from copies of the adapters as they were, so that these can be trained on meanwhile.
    """

    def __init__(self, sources: Sequence[Adapter], shape: Sequence[int], axes: int) -> None:
        self.sources, self.axes = sources, axes
        self.blocks = row_blocks(shape, axes)
        self.places: list[Tensor] = []
        self.values: list[Tensor] = []
        self.proof = 0

    def prove(self, flat: Tensor) -> None:
        """Takes the checksum of the original, before anything is written."""
        self.proof = checksum(flat[rows] for rows in self.blocks)

    def note(self, before: Tensor, after: Tensor, total: Tensor) -> None:
        """Records the elements of the next block that `after` - `total` does not give back."""
        guess = (wide(after) - total).to(before.dtype)
        places = (bits(guess) != bits(before)).reshape(-1).nonzero().reshape(-1)
        self.places.append(places.to(torch.int32))
        self.values.append(before.reshape(-1)[places])

    def updates(self, host: Any, key: str) -> list[Rows]:
        """Returns what gives the rows of every adapter's update of the parameter."""
        return [source.rows_by(host, key, self.axes) for source in self.sources if key in source.delta_names(host)]

    def recover(self, flat: Tensor, updates: Sequence[Rows], position: int) -> Tensor:
        """Returns one block of the original from the merged weight."""
        rows = self.blocks[position]
        guess = (wide(flat[rows]) - total_rows(updates, rows)).to(flat.dtype).contiguous()
        guess.view(-1)[self.places[position].long()] = self.values[position]
        return guess

    @torch.no_grad()
    def original(self, host: Any, key: str) -> Any:
        """Returns the original weight, proven."""
        current = host._parameters[key].detach()
        flat, updates = current.flatten(0, self.axes - 1), self.updates(host, key)
        found = [self.recover(flat, updates, position) for position in range(len(self.blocks))]
        self._prove(checksum(found))
        return torch.cat(found).reshape(current.shape) if found else current.clone()

    @torch.no_grad()
    def restore(self, host: Any, key: str, undo: Undo) -> None:
        """Recovers the weight in place, after a first pass has proven that it can be."""
        flat, updates = host._parameters[key].detach().flatten(0, self.axes - 1), self.updates(host, key)
        count = range(len(self.blocks))
        self._prove(checksum(self.recover(flat, updates, position) for position in count))

        def merged_again(position: int) -> Tensor:
            rows = self.blocks[position]
            value = torch.empty_like(flat[rows])
            add_rows(flat[rows], updates, rows, value)
            return value

        writer = InPlace(flat, self.blocks)
        undo(lambda: writer.back(merged_again))
        for position in count:
            writer.write(position, self.recover(flat, updates, position))

    def _prove(self, found: int) -> None:
        if found != self.proof:
            raise StateError(
                "the original weight cannot be proven: the merged weight was changed meanwhile, or this device rounds "
                "the update differently. Load the base anew, keep what is there by uninject(model, keep_merged=True), "
                'or merge with keep="copy" another time'
            )

    @property
    def size(self) -> int:
        """Bytes of the recorded elements and of the adapters' copies."""
        factors = [p for source in self.sources for p in source.parameters()]
        return sum(tensor.nbytes for tensor in (*self.places, *self.values, *factors))

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Never called: `secured` gives a copy in its place before the host is cast or moved."""
        raise AssertionError("a residual does not survive a cast")

    def secured(self, host: Any, key: str) -> Kept:
        """Returns a copy of the original: other devices and dtypes round otherwise."""
        return Copy(self.original(host, key))
