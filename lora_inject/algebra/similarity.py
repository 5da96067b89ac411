"""How alike the updates of two adapter files are: in direction as a whole, and in the spaces they read and write."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..tables import dims, table
from .lowrank import Svd
from .terms import Group, Term, match, read_terms

RELATIVE = 1e-10
"""Singular values below this share of the largest are rounding, and span no direction of their own."""


@dataclass(frozen=True, slots=True)
class SiteSimilarity:
    """How alike two updates of one site are.

    Attributes:
        path: path of the site.
        adapter: kind of the adapter class.
        shape: shape of the adapted weight.
        cosine: Frobenius inner product over the product of the norms, in [-1, 1]; 0 where an update is zero.
        column_cosines: cosines of the principal angles between the column spaces (what the updates write to),
            descending, one after the other for the matrices of a stack.
        row_cosines: the same for the row spaces (what they read from).
        inner: Frobenius inner product.
        norms: the Frobenius norms of both updates.
    """

    path: str
    adapter: str
    shape: tuple[int, ...]
    cosine: float
    column_cosines: tuple[float, ...]
    row_cosines: tuple[float, ...]
    inner: float
    norms: tuple[float, float]

    @property
    def columns(self) -> float:
        """Mean squared cosine of the angles between the column spaces: 0 orthogonal, 1 one lies in the other.

        Hu et al. 2021 (arXiv:2106.09685), equation 4, for the whole spaces.
        """
        return _mean_square(self.column_cosines)

    @property
    def rows(self) -> float:
        """The same for the row spaces."""
        return _mean_square(self.row_cosines)


@dataclass(frozen=True, repr=False)
class Similarity:
    """What `similarity` found; prints as a table.

    Attributes:
        files: paths of both files.
        cosine: cosine of both adapters as a whole; a site that one lacks counts as zero there.
        norms: Frobenius norms of both adapters.
        sites: one row per site that both have.
        alone: paths that only the first has, and that only the second has.
    """

    files: tuple[str, str]
    cosine: float
    norms: tuple[float, float]
    sites: tuple[SiteSimilarity, ...]
    alone: tuple[tuple[str, ...], tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[SiteSimilarity]:
        return iter(self.sites)

    def __repr__(self) -> str:
        return f"<Similarity of {' and '.join(self.files)}: cosine {self.cosine:.4g}, {len(self)} sites in both>"

    def __str__(self) -> str:
        headers = ("path", "adapter", "shape", "cosine", "columns", "rows", "|dW| first", "|dW| second")
        rows = [
            (s.path or "(root)", s.adapter, dims(s.shape), s.cosine, s.columns, s.rows, *s.norms) for s in self.sites
        ]
        lines = [table(headers, rows), "", f"cosine of all sites together: {self.cosine:.4g}"]
        for file, paths in zip(self.files, self.alone, strict=True):
            lines += [f"only in {file}: {', '.join(path or '(root)' for path in paths)}"] if paths else []
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns the similarity as values that JSON can hold."""
        sites = [asdict(site) | {"columns": site.columns, "rows": site.rows} for site in self.sites]
        return asdict(self) | {"sites": sites}


def similarity(a: str | os.PathLike[str], b: str | os.PathLike[str], *, check_base: bool = True) -> Similarity:
    """Returns how alike the updates of two files are, site by site and as a whole, from the factors alone.

    Args:
        a: one file written by `export`.
        b: the other.
        check_base: False compares adapters whose bases have different fingerprints.

    Raises:
        FormatError: a file that cannot be read, contradicts itself, or holds NaN or infinity.
        MismatchError: different kinds, shapes or bases at one site; lists all of them.
        UnsupportedError: a kind of adapter whose update is no low-rank product.
    """
    files = read_terms([a, b])
    first, second = (terms[0].source for terms in files)
    groups = match(files, check_base)
    both = [group for group in groups if len(group.terms) == 2]
    sites = tuple(_compare(group) for group in both)
    alone = [group.terms[0] for group in groups if len(group.terms) == 1]
    owns = tuple(tuple(t.record.path for t in alone if t.source is source) for source in (first, second))
    norms = tuple(
        math.hypot(*(site.norms[i] for site in sites), *(_norm(t) for t in alone if t.source is source))
        for i, source in enumerate((first, second))
    )
    inner = math.fsum(site.inner for site in sites)
    names = (str(first.path), str(second.path))
    return Similarity(names, _cosine(inner, *norms), (norms[0], norms[1]), sites, (owns[0], owns[1]))


def _norm(term: Term) -> float:
    return float(term.load().values().norm()) * abs(term.coefficient)


def _compare(group: Group) -> SiteSimilarity:
    one, other = (term.load().low for term in group.terms)
    svds = one.svd(), other.svd()
    coefficients = [term.coefficient for term in group.terms]
    norms = [float(svd.s.norm()) * abs(c) for svd, c in zip(svds, coefficients, strict=True)]
    inner = one.inner(other) * coefficients[0] * coefficients[1]
    return SiteSimilarity(
        path=group.record.path,
        adapter=group.record.kind,
        shape=group.terms[0].form.weight,
        cosine=_cosine(inner, *norms),
        column_cosines=_angles(svds, "u"),
        row_cosines=_angles(svds, "v"),
        inner=inner,
        norms=(norms[0], norms[1]),
    )


def _cosine(inner: float, one: float, other: float) -> float:
    return max(-1.0, min(1.0, inner / one / other)) if one and other else 0.0


def _angles(svds: tuple[Svd, Svd], side: str) -> tuple[float, ...]:
    """Returns the cosines of the principal angles (Björck & Golub 1973): singular values of the bases' product."""
    pairs = zip(*(_bases(svd, side) for svd in svds), strict=True)
    cosines = [
        torch.linalg.svdvals(one.mT @ other).clamp(max=1.0) for one, other in pairs if min(one.shape[1], other.shape[1])
    ]
    return tuple(value for found in cosines for value in found.tolist())


def _bases(svd: Svd, side: str) -> list[Tensor]:
    """Returns an orthonormal basis of the column or row space of every matrix."""
    values, vectors = svd.s.unsqueeze(0).flatten(0, -2), getattr(svd, side).unsqueeze(0).flatten(0, -3)
    # Values descend, and there may be none.
    return [own[:, s > RELATIVE * s[:1].sum()] for own, s in zip(vectors, values, strict=True)]


def _mean_square(cosines: tuple[float, ...]) -> float:
    return math.fsum(cosine**2 for cosine in cosines) / len(cosines) if cosines else 0.0
