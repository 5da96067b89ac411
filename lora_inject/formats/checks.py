"""Values of other programs' configs, checked one by one: what a stranger wrote is believed no further than its type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import FormatError

RANK_LIMIT = 1 << 16
"""Largest rank that is believed; no model is that wide."""


def section(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Returns the object under a key.

    Raises:
        FormatError: missing, or no object.
    """
    value = config.get(key)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: {key}: must be an object, is {_brief(value)}")
    return value


def whole(config: Mapping[str, Any], key: str, where: str, most: int = RANK_LIMIT) -> int:
    """Returns the whole number from 1 to `most` under a key.

    Raises:
        FormatError: missing, or no such number.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise FormatError(f"{where}: {key}: must be a whole number from 1 to {most}, is {_brief(value)}")
    return value


def number(
    config: Mapping[str, Any],
    key: str,
    where: str,
    default: float | None = None,
    *,
    least: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Returns the finite number under a key.

    Args:
        config: the config.
        key: the key.
        where: the file, for messages.
        default: what a missing key stands for; None means that it must be there.
        least: the least number that is accepted.
        below: the first one that is too large.

    Raises:
        FormatError: missing, no number, or out of range.
    """
    value = config.get(key, default)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    if not good or not least <= value < below:
        limits = "" if least == -math.inf and below == math.inf else f" from {least:g} to below {below:g}"
        raise FormatError(f"{where}: {key}: must be a finite number{limits}, is {_brief(value)}")
    return float(value)


def _brief(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]
