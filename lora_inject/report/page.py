"""An inspection as one HTML page that needs nothing else: no other file, no network, and no script to be read."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..inspected import Inspection
from ..version import VERSION
from .charts import LINES, SHADES, known, rank_chart, sigma_range, spectra_chart
from .geometry import MapShape
from .heat_map import heat_map, legend, rules
from .layout import NO_DEPTH, Band, Grid, arrange
from .markup import Markup, join, tag
from .metrics import Metric, metrics, state, total_relative
from .site_table import site_table
from .text import clean, number

LISTED = 40
"""Most problems that are listed above the charts; the table has all."""
WORDS = (
    ("‖ΔW‖", "Frobenius norm of the update: scaling · B A, biases left out."),
    ("‖W‖", "Frobenius norm of the weight that is adapted, read from the base."),
    (
        "σ",
        "Singular values of the update, from the factors in float64. Of a stack of matrices (packed experts) the "
        "root mean square over the matrices. Of a convolution: of the matrix B A that its factors multiply to.",
    ),
    (
        "effective rank",
        "exp of the entropy of σ / Σσ (Roy and Vetterli 2007): how many directions the update uses, "
        "counted by their weight. Of a stack the mean; the lines beside the dots reach from smallest to largest.",
    ),
    ("stable rank", "‖ΔW‖² / σ₁². Of a stack the mean."),
    ("90 %, 99 %", "How many singular values hold that share of ‖ΔW‖²: the rank to which the update could be cut."),
)


def html_page(inspection: Inspection) -> str:
    """Returns the page. Whatever the adapter's file says stays text in it, and nothing that it could say is run."""
    grid, given = arrange([site.path for site in inspection]), metrics(inspection)
    style = "\n".join([_file("page.css"), rules(given), _shades()])
    script = _file("page.js")
    allowed = f"style-src {_hash(style)}; script-src {_hash(script)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    title = f"{clean(inspection.name)}: {clean(Path(inspection.file).name)}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    sections = (
        _header(inspection),
        _problems(inspection),
        _map(inspection, grid, given),
        _kinds(inspection, grid),
        site_table(inspection),
        _words(),
    )
    body = tag("body", tag("main", sections), tag("script", Markup(script)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


@cache
def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Returns the source of a Content-Security-Policy that allows this text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _shades() -> str:
    mix = "color-mix(in oklab,var(--last) {}%,var(--first))"
    return "\n".join(f".s{i}{{stroke:{mix.format(round(100 * i / (SHADES - 1)))}}}" for i in range(SHADES))


def _header(inspection: Inspection) -> Markup:
    ranks = sorted({site.rank for site in inspection})
    tiles = {
        "sites": f"{len(inspection):,}",
        "parameters": f"{inspection.parameters:,}",
        "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} – {ranks[-1]}",
        "‖ΔW‖ of all sites": number(inspection.norm_delta),
    }
    if inspection.base is not None:
        tiles["‖ΔW‖ / ‖W‖ of all sites"] = number(total_relative(inspection))
    base = clean(inspection.base) if inspection.base else "not given, so ‖W‖ is unknown"
    return join(
        [
            tag("h1", f"Adapter “{clean(inspection.name)}”"),
            tag(
                "p",
                "File: ",
                tag("code", clean(inspection.file)),
                f", {inspection.size:,} bytes, written by {clean(inspection.program)}",
                class_="soft",
            ),
            tag("p", "Base: ", tag("code", base) if inspection.base else base, class_="soft"),
            tag("dl", [tag("div", tag("dt", key), tag("dd", value)) for key, value in tiles.items()], class_="tiles"),
        ]
    )


def _problems(inspection: Inspection) -> Markup:
    lines = [(clean(s.path) or "(root)", state(s)) for s in inspection if s.problem]
    lines += [(clean(name), "belongs to no site") for name in inspection.strays]
    if not lines:
        return Markup("")
    shown = [tag("li", tag("code", path), f": {what}") for path, what in lines[:LISTED]]
    more = [tag("li", f"and {len(lines) - LISTED:,} more")] * (len(lines) > LISTED)
    heading = tag("strong", f"{len(lines):,} problem{'s' * (len(lines) != 1)}: load refuses this file")
    return tag("section", heading, tag("ul", shown, more), class_="problems", aria_label="Problems")


def _map(inspection: Inspection, grid: Grid, given: list[Metric]) -> Markup:
    picks = [
        join(
            [
                tag("input", type="radio", name_="metric", class_="pick", id=f"by-{m.letter}", checked=m is given[0]),
                tag("label", m.label, for_=f"by-{m.letter}"),
            ]
        )
        for m in given
    ]
    hatch = tag(
        "pattern",
        tag("path", class_="hatch", d="M0 6L6 0"),
        id="hatch",
        width=6,
        height=6,
        patternUnits="userSpaceOnUse",
    )
    zeros = sum(site.norm_delta == 0 for site in inspection)
    note = f"A row per kind of module; columns: {grid.axis}."
    if NO_DEPTH in grid.columns:
        note += f" {NO_DEPTH}: no number in the path."
    if zeros:
        note += f" {zeros:,} of {len(inspection):,} updates are zero."
    return tag(
        "section",
        tag("h2", "Size of the update by kind and depth"),
        tag("p", note, class_="soft"),
        tag("svg", tag("defs", hatch), class_="hidden", aria_hidden="true"),
        picks,
        tag("div", [legend(m, m.scale(inspection)) for m in given], class_="legends scroll"),
        tag("div", heat_map(MapShape(inspection, grid, given)), class_="scroll"),
        id="map",
    )


def _kinds(inspection: Inspection, grid: Grid) -> Markup:
    heading = tag("h2", "Spectra and effective rank by kind")
    reach = sigma_range(inspection)
    if reach is None:
        why = tag("p", "No site has an update other than zero whose spectrum is known.", class_="soft")
        return tag("section", heading, why, id="kinds")
    bar = tag("span", class_="depths", role="img", aria_label="orange to purple")
    said = f"last. Of kinds with more than {LINES} sites: median, middle 80 % and range."
    key = tag("p", "Colour: first column ", bar, said, class_="soft")
    cards = [_card(inspection, grid, band, reach) for band in grid.bands]
    return tag("section", heading, key, tag("div", cards, class_="cards"), id="kinds")


def _card(inspection: Inspection, grid: Grid, band: Band, reach: tuple[float, float]) -> Markup:
    sites = [inspection.sites[i] for i in band.sites]
    facts = [f"{len(sites):,} site{'s' * (len(sites) != 1)}"]
    zeros, lost = sum(site.norm_delta == 0 for site in sites), sum(site.spectrum is None for site in sites)
    facts += [f"{zeros:,} zero"] * bool(zeros) + [f"{lost:,} without numbers"] * bool(lost)
    title = tag("h3", clean(band.label), " ", tag("small", ", ".join(facts)))

    def charts() -> Iterator[Markup]:
        if known(inspection, band):
            yield spectra_chart(inspection, grid, band, reach)
        if lost < len(sites):
            yield rank_chart(inspection, grid, band)

    return tag("article", title, tag("div", charts(), class_="pair"), class_="card")


def _words() -> Markup:
    entries = [[tag("dt", word), tag("dd", meaning)] for word, meaning in WORDS]
    made = tag("p", f"Made by lora_inject {VERSION}.", class_="soft")
    return tag("section", tag("h2", "What the numbers mean"), tag("dl", entries, class_="words"), made)
