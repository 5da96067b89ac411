"""What every call that writes an adapter tells of it: where it is, its sites, and what was lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar


class Lossy(Protocol):
    """A site whose update is stored up to an error."""

    @property
    def norm(self) -> float:
        """Frobenius norm of the exact update."""

    @property
    def error(self) -> float:
        """Frobenius norm of what the stored one lacks."""

    @property
    def relative(self) -> float:
        """The error over the norm."""


S = TypeVar("S", bound=Lossy)


@dataclass(frozen=True, repr=False)
class Written(Generic[S]):
    """A new adapter file and what was lost on the way to it.

    Attributes:
        out: path of the file.
        name: the adapter's name in it.
        size: its size in bytes.
        sites: one row per site, in the order of the file.
    """

    out: str
    name: str
    size: int
    sites: tuple[S, ...]

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

    def __iter__(self) -> Iterator[S]:
        return iter(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as values that JSON can hold."""
        return {
            "out": self.out,
            "name": self.name,
            "size": self.size,
            "norm": self.norm,
            "error": self.error,
            "relative": self.relative,
            "sites": [asdict(site) | {"relative": site.relative} for site in self.sites],  # type: ignore[call-overload]
        }
