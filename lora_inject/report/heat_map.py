"""The heat map of a page: a cell per site as inline SVG, coloured by classes that the page switches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ..inspected import Inspection
from .layout import Band, Grid
from .markup import Markup, tag
from .metrics import Metric, describe
from .scale import BRIGHT, MISSING, PALETTE, ZERO, Scale
from .text import clean, number

WIDTH = 860
"""Pixels that the columns share, unless that makes cells too narrow or too wide."""
NARROW, WIDE, ROOMY = 7, 76, 46
"""Least and greatest width of a cell in pixels, and the least that has room for a number."""
HEIGHT, LANE = 24, 4
"""Height in pixels of the one lane of a kind, and the least of one among several."""
LABEL = 34
"""Longest label of a row in characters."""
TOP = 22


class HeatMap:
    """Positions of cells and labels in pixels."""

    def __init__(self, inspection: Inspection, grid: Grid, given: list[Metric]) -> None:
        self.inspection, self.grid, self.given = inspection, grid, given
        self.scales = [metric.scale(inspection) for metric in given]
        self.labels = [clean(band.label, LABEL) for band in grid.bands]
        self.left = 16 + 7.4 * max(map(len, self.labels))
        self.cell = min(WIDE, max(NARROW, WIDTH / len(grid.columns)))
        self.tops = [float(TOP)]
        for band in grid.bands:
            self.tops.append(self.tops[-1] + band.lanes * lane_height(band) + 4)

    def svg(self) -> Markup:
        """Returns the map."""
        width, height = math.ceil(self.left + self.cell * len(self.grid.columns) + 8), math.ceil(self.tops[-1])
        label = f"Heat map of {len(self.inspection)} sites: a row per kind of module, a column per {self.grid.axis}"
        name = f"{label}. The table below has the same numbers."
        parts = (self._columns(), self._rows(), self._cells())
        return tag("svg", *parts, class_="map", width=width, height=height, role="img", aria_label=name)

    def _columns(self) -> Iterator[Markup]:
        longest = max(map(len, self.grid.columns))
        every = max(1, math.ceil((7 * longest + 8) / self.cell))
        for i in range(0, len(self.grid.columns), every):
            x = self.left + (i + 0.5) * self.cell
            yield tag("text", self.grid.columns[i], class_="mid", x=x, y=TOP - 8)

    def _rows(self) -> Iterator[Markup]:
        for band, label, top in zip(self.grid.bands, self.labels, self.tops, strict=False):
            middle = top + band.lanes * lane_height(band) / 2 + 4
            full = tag("title", clean(band.label))
            yield tag("text", label, full, class_="end", x=self.left - 8, y=middle)

    def _cells(self) -> Iterator[Markup]:
        roomy = self.cell >= ROOMY
        for i, (site, place) in enumerate(zip(self.inspection, self.grid.places, strict=True)):
            band = self.grid.bands[place.band]
            tall = lane_height(band)
            x, y = self.left + place.column * self.cell, self.tops[place.band] + place.lane * tall
            gap = 1 if tall < 8 else 2
            steps = [scale.step(metric.value(site)) for metric, scale in zip(self.given, self.scales, strict=True)]
            classes = " ".join(f"{metric.letter}{step}" for metric, step in zip(self.given, steps, strict=True))
            title = tag("title", describe(site, self.given))
            size = {"width": self.cell - min(gap, self.cell / 5), "height": tall - gap}
            yield tag("rect", title, class_=classes, data_site=i, x=x, y=y, **size)
            if roomy and tall >= 14:
                yield from self._numbers(i, steps, x + self.cell / 2 - 1, y + tall / 2 + 3)

    def _numbers(self, index: int, steps: Sequence[str], x: float, y: float) -> Iterator[Markup]:
        site = self.inspection.sites[index]
        for metric, step in zip(self.given, steps, strict=True):
            ink = "plain" if step in (ZERO, MISSING) else "ink" if int(step) >= BRIGHT else "paper"
            yield tag("text", number(metric.value(site)), class_=f"in {ink} t{metric.letter}", x=x, y=y)


def lane_height(band: Band) -> float:
    """Returns the height of one lane in pixels."""
    return HEIGHT if band.lanes == 1 else max(LANE, min(HEIGHT - 4, 160 / band.lanes))


def legend(metric: Metric, scale: Scale) -> Markup:
    """Returns the palette with numbers, and what the cells outside of it mean."""
    width, step = 384, 12
    bars = [
        tag("rect", x=14 + i * step, y=4, width=step + 0.5, height=12, fill=colour) for i, colour in enumerate(PALETTE)
    ]
    ticks = [tag("text", number(value), class_="mid", x=14 + share * width, y=31) for share, value in scale.ticks()]
    kind = "logarithmic" if scale.logarithmic else "linear"
    extra = [
        tag("rect", class_="zero", x=430, y=4, width=22, height=12),
        tag("text", "zero", x=458, y=14),
        tag("rect", class_="missing", x=500, y=4, width=22, height=12),
        tag("text", "no number", x=528, y=14),
        tag("text", f"{metric.label}, {kind}", x=430, y=31),
    ]
    name = f"Legend: {metric.label} from {number(scale.low)}, dark, to {number(scale.high)}, light; {kind}"
    return tag(
        "svg", bars, ticks, extra, class_=f"legend l{metric.letter}", width=600, height=36, role="img", aria_label=name
    )


def rules(given: Sequence[Metric]) -> str:
    """Returns the style rules that colour cells by the metric that is chosen."""
    lines = []
    for metric in given:
        chosen = f"#by-{metric.letter}:checked~.scroll"
        lines += [f"{chosen} .{metric.letter}{i}{{fill:{colour}}}" for i, colour in enumerate(PALETTE)]
        lines.append(f"{chosen} .{metric.letter}{ZERO}{{fill:none;stroke:var(--soft)}}")
        lines.append(f"{chosen} .{metric.letter}{MISSING}{{fill:url(#hatch);stroke:var(--bad)}}")
        lines.append(f"{chosen} .t{metric.letter}{{display:inline}}")
        lines.append(f"#by-{metric.letter}:checked~.legends .l{metric.letter}{{display:block}}")
    return "\n".join(lines)
