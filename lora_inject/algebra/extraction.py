"""What `extract` took from a fine-tune, and what it left."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..tables import dims, table
from .written import Written


@dataclass(frozen=True, slots=True)
class ExtractedSite:
    """What became of one changed weight.

    Attributes:
        path: path of the site.
        adapter: kind of the adapter class; "full" where the update is stored whole.
        shape: shape of the weight.
        rank: rank as it is stored.
        norm: Frobenius norm of the difference tuned - base.
        error: Frobenius norm of the difference minus what is stored: what rank and rounding took.
        exact: whether it was decomposed exactly, not by a randomized method.
    """

    path: str
    adapter: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    error: float
    exact: bool

    @property
    def relative(self) -> float:
        """The error over the norm; 0 where the norm is too small for float64."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True, slots=True)
class Left:
    """A tensor that changed and is not in the adapter.

    Attributes:
        path: its path.
        shape: its shape.
        norm: Frobenius norm of its change; None where none can be formed.
        why: why it was left.
    """

    path: str
    shape: tuple[int, ...]
    norm: float | None
    why: str


@dataclass(frozen=True, repr=False)
class Extraction(Written[ExtractedSite]):
    """An adapter made from a fine-tune; prints as a table.

    Attributes:
        left: tensors that changed and are not in the file.
        unchanged: how many parameters did not change.
        note: how kinds of adapters were found.
    """

    left: tuple[Left, ...]
    unchanged: int
    note: str

    def __repr__(self) -> str:
        return f"<Extraction {self.out}: {len(self)} sites, {len(self.left)} tensors left>"

    def __str__(self) -> str:
        rows = [
            (s.path or "(root)", s.adapter, dims(s.shape), s.rank, s.norm, s.error, s.relative, _how(s))
            for s in self.sites
        ]
        headers = ("path", "adapter", "shape", "rank", "|dW|", "error", "relative", "how")
        lines = [table(headers, rows, limit=200), ""]
        if self.left:
            listed = [(one.path, dims(one.shape), "-" if one.norm is None else one.norm, one.why) for one in self.left]
            lines += [table(("changed, not in the adapter", "shape", "|dW|", "why"), listed, limit=200), ""]
        lines += [
            f"{self.out}: adapter {self.name!r}, {len(self)} sites, {self.size:,} bytes; "
            f"{self.unchanged} parameters did not change",
            f"|dW| of all sites together: {self.norm:.4g}; rank and rounding took {self.error:.3g} of it "
            f"({self.relative:.3g})",
            self.note,
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as values that JSON can hold."""
        more = {"left": [asdict(one) for one in self.left], "unchanged": self.unchanged, "note": self.note}
        return super().to_dict() | more


def _how(site: ExtractedSite) -> str:
    return "whole" if site.adapter == "full" else "exact" if site.exact else "randomized"
