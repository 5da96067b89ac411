"""From a number to a colour: which steps of the palette a metric's values take, and what its legend says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_CODES = (
    "440154470d6048186a482374472e7c4538824241863e4a893a548c365d8d32658e2e6d8e2b758e287d8e25848e228c8d"
    "1f948c1e9c8920a38625ab822eb37c3aba7648c16e58c7656ccd5a7fd34e93d741a8db34c0df25d5e21aeae51afde725"
)
PALETTE = tuple(f"#{_CODES[i : i + 6]}" for i in range(0, len(_CODES), 6))
"""Dark to light, low to high, in 32 steps: viridis (Smith & van der Walt 2015, CC0), which does not rely on hue."""
BRIGHT = 14
"""The first step on which black text reads better than white."""
SPREAD = 30
"""Largest ratio of values that is still shown on a linear scale."""
ZERO, MISSING = "z", "n"
"""Names of what is no step: an update that is zero, and a number that there is not."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A range of values that the palette covers, linear or logarithmic."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Scale:
        """Returns the scale for these values: from zero, or logarithmic where the positive ones differ much."""
        given = [value for value in values if value is not None and math.isfinite(value) and value > 0]
        low, high = min(given, default=1.0), max(given, default=1.0)
        wide = high / low > SPREAD
        return cls(low if wide else 0.0, high, wide)

    def share(self, value: float) -> float:
        """Returns where a positive value lies between low (0) and high (1)."""
        if self.logarithmic:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def step(self, value: float | None) -> str:
        """Returns the palette's step for a value, from "0", or `ZERO` or `MISSING`."""
        if value is None or not math.isfinite(value):
            return MISSING
        return str(min(len(PALETTE) - 1, int(self.share(value) * len(PALETTE)))) if value > 0 else ZERO

    def ticks(self, count: int = 5) -> list[tuple[float, float]]:
        """Returns (share, value) pairs for a legend, evenly spread over the palette."""
        shares = [i / (count - 1) for i in range(count)]
        if self.logarithmic:
            return [(share, self.low * (self.high / self.low) ** share) for share in shares]
        return [(share, self.low + share * (self.high - self.low)) for share in shares]


def decades(low: float, high: float) -> list[float]:
    """Returns round numbers that a logarithmic axis over [low, high] is labelled with; at least one is in it."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = max(1, len(powers) // 4)
    found = [10.0**power for power in powers if power % step == 0 and low <= 10.0**power <= high]
    if len(found) >= 2:
        return found
    finer = [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    return finer or [math.sqrt(low * high)]
