"""The two small charts of one kind of module on a picture: its spectra and its effective ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..inspected import Inspection
from .charts import LINES, MANY, band_cuts, known, rank_top, shade_share, sigma_range
from .layout import Band, Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CARD = (584, 194)
"""Width and height of a kind's two charts in points."""
FIRST, LAST, BAND, RULE, SOFT = "#e08a1e", "#4b2a86", "#7b5aa6", "#d9dde3", "#5b6470"


def draw_card(spectra: Axes, ranks: Axes, inspection: Inspection, grid: Grid, band: Band) -> None:
    """Draws the singular values of a kind's sites into one pair of axes, their effective ranks into the other."""
    for axes in (spectra, ranks):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, length=2)
    _spectra(spectra, inspection, grid, band)
    _ranks(ranks, inspection, grid, band)


def _colours(grid: Grid) -> list[tuple[float, ...]]:
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("depth", [FIRST, LAST])
    return [tuple(ramp(shade_share(grid, column))) for column in range(len(grid.columns))]


def _spectra(axes: Axes, inspection: Inspection, grid: Grid, band: Band) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

    axes.set_title("singular values σᵢ by i", size=8.5, color=SOFT, loc="left")
    reach, found = sigma_range(inspection), known(inspection, band)
    if reach is None or not found:
        axes.text(0.5, 0.5, "no update other than zero", ha="center", transform=axes.transAxes, size=8.5, color=SOFT)
        axes.set(xticks=[], yticks=[])
        return
    colours = _colours(grid)
    if len(found) > LINES:
        cuts = band_cuts([spectrum.values for _, _, spectrum in found], reach[0])
        x = [place for place, _ in cuts]
        for low, high in ((0, 4), (1, 3)):
            axes.fill_between(x, [q[low] for _, q in cuts], [q[high] for _, q in cuts], color=BAND, alpha=0.2, lw=0)
        axes.plot(x, [q[2] for _, q in cuts], color=BAND, lw=1.6)
    else:
        for i, _, spectrum in found:
            x, dot = list(range(1, len(spectrum.values) + 1)), "o" if len(spectrum.values) == 1 else None
            axes.plot(x, spectrum.values, color=colours[grid.places[i].column], lw=1, marker=dot, ms=3)
    axes.set(yscale="log", ylim=reach)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _ranks(axes: Axes, inspection: Inspection, grid: Grid, band: Band) -> None:
    found = [(i, spectrum) for i in band.sites if (spectrum := inspection.sites[i].spectrum) is not None]
    top, rank = rank_top(inspection, band)
    colours, columns = _colours(grid), [grid.places[i].column for i, _ in found]
    title = f"effective rank by {'depth' if grid.axis.startswith('depth') else 'column'}"
    if top == rank:
        axes.axhline(rank, color=SOFT, lw=0.9, ls=(0, (4, 3)))
        title += ", largest possible dashed"
    axes.set_title(title, size=8.5, color=SOFT, loc="left")
    for column, (_, spectrum) in zip(columns, found, strict=True):
        if spectrum.matrices > 1:
            axes.plot([column] * 2, spectrum.effective_rank_range, color=SOFT, alpha=0.6, lw=0.9)
    size = 4 if len(found) > MANY else 14
    axes.scatter(columns, [s.effective_rank for _, s in found], s=size, c=[colours[c] for c in columns], lw=0)
    axes.set(ylim=(0, top * 1.08), xlim=(-0.5, len(grid.columns) - 0.5))
    step = max(1, -(-len(grid.columns) // 6))
    shown = range(0, len(grid.columns), step)
    axes.set_xticks(list(shown), [grid.columns[i] for i in shown])
    axes.set_yticks(sorted({0, round(top / 2), top}))
