"""What a report can colour a site by, and what it says of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..inspected import Inspection, SiteSummary
from .scale import Scale
from .text import clean, number


@dataclass(frozen=True, slots=True)
class Metric:
    """A number per site.

    Attributes:
        letter: its name in class names of the page.
        label: what people read.
        value: gives it for a site, or None.
    """

    letter: str
    label: str
    value: Callable[[SiteSummary], float | None]

    def scale(self, inspection: Inspection) -> Scale:
        """Returns the scale that all its values fit on."""
        return Scale.of(self.value(site) for site in inspection)


RELATIVE = Metric("r", "‖ΔW‖ / ‖W‖", lambda site: site.relative)
NORM = Metric("d", "‖ΔW‖", lambda site: site.norm_delta)
EFFECTIVE = Metric("e", "effective rank", lambda site: site.effective_rank)


def metrics(inspection: Inspection) -> list[Metric]:
    """Returns the metrics that the inspection has numbers for, the most telling one first."""
    relative = inspection.base is not None
    return [RELATIVE] * relative + [NORM] + [EFFECTIVE] * inspection.with_spectra


def describe(site: SiteSummary, given: Iterable[Metric]) -> str:
    """Returns what a site is and its numbers, a line each."""
    lines = [clean(site.path) or "(root)", *(f"{metric.label}: {number(metric.value(site))}" for metric in given)]
    note = state(site)
    return "\n".join([*lines, note] if note else lines)


def state(site: SiteSummary) -> str:
    """Returns what is special about a site's update: a problem, zero, or nothing."""
    if site.problem:
        return clean(site.problem)
    if site.norm_delta is None or not math.isfinite(site.norm_delta):
        return "update beyond float64"
    return "" if site.norm_delta else "update is zero"


def total_relative(inspection: Inspection) -> float | None:
    """Returns |dW| / |W| over all sites whose |W| and |dW| are known, seen as one vector; None without any."""
    known = [site for site in inspection if site.relative is not None]
    base = math.hypot(*(site.norm_base or 0.0 for site in known))
    return math.hypot(*(site.norm_delta or 0.0 for site in known)) / base if base else None
