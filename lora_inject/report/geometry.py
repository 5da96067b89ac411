"""Where the cells and labels of a heat map lie, for the page and the picture alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..inspected import Inspection, SiteSummary
from .layout import Band, Grid
from .metrics import Metric
from .text import clean

WIDTH = 860
"""Pixels that the columns share, unless that makes cells too narrow or too wide."""
NARROW, WIDE, ROOMY = 7, 76, 46
"""Least and greatest width of a cell in pixels, and the least that has room for a number."""
HEIGHT, LANE = 24, 4
"""Height in pixels of the one lane of a kind, and the least of one among several."""
LABEL = 48
"""Longest label of a row in characters."""
TOP = 22


@dataclass(frozen=True, slots=True)
class Cell:
    """One site of a heat map: its rectangle in pixels, and the step of the palette by each metric."""

    index: int
    site: SiteSummary
    x: float
    y: float
    width: float
    height: float
    steps: tuple[str, ...]
    roomy: bool


class MapShape:
    """The places of all cells and labels.

    Args:
        inspection: the sites.
        grid: their rows and columns.
        given: the metrics that cells have steps for.
        fit: whether all columns share `WIDTH`, however many there are.
    """

    def __init__(self, inspection: Inspection, grid: Grid, given: list[Metric], fit: bool = False) -> None:
        self.inspection, self.grid, self.given = inspection, grid, given
        self.labels = [clean(band.label, LABEL) for band in grid.bands]
        self.left = 16 + 7.4 * max(map(len, self.labels))
        self.cell = min(WIDE, max(0 if fit else NARROW, WIDTH / len(grid.columns)))
        self.width = math.ceil(self.left + self.cell * len(grid.columns) + 8)
        self.tops = [float(TOP)]
        for band in grid.bands:
            self.tops.append(self.tops[-1] + band.lanes * lane_height(band) + 4)
        self.height = self.tops[-1]

    def cells(self) -> Iterator[Cell]:
        """Yields a cell per site, in the order of the sites."""
        scales = [metric.scale(self.inspection) for metric in self.given]
        for i, (site, place) in enumerate(zip(self.inspection, self.grid.places, strict=True)):
            tall = lane_height(self.grid.bands[place.band])
            gap = 2 if tall >= 8 else tall / 8
            steps = tuple(scale.step(metric.value(site)) for metric, scale in zip(self.given, scales, strict=True))
            x, y = self.left + place.column * self.cell, self.tops[place.band] + place.lane * tall
            roomy = self.cell >= ROOMY and tall >= 14
            yield Cell(i, site, x, y, self.cell - min(gap, self.cell / 5), tall - gap, steps, roomy)

    def columns(self) -> Iterator[tuple[float, float, str]]:
        """Yields middle, base line and text of the labels of the columns, as many as have room."""
        longest = max(map(len, self.grid.columns))
        for i in range(0, len(self.grid.columns), max(1, math.ceil((7 * longest + 8) / self.cell))):
            yield self.left + (i + 0.5) * self.cell, TOP - 8, self.grid.columns[i]

    def rows(self) -> Iterator[tuple[float, float, str, Band]]:
        """Yields right end, base line and text of the label of each kind."""
        for band, label, top in zip(self.grid.bands, self.labels, self.tops, strict=False):
            yield self.left - 8, top + band.lanes * lane_height(band) / 2 + 4, label, band


def lane_height(band: Band) -> float:
    """Returns the height of one lane in pixels."""
    return HEIGHT if band.lanes == 1 else max(LANE, min(HEIGHT - 4, 160 / band.lanes))
