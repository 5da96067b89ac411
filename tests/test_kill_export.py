"""An export that is killed at any moment leaves the old adapter or the new one, whole, in every format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_inject.formats import FORMATS

ROOT = Path(__file__).parent.parent
ROUNDS = 30


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "scripts")))}
    command = [sys.executable, ROOT / "tests" / "kill_export.py", tmp_path_factory.mktemp("killed"), str(ROUNDS)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert not run.returncode, run.stderr
    return {name: rest for name, *rest in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("name", [known.name for known in FORMATS])
def test_sigkill_leaves_the_old_adapter_or_the_new_one(results, name):
    whole, paths = results[name]
    assert whole == ROUNDS and paths == 1
