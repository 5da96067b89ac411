"""What `verify` found: a verdict per adapter, and whether merging is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .tables import table


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found out about one adapter.

    Attributes:
        path: path of its site.
        name: the adapter's name.
        reached: whether the run used the adapter at all.
        effect: largest change of an output element when this adapter alone is switched off, relative to the largest
            output element.
        gradient: norm of the gradient of a random projection of the outputs with respect to its parameters.
    """

    path: str
    name: str
    reached: bool
    effect: float
    gradient: float

    @property
    def alive(self) -> bool:
        """Whether the adapter changes the output and can be trained."""
        return self.reached and self.effect > 0 and self.gradient > 0

    @property
    def advice(self) -> str:
        """What is wrong and what to do, or an empty string."""
        if self.alive:
            return ""
        if not self.reached:
            return (
                "not reached: give an input that uses the module; if this one does, its weight is read through a "
                "reference taken before the injection (a list, a closure, a cache): inject first, or exclude it"
            )
        if self.effect == 0:
            return "no effect on the output: its result is thrown away, or another adapter or dead unit hides it"
        return "no gradient: the path to the output is detached, or runs under no_grad"


@dataclass(frozen=True, repr=False)
class Report:
    """What `verify` found; prints as a table, and is true if every adapter is alive and merging is right.

    Attributes:
        verdicts: one per adapter.
        merge_error: largest difference between the outputs with merged and with unmerged weights, relative to the
            largest output element; None where nothing could be merged.
        merge_bound: what rounding can explain: the same difference that one rounding of the weights makes, with room.
    """

    verdicts: tuple[Verdict, ...]
    merge_error: float | None
    merge_bound: float

    @property
    def dead(self) -> tuple[Verdict, ...]:
        """The adapters that are not alive."""
        return tuple(verdict for verdict in self.verdicts if not verdict.alive)

    @property
    def ok(self) -> bool:
        """Whether all adapters are alive and merged outputs equal unmerged ones up to rounding."""
        return not self.dead and (self.merge_error is None or self.merge_error <= self.merge_bound)

    def __bool__(self) -> bool:
        return self.ok

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def __repr__(self) -> str:
        return f"<Report: {len(self.verdicts)} adapters, {len(self.dead)} dead, merge error {self.merge_error}>"

    def __str__(self) -> str:
        headers = ("path", "adapter", "reached", "effect", "gradient", "advice")
        rows = [(v.path or "(root)", v.name, v.reached, v.effect, v.gradient, v.advice) for v in self.verdicts]
        merged = "nothing could be merged" if self.merge_error is None else f"{self.merge_error:.3g}"
        lines = [table(headers, rows), f"merged against unmerged: {merged} (rounding explains {self.merge_bound:.3g})"]
        lines.append("every adapter is alive" if not self.dead else f"{len(self.dead)} adapters have no effect")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values that JSON can hold."""
        rows = [asdict(verdict) | {"alive": verdict.alive, "advice": verdict.advice} for verdict in self.verdicts]
        return {"ok": self.ok, "merge_error": self.merge_error, "merge_bound": self.merge_bound, "adapters": rows}
