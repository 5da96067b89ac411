"""What `add`, `subtract` and `resize` did, site by site."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..tables import dims, table
from .sums import SumSite


@dataclass(frozen=True, repr=False)
class Combination:
    """A new adapter file and what was lost on the way to it; prints as a table.

    Attributes:
        out: path of the file.
        name: the adapter's name in it.
        size: its size in bytes.
        sites: one row per site, in the order of the file.
    """

    out: str
    name: str
    size: int
    sites: tuple[SumSite, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm of the exact updates of all sites, seen as one vector."""
        return math.hypot(*(site.norm for site in self.sites))

    @property
    def error(self) -> float:
        """Frobenius norm of what the cut and the rounding took, of all sites together."""
        return math.hypot(*(site.error for site in self.sites))

    @property
    def relative(self) -> float:
        """The error over the norm; 0 for an adapter without effect."""
        return self.error / self.norm if self.norm else 0.0

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[SumSite]:
        return iter(self.sites)

    def __repr__(self) -> str:
        return f"<Combination {self.out}: {len(self)} sites, relative error {self.relative:.3g}>"

    def __str__(self) -> str:
        headers = ("path", "adapter", "shape", "ranks", "rank", "|dW|", "error", "relative")
        rows = [
            (s.path or "(root)", s.adapter, dims(s.shape), s.before, s.rank, s.norm, s.error, s.relative)
            for s in self.sites
        ]
        return "\n".join(
            [
                table(headers, rows, limit=200),
                "",
                f"{self.out}: adapter {self.name!r}, {len(self)} sites, {self.size:,} bytes",
                f"|dW| of all sites together: {self.norm:.4g}; cut and rounding took {self.error:.3g} of it "
                f"({self.relative:.3g})",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as values that JSON can hold."""
        return {
            "out": self.out,
            "name": self.name,
            "size": self.size,
            "norm": self.norm,
            "error": self.error,
            "relative": self.relative,
            "sites": [asdict(site) | {"relative": site.relative} for site in self.sites],
        }
