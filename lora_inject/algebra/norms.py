"""How large the updates of an adapter file are, and how many directions they use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..tables import dims, table
from .cut import effective_rank, stable_rank
from .terms import Term, read_terms


@dataclass(frozen=True, slots=True)
class Sizes:
    """Norms and ranks of one update, or of several seen as one block-diagonal matrix.

    Attributes:
        frobenius: root of the sum of the squared singular values.
        spectral: the largest singular value.
        nuclear: their sum.
        effective_rank: exp of the entropy of their shares of that sum (Roy & Vetterli 2007); 0 for a zero update.
        stable_rank: squared Frobenius over squared spectral norm; 0 for a zero update.
    """

    frobenius: float
    spectral: float
    nuclear: float
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True, slots=True)
class SiteNorms:
    """The sizes of one site.

    Attributes:
        path: path of the site.
        adapter: kind of the adapter class.
        shape: shape of the adapted weight.
        rank: inner size of the factors.
        sizes: norms and ranks of the update, scaling included and biases left out.
    """

    path: str
    adapter: str
    shape: tuple[int, ...]
    rank: int
    sizes: Sizes


@dataclass(frozen=True, repr=False)
class Norms:
    """What `norms` found; prints as a table.

    Attributes:
        file: path of the file.
        sites: one row per site, in the order of the file.
        total: all sites as one block-diagonal matrix.
    """

    file: str
    sites: tuple[SiteNorms, ...]
    total: Sizes

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[SiteNorms]:
        return iter(self.sites)

    def __repr__(self) -> str:
        return f"<Norms of {self.file}: {len(self)} sites, |dW| {self.total.frobenius:.4g}>"

    def __str__(self) -> str:
        headers = ("path", "adapter", "shape", "rank", "frobenius", "spectral", "nuclear", "effective", "stable")
        rows = [(s.path or "(root)", s.adapter, dims(s.shape), s.rank, *asdict(s.sizes).values()) for s in self.sites]
        return table(headers, [*rows, ("all together", "", "", "", *asdict(self.total).values())])

    def to_dict(self) -> dict[str, Any]:
        """Returns the norms as values that JSON can hold."""
        return {
            "file": self.file,
            "total": asdict(self.total),
            "sites": [
                {name: value for name, value in asdict(site).items() if name != "sizes"} | asdict(site.sizes)
                for site in self.sites
            ],
        }


def norms(adapter: str | os.PathLike[str]) -> Norms:
    """Returns norms and effective ranks of every update of a file, and of all together.

    All come from the singular values of scaling * B A, found in float64 from the factors: QR of both, then the
    singular values of a core of the size of the rank. Each matrix of a stack gives its own. Biases are left out.

    Args:
        adapter: a file written by `export`; a string may end in ":weight".

    Raises:
        FormatError: the file cannot be read, contradicts itself, or holds NaN or infinity.
        UnsupportedError: a kind of adapter whose update is no low-rank product.
    """
    (terms,) = read_terms(adapter)
    values = [_values(term) for term in terms]
    rows = [
        SiteNorms(term.record.path, term.record.kind, term.form.weight, term.record.config.rank, _sizes([own]))
        for term, own in zip(terms, values, strict=True)
    ]
    return Norms(str(terms[0].source.path), tuple(rows), _sizes(values))


def _values(term: Term) -> Tensor:
    return term.load().values().flatten() * abs(term.coefficient)


def _sizes(values: Sequence[Tensor]) -> Sizes:
    every = torch.cat(list(values))
    return Sizes(
        frobenius=float(every.norm()),
        spectral=float(every.max()) if every.numel() else 0.0,
        nuclear=float(every.sum()),
        effective_rank=effective_rank(every),
        stable_rank=stable_rank(every),
    )
