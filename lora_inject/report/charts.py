"""Small charts of one kind of module as inline SVG: its spectra, and its effective ranks over the columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import quantiles

from ..inspected import Inspection, SiteSummary
from .layout import Band, Grid
from .markup import Markup, tag
from .scale import decades
from .spectra import Spectrum, thinned
from .text import clean, number

WIDTH, HEIGHT = 300, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 22, 34
LINES = 48
"""Most lines of one chart; the spectra of more sites are shown by their quantiles."""
MANY = 200
"""Dots of one chart from which on they are drawn smaller."""
POINTS = 48
"""Most points of one line."""
SHADES = 16
"""How many colours tell the columns apart."""
DEPTH = 1e-6
"""Singular values below this share of the largest one are not drawn."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Maps numbers to pixels of a chart: x linear, y linear or logarithmic."""

    left: float
    right: float
    low: float
    high: float
    logarithmic: bool = False

    def x(self, value: float) -> float:
        """Returns the pixel of an x."""
        span = self.right - self.left or 1
        middle = 0.5 if self.right == self.left else (value - self.left) / span
        return round(LEFT + middle * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Returns the pixel of a y."""
        low, high, at = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return round(HEIGHT - BOTTOM - (at - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """Returns a line through the points, as the data of an SVG path."""
        return "M" + "L".join(f"{self.x(x):g} {self.y(y):g}" for x, y in points)


def known(inspection: Inspection, band: Band) -> list[tuple[int, SiteSummary, Spectrum]]:
    """Returns index, site and spectrum of the sites of a kind whose update is known and not zero."""
    sites = ((i, inspection.sites[i]) for i in band.sites)
    return [(i, s, s.spectrum) for i, s in sites if s.spectrum is not None and s.spectrum.values[0] > 0]


def sigma_range(inspection: Inspection) -> tuple[float, float] | None:
    """Returns the range of all singular values that are drawn, or None where there is none."""
    values = [v for site in inspection if site.spectrum is not None for v in site.spectrum.values if v > 0]
    if not values:
        return None
    high = max(values)
    low = min(value for value in values if value >= high * DEPTH)
    return low / 1.3, high * 1.3


def shade_share(grid: Grid, column: int) -> float:
    """Returns where a column's colour lies between that of the first (0) and that of the last (1)."""
    return column / max(1, len(grid.columns) - 1)


def shade(grid: Grid, column: int) -> int:
    """Returns the number of a column's colour on the page, from 0 for the first to `SHADES` - 1 for the last."""
    return round(shade_share(grid, column) * (SHADES - 1))


def rank_top(inspection: Inspection, band: Band) -> tuple[int, int]:
    """Returns up to where the axis of a kind's effective ranks reaches, and the largest rank that they can have."""
    spectra = [s for i in band.sites if (s := inspection.sites[i].spectrum) is not None]
    rank = max((len(spectrum.values) for spectrum in spectra), default=1)
    used = max((spectrum.effective_rank_range[1] for spectrum in spectra), default=0.0)
    # A rank far above what is used would press all points to the ground.
    return rank if rank <= 4 * max(1.0, used) else max(1, math.ceil(1.25 * used)), rank


def band_cuts(spectra: Sequence[Sequence[float]], low: float) -> list[tuple[int, list[float]]]:
    """Returns by position the least, the 10 %, 50 % and 90 % quantiles, and the largest of many spectra.

    Args:
        spectra: singular values, largest first; positions that a spectrum does not have, or where it is zero, do not
            count.
        low: what is smaller counts as this.
    """
    cuts = []
    for place, _ in thinned(range(max(map(len, spectra))), POINTS):
        values = [max(s[place - 1], low) for s in spectra if len(s) >= place and s[place - 1] > 0]
        if values:
            inner = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
            cuts.append((place, [min(values), inner[0], inner[4], inner[8], max(values)]))
    return cuts


def spectra_chart(inspection: Inspection, grid: Grid, band: Band, reach: tuple[float, float]) -> Markup:
    """Returns the singular values of the sites of a kind by their position, on a logarithmic axis."""
    found = known(inspection, band)
    longest = max((len(spectrum.values) for _, _, spectrum in found), default=1)
    frame = Frame(1, longest, *reach, logarithmic=True)
    many = len(found) > LINES
    lines = _quantiles(frame, [s.values for _, _, s in found]) if many else _lines(frame, grid, found)
    y = [(value, number(value)) for value in decades(*reach)]
    name = f"Singular values of {len(found)} sites of kind {clean(band.label)}"
    return _chart(frame, lines, y, _whole(1, longest), "singular values σᵢ by i", name)


def _lines(frame: Frame, grid: Grid, found: Sequence[tuple[int, SiteSummary, Spectrum]]) -> Iterator[Markup]:
    for i, site, spectrum in found:
        points = [(x, y) for x, y in thinned(spectrum.values, POINTS) if y >= frame.low]
        colour = shade(grid, grid.places[i].column)
        title = tag("title", f"{clean(site.path) or '(root)'}: σ₁ = {number(spectrum.values[0])}")
        # A single value is a point: a line of no length with round ends.
        shape = f"{frame.path(points)}h0" if len(points) == 1 else frame.path(points)
        yield tag("path", title, class_=f"line s{colour}", d=shape)


def _quantiles(frame: Frame, spectra: Sequence[Sequence[float]]) -> Iterator[Markup]:
    """Yields the range, the middle 80 % and the median of many spectra, position by position."""
    cuts = band_cuts(spectra, frame.low)
    for low, high in ((0, 4), (1, 3)):
        around = [(x, q[low]) for x, q in cuts] + [(x, q[high]) for x, q in reversed(cuts)]
        yield tag("path", class_="range", d=f"{frame.path(around)}Z")
    yield tag("path", class_="line median", d=frame.path([(x, q[2]) for x, q in cuts]))


def rank_chart(inspection: Inspection, grid: Grid, band: Band) -> Markup:
    """Returns the effective rank of the sites of a kind by column, under a dashed line at the rank of the factors."""
    found = [(i, inspection.sites[i], spectrum) for i in band.sites if (spectrum := inspection.sites[i].spectrum)]
    top, rank = rank_top(inspection, band)
    frame = Frame(0, len(grid.columns) - 1, 0, top * 1.08)
    marks = [*_ranges(frame, grid, found), *_dots(frame, grid, found)]
    if top == rank:
        y = frame.y(rank)
        marks.insert(0, tag("line", class_="limit", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
    shown = _spread(len(grid.columns), 5)
    x = [(float(i), grid.columns[i]) for i in shown]
    y_ticks = [(float(v), str(v)) for v in sorted({0, round(top / 2), round(top)})]
    name = f"Effective rank of {len(found)} sites of kind {clean(band.label)}"
    title = f"effective rank by {'depth' if grid.axis.startswith('depth') else 'column'}"
    return _chart(frame, marks, y_ticks, x, title + ", largest possible dashed" * (top == rank), name)


Found = Sequence[tuple[int, SiteSummary, Spectrum]]


def _dots(frame: Frame, grid: Grid, found: Found) -> Iterator[Markup]:
    by_shade: dict[int, list[str]] = {}
    for i, _, spectrum in found:
        column = grid.places[i].column
        by_shade.setdefault(shade(grid, column), []).append(
            f"M{frame.x(column):g} {frame.y(spectrum.effective_rank):g}h0"
        )
    for number_, dots in by_shade.items():
        yield tag("path", class_=f"dot{' many' * (len(found) > MANY)} s{number_}", d="".join(dots))


def _ranges(frame: Frame, grid: Grid, found: Found) -> Iterator[Markup]:
    for i, _, spectrum in found:
        if spectrum.matrices > 1:
            x, (low, high) = frame.x(grid.places[i].column), spectrum.effective_rank_range
            yield tag("path", class_="spread", d=f"M{x:g} {frame.y(low):g}V{frame.y(high):g}")


def _spread(count: int, most: int) -> list[int]:
    """Returns at most `most` indices below `count`, evenly spread."""
    step = max(1, math.ceil((count - 1) / (most - 1)))
    return list(range(0, count, step))


def _whole(low: int, high: int) -> list[tuple[float, str]]:
    return [(float(low + i), str(low + i)) for i in _spread(high - low + 1, 6)]


Ticks = Sequence[tuple[float, str]]


def _chart(frame: Frame, marks: Iterable[Markup], y: Ticks, x: Ticks, title: str, name: str) -> Markup:
    """Returns a chart with its axes; the marks lie over the grid."""

    def lines() -> Iterator[Markup]:
        for value, label in y:
            at = frame.y(value)
            yield tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at)
            yield tag("text", label, class_="end", x=LEFT - 6, y=at + 4)
        for value, label in x:
            yield tag("text", label, class_="mid", x=frame.x(value), y=HEIGHT - BOTTOM + 18)

    heading = tag("text", title, class_="head", x=LEFT, y=12)
    box = f"0 0 {WIDTH} {HEIGHT}"
    return tag("svg", heading, lines(), marks, class_="chart", viewBox=box, role="img", aria_label=name)
