"""What `inspect_adapter` found in an adapter file: a summary per site, and the file as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .report.spectra import Spectrum
from .tables import dims, table


@dataclass(frozen=True, slots=True)
class SiteSummary:
    """What a file holds for one site.

    Attributes:
        path: path of the adapted module.
        aliases: its further paths.
        adapter: kind of the adapter class.
        shape: shape of the adapted weight, () for a whole block.
        rank: inner size of the factors.
        alpha: numerator of the scaling as the file has it; None stands for the rank.
        scaling: factor before B A.
        options: the other options, those of the adapter class included.
        dtype: dtype of the tensors; several are joined by "+".
        parameters: how many numbers the tensors hold.
        norm_a: Frobenius norm of `lora_A`, or None where there is none.
        norm_b: Frobenius norm of `lora_B`, or None where there is none.
        norm_delta: Frobenius norm of scaling * B A, or of scaling * `lora_dense`, biases left out; None where the
            file holds neither, or factors that do not fit together.
        base: hash of the weight that the adapter was trained on.
        problem: what is wrong with the site's tensors, or "".
        spectrum: singular values of the update and what follows from them; None where nobody asked, where the site
            has a problem, or where float64 cannot hold the update.
        norm_base: Frobenius norm of the adapted weight; None where nobody asked, or where the base does not hold it.
    """

    path: str
    aliases: tuple[str, ...]
    adapter: str
    shape: tuple[int, ...]
    rank: int
    alpha: float | None
    scaling: float
    options: Mapping[str, Any]
    dtype: str
    parameters: int
    norm_a: float | None
    norm_b: float | None
    norm_delta: float | None
    base: str
    problem: str
    spectrum: Spectrum | None = None
    norm_base: float | None = None

    @property
    def relative(self) -> float | None:
        """|dW| / |W|, or None where either is unknown or not finite, or W is zero."""
        if self.norm_delta is None or not self.norm_base:
            return None
        found = self.norm_delta / self.norm_base
        return found if math.isfinite(found) else None

    @property
    def effective_rank(self) -> float | None:
        """Effective rank of the update, or None where its spectrum is unknown."""
        return None if self.spectrum is None else self.spectrum.effective_rank

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as values that JSON can hold."""
        return asdict(self) | {"relative": self.relative}


@dataclass(frozen=True, repr=False)
class Inspection:
    """What `inspect_adapter` read; prints as a table.

    Attributes:
        file: path of the file.
        name: the adapter's name.
        program: what wrote it: lora_inject with its version, or the name of another format.
        size: bytes of the file.
        sites: one summary per site, in the order of the file.
        strays: names of tensors that belong to no site; `load` refuses a file with any.
        base: the checkpoint whose norms were read, or None.
        with_spectra: whether the spectra were asked for.
    """

    file: str
    name: str
    program: str
    size: int
    sites: tuple[SiteSummary, ...]
    strays: tuple[str, ...]
    base: str | None = None
    with_spectra: bool = False

    @property
    def parameters(self) -> int:
        """How many numbers the tensors of all sites hold."""
        return sum(site.parameters for site in self.sites)

    @property
    def norm_delta(self) -> float:
        """Frobenius norm of the updates of all sites, seen as one vector."""
        return math.hypot(*(site.norm_delta or 0.0 for site in self.sites))

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[SiteSummary]:
        return iter(self.sites)

    def __repr__(self) -> str:
        return f"<Inspection of {self.file}: {self.name!r}, {len(self)} sites, {self.parameters:,} parameters>"

    def __str__(self) -> str:
        headers = ["path", "adapter", "shape", "rank", "scaling", "dtype", "parameters", "|A|", "|B|", "|dW|"]
        headers += ["|dW|/|W|"] * (self.base is not None) + ["effective rank"] * self.with_spectra
        lines = [
            f"{self.file}: adapter {self.name!r}, written by {self.program}",
            "",
            table((*headers, "base", "note"), [self._row(site) for site in self.sites]),
            "",
            f"{len(self)} sites, {self.parameters:,} parameters, {self.size:,} bytes",
            f"|dW| of all sites together: {_norm_text(self.norm_delta)}",
        ]
        if self.strays:
            lines.append(f"tensors that belong to no site: {', '.join(self.strays)}")
        return "\n".join(lines)

    def _row(self, site: SiteSummary) -> tuple[object, ...]:
        norms = [site.norm_a, site.norm_b, site.norm_delta]
        norms += [site.relative] * (self.base is not None)
        norms += [site.effective_rank] * self.with_spectra
        given = [name for name, value in site.options.items() if value is True]
        note = ", ".join([site.problem] * bool(site.problem) + given)
        sizes = (dims(site.shape), site.rank, site.scaling, site.dtype, site.parameters)
        return (site.path or "(root)", site.adapter, *sizes, *map(_norm_text, norms), site.base, note)

    def to_dict(self) -> dict[str, Any]:
        """Returns the inspection as values that JSON can hold."""
        return {
            "file": self.file,
            "name": self.name,
            "program": self.program,
            "size": self.size,
            "parameters": self.parameters,
            "norm_delta": self.norm_delta,
            "sites": [site.to_dict() for site in self.sites],
            "strays": list(self.strays),
            "base": self.base,
        }


def _norm_text(norm: float | None) -> str:
    return "-" if norm is None else f"{norm:.4g}"
