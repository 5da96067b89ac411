"""Several processes at one merge: who writes which shard, and that all of them learn of an error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import distributed

from ..errors import LoraInjectError
from .layout import Shard

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that work on one merge; alone, where torchrun did not start it."""

    rank: int = 0
    count: int = 1

    def share(self, shards: Sequence[Shard]) -> list[Shard]:
        """Returns the shards of this rank: the largest first, each to the rank that has the least to write so far."""
        loads = [0] * self.count
        mine = []
        for shard in sorted(shards, key=lambda shard: (-shard.size, shard.name)):
            least = loads.index(min(loads))
            loads[least] += shard.size
            mine += [shard] if least == self.rank else []
        return mine

    def agree(self, error: BaseException | None) -> None:
        """Waits for all ranks, and raises on each of them if any had an error."""
        if self.count == 1:
            if error is not None:
                raise error
            return
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(found):
            if text is not None:
                raise LoraInjectError(f"rank {rank} of {self.count} failed, so the merge is unfinished: {text}")

    def tell(self, value: T) -> T:
        """Returns rank 0's value on every rank."""
        if self.count == 1:
            return value
        held = [value]
        distributed.broadcast_object_list(held, src=0)
        return held[0]


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Yields this process's place: in the process group that is open, in the one that torchrun announces, or alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    own = not distributed.is_initialized()
    if own:
        distributed.init_process_group("gloo")
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        if own:
            distributed.destroy_process_group()
