"""The benchmarks run, compare like with like, and print their tables; nothing here is timed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the benchmarks compare with PEFT: install the extra `bench`")
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "bench_training": ["| float32 | 16 | 0.1 |", "| bfloat16 | 16 | 0.0 |"],
    "bench_scale": ["| load into a fresh model |", "On meta", "times grow by: inject"],
    "bench_training --compile": ["| float32 | 16 | 0.1 |", "| bfloat16 | 16 | 0.0 |"],
    "bench_call": ["| float32 | 256 |", "`import lora_inject` after `import torch`"],
}


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_benchmark_runs_and_prints_its_table(command):
    name, *options = command.split()
    done = subprocess.run(
        [sys.executable, f"scripts/{name}.py", *options, "--quick", "--threads", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(part in done.stdout for part in SCRIPTS[command]), done.stdout
