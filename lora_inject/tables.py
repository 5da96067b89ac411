"""Plain-text tables for values that people print."""

from __future__ import annotations

from collections.abc import Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], limit: int | None = None) -> str:
    """Returns an aligned table, numbers to the right; rows beyond `limit` are counted in a last line."""
    cells = [[_text(cell) for cell in row] for row in rows[:limit]]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    right = [all(isinstance(row[i], (int, float)) for row in rows) and bool(rows) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        done = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(done).rstrip()

    lines = [line(list(headers)), "  ".join("-" * width for width in widths), *map(line, cells)]
    if limit is not None and len(rows) > limit:
        lines.append(f"... and {len(rows) - limit} more")
    return "\n".join(lines)


def _text(cell: object) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.3g}"
    return str(cell)


def dims(shape: Sequence[int]) -> str:
    """Returns a shape as people write it: 768 x 3072."""
    return " x ".join(map(str, shape)) or "-"


def percent(share: float) -> str:
    """Returns a share as a percentage."""
    return f"{100 * share:.3g} %"
