"""An inspection as a PNG, drawn by matplotlib: the heat map, then spectra and effective ranks by kind."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..inspected import Inspection
from .charts import LINES
from .geometry import MapShape
from .layout import Grid, arrange
from .metrics import Metric, metrics, total_relative
from .picture_charts import CARD, draw_card
from .scale import BRIGHT, MISSING, PALETTE, ZERO, Scale
from .text import number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, MARGIN = 1240, 36
"""Width of the picture and its margins, in points of which `DENSITY` pixels make one."""
DENSITY = 1.5
TALL = 3000
"""Greatest height of the heat map; more rows are drawn lower."""
CARDS = 16
"""Most kinds whose spectra are drawn: those with the largest updates."""
INK, SOFT, BAD = "#1b1f24", "#5b6470", "#b3261e"


def require_matplotlib() -> None:
    """Checks that matplotlib can be imported.

    Raises:
        ConfigError: it cannot; says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"a PNG needs matplotlib ({error}): pip install 'lora_inject[report]', or use --html"
        ) from None


def png_picture(inspection: Inspection) -> bytes:
    """Returns the picture as a PNG.

    Raises:
        ConfigError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid, metric = arrange([site.path for site in inspection]), metrics(inspection)[0]
    shape = MapShape(inspection, grid, [metric], fit=True)
    shrink = min(1.0, TALL / shape.height)
    bands = _largest(inspection, grid) if inspection.with_spectra else []
    map_top = 176
    cards_top = map_top + shape.height * shrink + 84
    height = cards_top + 40 + math.ceil(len(bands) / 2) * CARD[1] + 10 if bands else cards_top - 40
    style: Any = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}
    style |= {"xtick.color": SOFT, "ytick.color": SOFT, "axes.edgecolor": SOFT, "axes.labelcolor": SOFT}
    with rc_context(style):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72 * DENSITY, facecolor="white")
        FigureCanvasAgg(figure)
        _head(figure, inspection)
        _write(figure, MARGIN, map_top - 8, "Size of the update by kind and depth", size=12, weight="bold")
        _map(place(figure, MARGIN, map_top, WIDTH - 2 * MARGIN, shape.height * shrink), shape, metric)
        _legend(figure, metric, metric.scale(inspection), map_top + shape.height * shrink + 12)
        _cards(figure, inspection, grid, bands, cards_top)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def place(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Returns axes at a place in points, y from the top."""
    whole = figure.get_figheight() * 72
    return figure.add_axes((x / WIDTH, 1 - (y + height) / whole, width / WIDTH, height / whole))


def _write(figure: Figure, x: float, y: float, text: str, **options: Any) -> None:
    """Writes text at a place in points, y from the top; dollar signs stay dollar signs."""
    whole = figure.get_figheight() * 72
    figure.text(x / WIDTH, 1 - y / whole, text, parse_math=False, va="baseline", **options)


def _head(figure: Figure, inspection: Inspection) -> None:
    ranks = sorted({site.rank for site in inspection})
    facts = [f"{len(inspection):,} site{'s' * (len(inspection) != 1)}", f"{inspection.parameters:,} parameters"]
    facts.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} – {ranks[-1]}")
    facts.append(f"‖ΔW‖ of all sites {number(inspection.norm_delta)}")
    if inspection.base is not None:
        facts.append(f"‖ΔW‖ / ‖W‖ of all sites {number(total_relative(inspection))}")
    broken = sum(bool(site.problem) for site in inspection)
    _write(figure, MARGIN, 48, f"Adapter “{plain(inspection.name)}”", size=18, weight="bold")
    _write(figure, MARGIN, 72, plain(inspection.file, 130), size=10, color=SOFT)
    base = "not given, so ‖W‖ is unknown" if inspection.base is None else plain(inspection.base, 130)
    _write(figure, MARGIN, 90, f"Base: {base}", size=10, color=SOFT)
    _write(figure, MARGIN, 112, "  ·  ".join(facts), size=10)
    if broken:
        problems = f"{broken:,} of {len(inspection):,} sites have problems: load refuses this file"
        _write(figure, MARGIN, 134, problems, size=10, color=BAD)


def _map(axes: Axes, shape: MapShape, metric: Metric) -> None:
    """Draws the cells at the places that they have on the page."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, WIDTH - 72), ylim=(shape.height, 0))
    axes.axis("off")
    drawn: dict[str, list[Rectangle]] = {}
    for cell in shape.cells():
        step = cell.steps[0]
        drawn.setdefault(step, []).append(Rectangle((cell.x, cell.y), cell.width, cell.height))
        if cell.roomy:
            ink = INK if step in (ZERO, MISSING) or int(step) >= BRIGHT else "white"
            text = number(metric.value(cell.site))
            axes.text(
                cell.x + cell.width / 2, cell.y + cell.height / 2, text, ha="center", va="center", size=8, color=ink
            )
    for step, patches in drawn.items():
        axes.add_collection(PatchCollection(patches, **_look(step)))
    for x, y, label in shape.columns():
        axes.text(x, y, label, ha="center", size=8.5, color=SOFT)
    for x, y, label, _ in shape.rows():
        axes.text(x, y, plain(label), ha="right", va="baseline", size=8, family="DejaVu Sans Mono", parse_math=False)


def _look(step: str) -> dict[str, Any]:
    """Returns how cells of a step are filled."""
    if step == ZERO:
        return {"facecolor": "none", "edgecolor": SOFT, "linewidth": 0.7}
    if step == MISSING:
        return {"facecolor": "none", "edgecolor": BAD, "linewidth": 0.7, "hatch": "////"}
    return {"facecolor": PALETTE[int(step)], "edgecolor": "none"}


def _legend(figure: Figure, metric: Metric, scale: Scale, top: float) -> None:
    from matplotlib.patches import Rectangle

    axes = place(figure, MARGIN, top, 620, 40)
    axes.set(xlim=(0, 620), ylim=(40, 0))
    axes.axis("off")
    for i, colour in enumerate(PALETTE):
        axes.add_patch(Rectangle((24 + i * 12, 4), 12.3, 12, facecolor=colour, edgecolor="none"))
    for share, value in scale.ticks():
        axes.text(24 + share * 384, 31, number(value), ha="center", size=8.5, color=SOFT)
    for x, step, text in ((440, ZERO, "zero"), (510, MISSING, "no number")):
        axes.add_patch(Rectangle((x, 4), 22, 12, **_look(step)))
        axes.text(x + 28, 14, text, size=8.5)
    axes.text(440, 31, f"{metric.label}, {'logarithmic' if scale.logarithmic else 'linear'}", size=8.5)


def _largest(inspection: Inspection, grid: Grid) -> list[int]:
    """Returns the kinds with the largest updates, in the order of the file."""
    sizes = [
        math.hypot(*(size for i in band.sites if math.isfinite(size := inspection.sites[i].norm_delta or 0.0)))
        for band in grid.bands
    ]
    return sorted(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:CARDS])


def _cards(figure: Figure, inspection: Inspection, grid: Grid, bands: list[int], top: float) -> None:
    if not bands:
        return
    left = len(grid.bands) - len(bands)
    more = f"; the {len(bands)} kinds with the largest updates, {left} left out" if left else ""
    _write(figure, MARGIN, top, f"Spectra and effective rank by kind{more}", size=12, weight="bold")
    key = f"Orange: first column, purple: last. Kinds with more than {LINES} sites: median, middle 80 % and range."
    _write(figure, MARGIN, top + 18, key, size=8.5, color=SOFT)
    for i, band in enumerate(bands):
        x, y = MARGIN + (i % 2) * CARD[0], top + 44 + (i // 2) * CARD[1]
        left_axes, right_axes = place(figure, x + 40, y + 28, 230, 112), place(figure, x + 330, y + 28, 230, 112)
        _write(figure, x, y + 4, plain(grid.bands[band].label, 70), size=9.5, weight="bold")
        draw_card(left_axes, right_axes, inspection, grid, grid.bands[band])
