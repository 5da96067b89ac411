"""Text for a report: names from a stranger's file made visible and short, numbers made readable."""

from __future__ import annotations

import math
import unicodedata

LONG = 160
"""Longest name in characters that is shown whole."""


def clean(text: str, limit: int = LONG) -> str:
    """Returns a name that shows as one line of what it is: no control, formatting or unpaired characters.

    Those are written as their code points, so that nothing is hidden and no text runs backwards. What is longer than
    `limit` is cut in the middle.
    """
    if len(text) > limit:
        head = (limit - 1) * 2 // 5
        text = f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return f"\\u{{{ord(character):x}}}" if hidden else character


def plain(text: str, limit: int = LONG) -> str:
    """Returns a name as `clean` does, in letters that every font has."""
    shown = clean(text, limit)
    return "".join(c if c.isascii() or c == "…" else f"\\u{{{ord(c):x}}}" for c in shown)


def number(value: float | None) -> str:
    """Returns a number with three digits, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
