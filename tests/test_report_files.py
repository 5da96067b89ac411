"""`lora-inject inspect --html --png`: what is written, what is refused, and the picture."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from adapter_files import decaying, write_adapter
from matplotlib.colors import to_hex
from matplotlib.image import imread
from safetensors.torch import save_file

import lora_inject as li
from lora_inject import safewrite
from lora_inject.cli import main
from lora_inject.inspection import inspect_adapter
from lora_inject.report.charts import LINES
from lora_inject.report.layout import BANDS, COLUMNS, LANES
from lora_inject.report.picture import CARDS, png_picture
from lora_inject.report.spectra import Spectrum

ROOT = Path(li.__file__).resolve().parents[1]

PATHS = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("q_proj", "v_proj")]


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter.safetensors", decaying(PATHS))


@pytest.fixture
def run(capfd):
    def call(*argv):
        code = main(["inspect", *map(str, argv)])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def test_one_call_writes_both_and_prints_the_numbers(run, adapter, tmp_path):
    code, out, err = run(adapter, "--html", tmp_path / "r.html", "--png", tmp_path / "r.png", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["sites"]
    for site, (a, b) in zip(found, decaying(PATHS).values(), strict=True):
        sigma = np.linalg.svd(b.double().numpy() @ a.double().numpy(), compute_uv=False)[:8]
        assert site["spectrum"]["values"] == pytest.approx(sigma, rel=1e-9)
        share = sigma / sigma.sum()
        assert site["spectrum"]["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert imread(tmp_path / "r.png").shape[1] == 1860
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "r.html", "r.png"]


def test_a_base_adds_relative_sizes(run, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    li.inject(model, "0", rank=2)
    torch.nn.init.normal_(model[0].adapters["default"].lora_B)
    li.export(model, tmp_path / "a.safetensors")
    delta = model[0].adapters["default"].delta(model[0])["weight"].detach()
    li.uninject(model)
    save_file(model.state_dict(), str(tmp_path / "base.safetensors"))
    ratio = float(delta.double().norm() / model[0].weight.detach().double().norm())
    code, out, _ = run(tmp_path / "a.safetensors", "--base", tmp_path / "base.safetensors", "--spectra", "--json")
    assert code == 0
    assert json.loads(out)["sites"][0]["relative"] == pytest.approx(ratio, rel=1e-6)
    code, out, _ = run(tmp_path / "a.safetensors", "--base", tmp_path / "base.safetensors", "--spectra")
    assert code == 0 and "|dW|/|W|" in out and "effective rank" in out and f"{ratio:.4g}" in out
    html = tmp_path / "r.html"
    assert run(tmp_path / "a.safetensors", "--base", tmp_path / "base.safetensors", "--html", html)[0] == 0
    assert f"‖ΔW‖ / ‖W‖: {ratio:.3g}" in html.read_text(encoding="utf-8")


def test_what_cannot_be_written_is_refused_before_the_work(run, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_inject.inspection.inspect_adapter", lambda *_, **__: pytest.fail("worked for nothing"))
    (tmp_path / "old.html").write_text("old")
    (tmp_path / "base").mkdir()
    for argv, words in [
        (["--html", tmp_path / "old.html"], "exists"),
        (["--html", adapter, "--overwrite"], "is what is read"),
        (["--html", tmp_path / "none" / "r.html"], "there is no folder"),
        (["--png", tmp_path, "--overwrite"], "is a folder"),
        (["--html", tmp_path / "r", "--png", tmp_path / "r"], "is another report"),
        (["--html", tmp_path / "base" / "r.html", "--base", tmp_path / "base"], "lies in the base's folder"),
    ]:
        code, out, err = run(adapter, *argv)
        assert (code, out) == (2, "") and words in err, argv
    assert (tmp_path / "old.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "base", "old.html"]


def test_overwriting_needs_to_be_asked_for(run, adapter, tmp_path):
    (tmp_path / "old.html").write_text("old")
    assert run(adapter, "--html", tmp_path / "old.html", "--overwrite")[0] == 0
    assert "<!DOCTYPE html>" in (tmp_path / "old.html").read_text(encoding="utf-8")


def test_a_full_disk_leaves_the_old_file(run, adapter, tmp_path, monkeypatch):
    (tmp_path / "old.html").write_text("old")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safewrite, "sync", full)
    code, out, err = run(adapter, "--html", tmp_path / "old.html", "--overwrite")
    assert (code, out) == (2, "") and "No space left" in err
    assert (tmp_path / "old.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "old.html"]


def test_without_matplotlib_the_extra_is_named(run, adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(adapter, "--png", tmp_path / "r.png")
    assert (code, out) == (2, "") and "lora_inject[report]" in err
    assert run(adapter, "--html", tmp_path / "r.html")[0] == 0


def test_the_commands_of_the_page_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, names, commands = (ROOT / "docs" / "inspecting.md").read_text(encoding="utf-8"), {}, 0
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(text, names)
        for command in text.splitlines() if language == "sh" else ():
            assert command.startswith("lora-inject inspect ")
            code, out, err = run(*shlex.split(command)[2:])
            assert (code, err) == (0, "") and out, command
            commands += 1
    assert commands == 4
    keys = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))
    assert keys == {field.name for field in fields(Spectrum)}
    for limit in (BANDS, f"{LANES:,}", COLUMNS, LINES, CARDS):
        assert re.search(rf"\b{limit}\b", page)


# the picture


def colours(picture, into):
    into.write_bytes(picture)
    pixels = (imread(into)[..., :3] * 255).round().astype(int)
    found, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return {"#" + "".join(f"{part:02x}" for part in colour): n for colour, n in zip(found, counts, strict=True)}


def test_the_picture_has_a_cell_of_the_right_colour_per_site(tmp_path):
    factors = decaying(PATHS)
    path = write_adapter(tmp_path / "a.safetensors", factors)
    norms = [float(np.linalg.norm(b.double().numpy() @ a.double().numpy())) for a, b in factors.values()]
    viridis = matplotlib.colormaps["viridis"]
    steps = [min(31, int(norm / max(norms) * 32)) for norm in norms]
    found = colours(png_picture(inspect_adapter(path, spectra=True)), tmp_path / "r.png")
    legend = 12 * 12 * 1.5**2
    for step in range(32):
        count = found.get(to_hex(viridis(step / 31)), 0)
        # A cell has 74 by 22 points, some of them under its number.
        assert (count > 2000 * steps.count(step)) if step in steps else (count < 2 * legend), step


@pytest.mark.parametrize(
    "paths",
    [
        ["proj"],
        ["layers.0.$x_1^2$", "layers.1.\\frac{", "layers.0.名前\u202e\x00", "layers.1." + "y" * 900],
        [f"layers.{i}.e.{e}.q" for i in range(10) for e in range(30)],
        [f"m{i}" for i in range(300)],
    ],
    ids=["one", "hostile", "experts", "flat"],
)
@pytest.mark.parametrize("zero", [False, True])
def test_every_adapter_has_a_picture(tmp_path, paths, zero):
    factors = {path: (a, b * (not zero)) for path, (a, b) in decaying(paths, rank=3, size=6).items()}
    factors[paths[0]][0][0, 0] = float("nan")
    path = write_adapter(tmp_path / "a.safetensors", factors)
    picture = png_picture(inspect_adapter(path, spectra=True))
    assert len(colours(picture, tmp_path / "r.png")) > 50
    assert len(picture) < 2**20
