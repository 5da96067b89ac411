"""The heat map of a page: a cell per site as inline SVG, coloured by classes that the page switches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .geometry import Cell, MapShape
from .markup import Markup, tag
from .metrics import Metric, describe
from .scale import BRIGHT, MISSING, PALETTE, ZERO, Scale
from .text import clean, number


def heat_map(shape: MapShape) -> Markup:
    """Returns the map."""
    label = f"Heat map of {len(shape.inspection)} sites: a row per kind of module, a column per {shape.grid.axis}"
    columns = [tag("text", text, class_="mid", x=x, y=y) for x, y, text in shape.columns()]
    rows = [
        tag("text", text, tag("title", clean(band.label)), class_="end", x=x, y=y) for x, y, text, band in shape.rows()
    ]
    return tag(
        "svg",
        columns,
        rows,
        [_cell(cell, shape.given) for cell in shape.cells()],
        class_="map",
        width=shape.width,
        height=shape.height,
        role="img",
        aria_label=f"{label}. The table below has the same numbers.",
    )


def _cell(cell: Cell, given: Sequence[Metric]) -> Markup:
    classes = " ".join(f"{metric.letter}{step}" for metric, step in zip(given, cell.steps, strict=True))
    title = tag("title", describe(cell.site, given))
    size = {"x": cell.x, "y": cell.y, "width": cell.width, "height": cell.height}
    rect = tag("rect", title, class_=classes, data_site=cell.index, **size)
    return Markup(rect + Markup("").join(_numbers(cell, given))) if cell.roomy else rect


def _numbers(cell: Cell, given: Sequence[Metric]) -> Iterator[Markup]:
    x, y = cell.x + cell.width / 2, cell.y + cell.height / 2 + 4
    for metric, step in zip(given, cell.steps, strict=True):
        ink = "plain" if step in (ZERO, MISSING) else "ink" if int(step) >= BRIGHT else "paper"
        yield tag("text", number(metric.value(cell.site)), class_=f"in {ink} t{metric.letter}", x=x, y=y)


def legend(metric: Metric, scale: Scale) -> Markup:
    """Returns the palette with numbers, and what the cells outside of it mean."""
    width, step = 384, 12
    bars = [
        tag("rect", x=24 + i * step, y=4, width=step + 0.5, height=12, fill=colour) for i, colour in enumerate(PALETTE)
    ]
    ticks = [tag("text", number(value), class_="mid", x=24 + share * width, y=31) for share, value in scale.ticks()]
    kind = "logarithmic" if scale.logarithmic else "linear"
    extra = [
        tag("rect", class_="zero", x=440, y=4, width=22, height=12),
        tag("text", "zero", x=468, y=14),
        tag("rect", class_="missing", x=510, y=4, width=22, height=12),
        tag("text", "no number", x=538, y=14),
        tag("text", f"{metric.label}, {kind}", x=440, y=31),
    ]
    name = f"Legend: {metric.label} from {number(scale.low)}, dark, to {number(scale.high)}, light; {kind}"
    return tag(
        "svg", bars, ticks, extra, class_=f"legend l{metric.letter}", width=640, height=36, role="img", aria_label=name
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
