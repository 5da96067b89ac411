"""What a merge is asked for, does to one parameter, and reports of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .computed import Computed
from .errors import StateError
from .keeping import Kept, Replaced
from .quantized import Stored
from .rows import Rows, add_rows, total_rows, wide
from .ties import Ties

ENOUGH = 0.9
"""Share of an update that must survive rounding for a merge to go without a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """How a merge works; `li.merge` documents each."""

    keep: str = "residual"
    dtype: torch.dtype | None = None
    accumulate: torch.dtype = torch.float32
    ties: Ties = field(default_factory=Ties)
    """Shared parameters get memory of their own, unless all that hold one merge the same update into it."""
    requantize: bool = False
    holding: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """By id of a host, the adapters that it holds merged when all is done."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did to one parameter.

    Attributes:
        path: dotted path of the parameter.
        adapters: names of the adapters that it holds now.
        relative: Frobenius norm of the update over that of the weight; None where the host had no such parameter.
        survives: how much of the update is left after rounding to the stored dtype: the projection of the change that
            was stored on the update, over the update's own, at most 1.
        error: largest distance of an element from the unrounded sum.
        untied: whether the parameter was shared and got memory of its own.
        created: whether the host had no such parameter before.
        widened: whether it is stored in a wider dtype than before.
        requantized: whether it was dequantized, and the sum stored in the quantized format; `error` and `survives`
            then tell what that took.
        kept: bytes held for `unmerge`.
    """

    path: str
    adapters: tuple[str, ...]
    relative: float | None
    survives: float
    error: float
    untied: bool
    created: bool
    widened: bool
    requantized: bool
    kept: int


@dataclass(slots=True)
class Tally:
    """Adds up over blocks what the report says of a parameter."""

    energy: float = 0.0
    stored: float = 0.0
    norm: float = 0.0
    error: float = 0.0

    def add(self, before: Tensor | None, total: Tensor, value: Tensor) -> None:
        base = torch.zeros_like(total) if before is None else wide(before)
        change = wide(value) - base
        self.energy += float(total.double().square().sum())
        self.stored += float((change.double() * total.double()).sum())
        self.norm += float(base.double().square().sum())
        self.error = max(self.error, float((change - total).abs().max()) if total.numel() else 0.0)

    @property
    def survives(self) -> float:
        return min(1.0, self.stored / self.energy) if self.energy else 1.0


@dataclass(slots=True)
class Job:
    """One parameter of one host to merge into."""

    host: Any
    key: str
    where: str
    updates: list[Rows]
    sources: list[Any]
    axes: int
    options: MergeOptions
    unties: bool
    stored: Stored | None
    computed: Computed | None
    tally: Tally = field(default_factory=Tally)

    def value(self, before: Tensor | None, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns merged rows, rounded once, and the update that is in them."""
        total = total_rows(self.updates, rows)
        value = torch.empty(total.shape, dtype=dtype, device=total.device)
        add_rows(before, self.updates, rows, value)
        self.check(before, value)
        self.tally.add(before, total, value)
        return value, total

    def check(self, before: Tensor | None, value: Tensor) -> None:
        """Refuses a sum that is not finite where the original is."""
        bad = ~torch.isfinite(value) if before is None else ~torch.isfinite(value) & torch.isfinite(before)
        if bad.any():
            raise StateError(
                f"{self.where}: {int(bad.sum())} merged elements or more are not finite in {value.dtype}: the adapter "
                "holds NaN or infinity, or the sum overflows; nothing was merged. Check the adapter's parameters, or "
                "cast the base to a wider dtype"
            )


def report_row(job: Job, names: Sequence[str], kept: Kept) -> Merged:
    """Returns what the report says of a parameter that is merged now."""
    tally, after = job.tally, job.host._parameters.get(job.key)
    before = kept.parameter if isinstance(kept, Replaced) else after
    widened = before is not None and before.dtype != after.dtype
    return Merged(
        path=job.where,
        adapters=tuple(names),
        relative=(tally.energy / tally.norm) ** 0.5 if tally.norm else None,
        survives=tally.survives,
        error=tally.error,
        untied=before is not None and job.unties,
        created=before is None and job.computed is None,
        widened=widened,
        requantized=job.stored is not None,
        kept=kept.size,
    )
