"""The report page in a real browser, and its text without one."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from adapter_files import decaying, write_adapter
from browser import ask, browse, needs_browser, screenshot
from matplotlib.colors import to_hex
from matplotlib.image import imread

from lora_inject.inspection import inspect_adapter
from lora_inject.report.files import write_html
from lora_inject.report.layout import BANDS, COLUMNS, LANES, arrange
from lora_inject.report.scale import BRIGHT, PALETTE, Scale, decades
from lora_inject.report.text import LONG, clean, number, plain

KINDS = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"]
PATHS = [f"model.layers.{i}.{kind}" for i in range(4) for kind in KINDS]
HOSTILE = [
    "layers.0.</script><img src=x onerror=alert(1)>",
    "layers.1.</style><script>document.title='taken'</script>",
    "layers.0.a\u202eb\x00c\u2028",
    "layers.1.\"'><svg onload=alert(1)>&lt;",
]
CELLS = """
return [...document.querySelectorAll("svg.map rect")].map(cell => {
  const box = cell.getBoundingClientRect();
  const text = cell.querySelector("title").textContent;
  return {site: +cell.dataset.site, fill: getComputedStyle(cell).fill, text,
          box: [box.left, box.top, box.right, box.bottom]};
});
"""


def page_of(factors, folder, **options):
    inspection = inspect_adapter(write_adapter(folder / "adapter.safetensors", factors, **options), spectra=True)
    return write_html(inspection, folder / "report.html")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Twelve sites, one of them zero, one with NaN; with the norms that numpy gives."""
    folder, factors = tmp_path_factory.mktemp("page"), decaying(PATHS)
    factors[PATHS[4]][1].zero_()
    factors[PATHS[7]][0][0, 0] = float("nan")
    norms = [float(np.linalg.norm(b.double().numpy() @ a.double().numpy())) for a, b in factors.values()]
    return page_of(factors, folder), norms


def viridis(share):
    """The colour at a share of the range, by matplotlib, in the 32 steps that the page has."""
    return to_hex(matplotlib.colormaps["viridis"](min(31, int(share * 32)) / 31))


def as_hex(colour):
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)[:3])


@needs_browser
def test_the_browser_has_nothing_to_complain_about(report, tmp_path):
    assert screenshot(report[0], tmp_path / "page.png") == []
    # The same look at a page that its own policy is at odds with: complaints would be seen.
    text = report[0].read_text(encoding="utf-8")
    bad = tmp_path / "bad.html"
    bad.write_text(text.replace("</main>", "<img src='http://127.0.0.1:9/x.png'><script>x()</script></main>"))
    console = screenshot(bad, tmp_path / "bad.png")
    assert any("127.0.0.1:9" in line for line in console) and any("inline script" in line for line in console)


@needs_browser
def test_a_cell_per_site_has_its_number_and_colour(report, tmp_path):
    page, norms = report
    cells = ask(page, CELLS, tmp_path / "asked.html")
    assert [cell["site"] for cell in cells] == list(range(len(PATHS)))
    top = max(norm for norm in norms if np.isfinite(norm))
    for cell, path, norm in zip(cells, PATHS, norms, strict=True):
        lines = cell["text"].splitlines()
        assert lines[0] == path
        if np.isnan(norm):
            assert cell["fill"].startswith('url("#hatch")')
            assert "NaN or infinity in lora_A" in lines
        elif norm == 0:
            assert cell["fill"] == "none" and "update is zero" in lines
        else:
            assert lines[1] == f"‖ΔW‖: {norm:.3g}"
            assert as_hex(cell["fill"]) == viridis(norm / top)
    assert len({cell["fill"] for cell in cells}) > 6
    rows = {kind: {cell["box"][1] for cell, path in zip(cells, PATHS, strict=True) if kind in path} for kind in KINDS}
    assert all(len(tops) == 1 for tops in rows.values()) and len(set.union(*rows.values())) == len(KINDS)
    for i in range(4):
        assert len({cells[j]["box"][0] for j in range(3 * i, 3 * i + 3)}) == 1


@needs_browser
def test_the_screenshot_has_the_colours_where_the_cells_are(report, tmp_path):
    page, norms = report
    cells = ask(page, CELLS, tmp_path / "asked.html")
    screenshot(page, tmp_path / "page.png")
    pixels = (imread(tmp_path / "page.png")[..., :3] * 255).round().astype(int)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    top = max(norm for norm in norms if np.isfinite(norm))
    seen = 0
    for cell, norm in zip(cells, norms, strict=True):
        if norm > 0:
            x, y = round(cell["box"][0]) + 5, round(cell["box"][1]) + 5
            assert "#" + "".join(f"{part:02x}" for part in pixels[y, x]) == viridis(norm / top)
            seen += 1
    assert seen == len(PATHS) - 2


@needs_browser
def test_the_switch_the_order_and_the_search_work(report, tmp_path):
    page, _ = report
    told = ask(
        page,
        """
        const fills = () => [...document.querySelectorAll("svg.map rect")].map(cell => getComputedStyle(cell).fill);
        const shown = (kind) => getComputedStyle(document.querySelector(kind)).display;
        const rows = () => [...document.querySelectorAll("#sites tbody tr")].filter(row => !row.hidden)
          .map(row => [row.cells[0].textContent, row.cells[7].textContent]);
        const before = [fills(), shown(".ld"), shown(".le")];
        document.querySelector("label[for=by-e]").click();
        const after = [fills(), shown(".ld"), shown(".le")];
        document.querySelectorAll("#sites th button")[7].click();
        const falling = rows().map(([, norm]) => norm);
        document.querySelectorAll("#sites th button")[0].click();
        document.querySelectorAll("#sites th button")[0].click();
        const paths = rows().map(([path]) => path);
        const find = document.querySelector("#find");
        find.value = "layers.2.";
        find.dispatchEvent(new Event("input"));
        return {before, after, falling, paths, found: rows().map(([path]) => path)};
        """,
        tmp_path / "asked.html",
    )
    assert told["before"][1:] == ["block", "none"] and told["after"][1:] == ["none", "block"]
    assert told["before"][0] != told["after"][0]
    norms = [float(text) for text in told["falling"] if text != "–"]
    assert norms == sorted(norms, reverse=True) and told["falling"][-1] == "–" and len(norms) == len(PATHS) - 1
    assert told["paths"] == sorted(PATHS)
    assert sorted(told["found"]) == [path for path in sorted(PATHS) if "layers.2." in path]


@needs_browser
def test_the_page_says_it_all_without_its_script(report, tmp_path):
    page, _ = report
    with_script = ask(page, CELLS, tmp_path / "with.html")
    without = ask(page, CELLS, tmp_path / "without.html", drop=[r'<script>"use strict".*?</script>'])
    assert [cell["fill"] for cell in without] == [cell["fill"] for cell in with_script]
    switched = f'document.querySelector("label[for=by-e]").click(); {CELLS}'
    fills = [cell["fill"] for cell in ask(page, switched, tmp_path / "switched.html", drop=[r"<script>.*?</script>"])]
    assert fills != [cell["fill"] for cell in without]


@needs_browser
def test_dark_and_light(report, tmp_path):
    corners = []
    for name, flags in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        screenshot(report[0], tmp_path / f"{name}.png", *flags)
        corners.append(float(imread(tmp_path / f"{name}.png")[2, 2, :3].mean()))
    assert corners[0] > 0.95 and corners[1] < 0.2


@needs_browser
def test_names_of_strangers_stay_text(tmp_path):
    page = page_of(decaying(HOSTILE), tmp_path)
    _, console = browse(page, "--dump-dom")
    assert console == []
    told = ask(
        page,
        """return {
          title: document.title, images: document.images.length,
          handlers: document.querySelectorAll("[onerror],[onload],[onclick]").length,
          scripts: document.querySelectorAll("script").length, styles: document.querySelectorAll("style").length,
          names: [...document.querySelectorAll("#sites tbody td:first-child")].map(cell => cell.textContent),
        }""",
        tmp_path / "asked.html",
    )
    # One script of the page's own and the one that asks.
    assert (told["images"], told["handlers"], told["scripts"], told["styles"]) == (0, 0, 2, 1)
    assert told["title"] == "default: adapter.safetensors"
    assert told["names"] == [*HOSTILE[:2], r"layers.0.a\u{202e}b\u{0}c\u{2028}", HOSTILE[3]]


@needs_browser
def test_thousands_of_sites_open_and_none_covers_another(tmp_path):
    paths = [f"model.layers.{i}.mlp.experts.{e}.{k}" for i in range(20) for e in range(64) for k in ("up", "down")]
    page = page_of(decaying([*paths, "lm_head"], rank=2, size=4), tmp_path)
    assert page.stat().st_size < 2 * 2**20
    cells = ask(page, CELLS, tmp_path / "asked.html")
    assert len(cells) == len(paths) + 1
    boxes = np.array([cell["box"] for cell in cells])
    assert ((boxes[:, 2] - boxes[:, 0] > 4) & (boxes[:, 3] - boxes[:, 1] >= 1.4)).all()
    for i in range(0, len(boxes), 37):
        left, top, right, bottom = boxes[i]
        apart = (boxes[:, 0] >= right) | (boxes[:, 2] <= left) | (boxes[:, 1] >= bottom) | (boxes[:, 3] <= top)
        assert apart.sum() == len(boxes) - 1


# without a browser


class Outline(HTMLParser):
    """What a page is made of: names and attributes of its elements, and whether each is closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("paths", [PATHS, HOSTILE, [""], ["proj"]], ids=["plain", "hostile", "root", "one"])
def test_the_page_names_nothing_outside_of_it(tmp_path, paths):
    text = page_of(decaying(paths), tmp_path).read_text(encoding="utf-8")
    seen = Outline(text).seen
    assert {"img", "link", "iframe", "object", "base", "form", "a"}.isdisjoint(tag for tag, _ in seen)
    assert not [attrs for _, attrs in seen if {"src", "href", "style"} & attrs.keys()]
    assert not [key for _, attrs in seen for key in attrs if key.startswith("on")]
    assert len([1 for tag, _ in seen if tag == "script"]) == 1
    (policy,) = [attrs["content"] for _, attrs in seen if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert "http:" not in text and "https:" not in text
    assert sum("data-site" in attrs for _, attrs in seen) == len(paths)


def test_problems_and_strays_are_told(tmp_path):
    factors = decaying(PATHS)
    factors[PATHS[0]][0][0, 0] = float("inf")
    page = page_of(factors, tmp_path).read_text(encoding="utf-8")
    assert "1 problem: load refuses this file" in page
    assert f"<code>{PATHS[0]}</code>: NaN or infinity in lora_A" in page


def test_an_adapter_of_zeros_has_a_page(tmp_path):
    factors = {path: (a, torch.zeros_like(b)) for path, (a, b) in decaying(PATHS).items()}
    page = page_of(factors, tmp_path).read_text(encoding="utf-8")
    assert f"{len(PATHS)} of {len(PATHS)} updates are zero" in page
    assert "No site has an update other than zero" in page


def test_a_page_of_twelve_thousand_sites_has_some_megabytes(tmp_path):
    small = inspect_adapter(write_adapter(tmp_path / "adapter.safetensors", decaying(PATHS)), spectra=True)
    paths = [f"model.layers.{i}.mlp.experts.{e}.{k}" for i in range(60) for e in range(100) for k in ("up", "down")]
    sites = tuple(replace(small.sites[i % len(small)], path=path) for i, path in enumerate(paths))
    page = write_html(replace(small, sites=sites), tmp_path / "report.html")
    assert page.stat().st_size < 8 * 2**20
    assert page.read_text(encoding="utf-8").count("data-site=") == 12_000


def test_names_are_shown_as_what_they_are():
    assert clean("a\ud800b\n\u200b") == r"a\u{d800}b\u{a}\u{200b}"
    assert clean("Größe_名前") == "Größe_名前"
    assert plain("Größe") == r"Gr\u{f6}\u{df}e"
    assert clean("x" * 5000).count("x") == LONG - 1 and len(clean("x" * 5000)) == LONG


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0123456, "0.0123"), (999.4, "999"), (12345.6, "12,346"), (1e-7, "1.00e-7"), (float("nan"), "–")],
)
def test_numbers_are_readable(value, text):
    assert number(value) == text


# rows and columns


def test_kinds_are_rows_and_depths_are_columns():
    grid = arrange(["lm_head", *PATHS, "model.layers.10.self_attn.q_proj"])
    assert [band.label for band in grid.bands] == ["lm_head", *KINDS]
    assert grid.columns == ("0", "1", "2", "3", "10", "–")
    assert [grid.columns[place.column] for place in grid.places[:5]] == ["–", "0", "0", "0", "1"]


def test_towers_of_one_model_are_kept_apart():
    grid = arrange([f"{side}.layers.{i}.q" for side in ("encoder", "decoder") for i in range(2)])
    assert [band.label for band in grid.bands] == ["encoder.layers.*.q", "decoder.layers.*.q"]


def test_experts_share_a_row_of_lanes_in_their_order():
    grid = arrange([f"layers.{i}.experts.{e}.up" for i in range(2) for e in (10, 9, 2)])
    assert [(band.label, band.lanes) for band in grid.bands] == [("experts.*.up", 3)]
    assert [place.lane for place in grid.places] == [2, 1, 0] * 2


@pytest.mark.parametrize(
    "paths",
    [
        [f"a{i}" for i in range(BANDS + 1)],
        [f"layers.{i}.q" for i in range(COLUMNS + 1)],
        [f"layers.0.e.{i}.q" for i in range(LANES + 1)],
        ["a.1.b", "a.01.b", "a.*.b", "", "1", "-", "a.99999999999999999999.b", "a.\u0661.b"],
        ["encoder.linear", "decoder.linear", "linear"],
        ["layers.0.x.1.q", "layers.0.x.*.q", "layers.0.x.01.q"],
    ],
    ids=["kinds", "depths", "lanes", "odd", "flat", "lanes alike"],
)
def test_no_two_sites_share_a_place(paths):
    grid = arrange(paths)
    assert len(set(grid.places)) == len(grid.places) == len(paths)
    assert len(grid.bands) <= BANDS and len(grid.columns) <= COLUMNS
    for row, band in enumerate(grid.bands):
        members = [i for i, place in enumerate(grid.places) if place.band == row]
        assert sorted(band.sites) == members and band.label
        assert {grid.places[i].lane for i in members} == set(range(band.lanes))
    assert max(place.column for place in grid.places) < len(grid.columns)


def test_numbers_in_cells_stand_in_the_ink_that_reads_better():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for step, colour in enumerate(PALETTE):
        black, white = (luminance(colour) + 0.05) / 0.05, 1.05 / (luminance(colour) + 0.05)
        assert (black > white) == (step >= BRIGHT), colour
        assert max(black, white) >= 4.5


def test_a_scale_starts_at_zero_or_is_logarithmic_where_values_differ_much():
    linear = Scale.of([2.0, 8.0, 0.0, None, float("nan")])
    assert (linear.low, linear.high, linear.logarithmic) == (0.0, 8.0, False)
    assert [linear.step(v) for v in (0.0, None, float("inf"), 0.1, 2.0, 8.0)] == ["z", "n", "n", "0", "8", "31"]
    assert linear.ticks(3) == [(0.0, 0.0), (0.5, 4.0), (1.0, 8.0)]
    wide = Scale.of([1e-3, 10.0])
    assert (wide.low, wide.high, wide.logarithmic) == (1e-3, 10.0, True)
    assert [wide.step(v) for v in (1e-3, 0.1, 10.0)] == ["0", "16", "31"]
    assert [value for _, value in wide.ticks(3)] == pytest.approx([1e-3, 0.1, 10.0])
    assert Scale.of([]).step(0.0) == "z"


@pytest.mark.parametrize(
    ("low", "high"), [(1e-9, 3.0), (0.9, 1.1), (2.1, 4.9), (3.1, 3.2), (1e-300, 1e300), (0.05, 20)]
)
def test_a_logarithmic_axis_has_a_few_round_labels(low, high):
    found = decades(low, high)
    assert 1 <= len(found) <= 9 and found == sorted(found)
    assert all(low <= value <= high for value in found)
