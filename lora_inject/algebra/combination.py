"""What `add`, `subtract` and `resize` did, site by site."""

from __future__ import annotations

from dataclasses import dataclass

from ..tables import dims, table
from .sums import SumSite
from .written import Written


@dataclass(frozen=True, repr=False)
class Combination(Written[SumSite]):
    """A new adapter file and what was lost on the way to it; prints as a table."""

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
