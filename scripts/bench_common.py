"""What the benchmarks share: interleaved rounds, medians, tables, and a line about the machine."""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import torch

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def parser(doc: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="tiny and one round: to see that it runs")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch on the CPU")
    return made


def machine(device: str = "cpu") -> str:
    """Returns what the numbers were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft"))
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{load}; {packages}."


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    synchronize(device)
    began = clock()
    run()
    synchronize(device)
    return clock() - began


def rounds(
    runs: Mapping[str, Callable[[], object]], count: int, device: str = "cpu", warm: int = 1
) -> dict[str, list[float]]:
    """Returns the seconds of each run in each round.

    The runs take turns, so that a busy moment hits all alike, in a random order, so that none always follows the same
    one, whose caches and memory it finds.
    """
    for _ in range(warm):
        for run in runs.values():
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(count):
        for name in order.sample(list(runs), len(runs)):
            found[name].append(timed(runs[name], device))
    return found


def overhead(times: Mapping[str, Sequence[float]], name: str, floor: str = "floor") -> float:
    """Returns the median over rounds of time / floor - 1."""
    return statistics.median(mine / base - 1 for mine, base in zip(times[name], times[floor], strict=True))


def ratio(mine: float, other: float) -> str:
    """Returns mine / other, or a dash where the other is within the noise of nothing."""
    return f"{mine / other:.2f}" if other > 0.005 else "-"


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
