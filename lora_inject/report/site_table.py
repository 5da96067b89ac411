"""The table of a page: every site with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..inspected import Inspection, SiteSummary
from ..tables import dims
from .markup import Markup, tag
from .metrics import state
from .spectra import Spectrum
from .text import clean, number

Column = tuple[str, Callable[[SiteSummary], str]]


def _of(get: Callable[[Spectrum], float]) -> Callable[[SiteSummary], str]:
    return lambda site: "–" if site.spectrum is None else number(get(site.spectrum))


FIRST: tuple[Column, ...] = (
    ("site", lambda site: clean(site.path) or "(root)"),
    ("adapter", lambda site: clean(site.adapter)),
    ("shape", lambda site: dims(site.shape)),
    ("rank", lambda site: str(site.rank)),
    ("scaling", lambda site: number(site.scaling)),
    ("‖A‖", lambda site: number(site.norm_a)),
    ("‖B‖", lambda site: number(site.norm_b)),
    ("‖ΔW‖", lambda site: number(site.norm_delta)),
)
WITH_BASE: tuple[Column, ...] = (
    ("‖W‖", lambda site: number(site.norm_base)),
    ("‖ΔW‖ / ‖W‖", lambda site: number(site.relative)),
)
WITH_SPECTRA: tuple[Column, ...] = (
    ("σ₁", _of(lambda spectrum: spectrum.values[0])),
    ("effective rank", _of(lambda spectrum: spectrum.effective_rank)),
    ("stable rank", _of(lambda spectrum: spectrum.stable_rank)),
    ("90 %", _of(lambda spectrum: spectrum.rank_90)),
    ("99 %", _of(lambda spectrum: spectrum.rank_99)),
)
LAST: tuple[Column, ...] = (("note", state),)
TEXT = {"site", "adapter", "shape", "note"}
"""Columns that sort as text and stand to the left."""


def site_table(inspection: Inspection) -> Markup:
    """Returns the section with the table, a row per site in the order of the file."""
    columns = (*FIRST, *WITH_BASE * (inspection.base is not None), *WITH_SPECTRA * inspection.with_spectra, *LAST)
    headers = [tag("th", name, scope="col", class_="l" if name in TEXT else None) for name, _ in columns]
    text = " ".join(str(i) for i, (name, _) in enumerate(columns) if name in TEXT)
    rows = [tag("tr", _cells(columns, site)) for site in inspection]
    table = tag("table", tag("thead", tag("tr", headers)), tag("tbody", rows, data_text=text), id="sites")
    return tag("section", tag("h2", "All sites"), tag("div", table, class_="tall", tabindex=0))


def _cells(columns: tuple[Column, ...], site: SiteSummary) -> Iterator[Markup]:
    for i, (name, get) in enumerate(columns):
        value = get(site)
        # The first column stands to the left by itself: a class in each of thousands of rows would only cost room.
        class_ = None if i == 0 or name not in TEXT else "l bad" if name == "note" and value else "l"
        yield tag("td", value, class_=class_)
