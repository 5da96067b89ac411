"""What a merge on disk did: a value, a table, and two files beside the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..tables import percent, table
from ..version import VERSION
from .patching import Sample
from .plan import CheckpointPlan

SURVIVES = 0.9
"""Share of an update that must survive rounding; below, the report advises."""


@dataclass(frozen=True, repr=False)
class CheckpointReport:
    """What `merge_checkpoint` did, a row per changed parameter; prints as a table.

    Attributes:
        plan: what was to be done; all there is after a dry run.
        rows: estimates from some rows in the middle of every changed parameter.
        binding: the hash of the inputs and options that the output is bound to.
        status: "planned", "merged", "continued" (an earlier run had begun) or "complete already".
        seconds: how long this run took.
    """

    plan: CheckpointPlan
    rows: tuple[Sample, ...] = ()
    binding: str = ""
    status: str = "planned"
    seconds: float = 0.0

    @property
    def out(self) -> Path:
        """The folder that was written."""
        return self.plan.out

    @property
    def lost(self) -> tuple[Sample, ...]:
        """Parameters whose update survives rounding to less than 90 %."""
        return tuple(row for row in self.rows if row.survives < SURVIVES)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<CheckpointReport {self.status}: {self.out}, {len(self)} parameters>"

    def __str__(self) -> str:
        if self.status == "planned":
            return str(self.plan)
        headers = ("parameter", "adapters", "|dW|/|W|", "survives", "largest error")
        rows = [_row(row) for row in self.rows]
        parts = [table(headers, rows, limit=200), "Estimated from some rows in the middle of each parameter."]
        parts += [advice(self.lost)] if self.lost else []
        parts += [f"Untied: {', '.join(self.plan.untied)}."] if self.plan.untied else []
        parts += [f"Left behind: {', '.join(self.plan.left)}."] if self.plan.left else []
        parts += [f"Names: {self.plan.note}."] if self.plan.note else []
        return "\n".join([*parts, f"{self.status}: {self.out}, {self.plan.size:,} bytes in {self.seconds:.1f} s"])

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values that JSON can hold."""
        return {
            "lora_inject_version": VERSION,
            "status": self.status,
            "binding": self.binding,
            "seconds": self.seconds,
            "parameters": [asdict(row) for row in self.rows],
            "plan": self.plan.to_dict(),
        }


def _row(row: Sample) -> tuple[object, ...]:
    relative = "-" if row.relative is None else f"{row.relative:.3g}"
    return row.path, "+".join(row.adapters), relative, percent(row.survives), row.error


def advice(lost: Sequence[Sample]) -> str:
    """Returns what to do about updates that rounding swallows."""
    worst = min(lost, key=lambda row: row.survives)
    return (
        f"{len(lost)} parameters keep less than {percent(SURVIVES)} of their update after rounding (least: "
        f"{percent(worst.survives)} of {worst.path}): pass dtype='float32' to store what changes wider, or keep the "
        "adapter unmerged."
    )
