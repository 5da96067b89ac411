"""Adapters come from strangers: each hostile file gets a clear error, quickly, in little memory, and does nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import CASES, MiB


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    script = Path(__file__).with_name("hostile.py")
    env = os.environ | {"PYTHONPATH": str(script.parent.parent)}
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, script, folder]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True, env=env)
    return {name: rest for name, *rest in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_quickly_in_little_memory_and_does_nothing(results, name):
    error, seconds, grown, whole = results[name]
    assert error != "loaded" and not error.startswith("!"), error
    assert len(error) < 2000
    # A second on an idle core, counted in the process's own time; tests share the machine with others.
    assert seconds < 4
    assert grown < 200 * MiB
    assert whole, "the model or the folder changed"
