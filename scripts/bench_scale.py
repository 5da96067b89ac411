"""Thousands of small linear layers, as in a mixture of experts: what one call costs per module, beside PEFT.

`python scripts/bench_scale.py` takes 11,580 modules for both, which keeps PEFT busy for five minutes, since its time
per module grows with their number; `--peft-modules 1500` is quicker and favours it. Times are those of the process,
not of the clock.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

import lora_inject as li
from bench_common import machine, markdown, parser, timed

NAMES = ("gate", "up", "down")
TARGETS = [f"*.{name}" for name in NAMES]
Times = dict[str, list[float]]


class Experts(nn.Module):
    def __init__(self, count: int, device: str) -> None:
        super().__init__()
        with torch.device(device):
            self.experts = nn.ModuleList(
                nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in NAMES}) for _ in range(count // 3)
            )


def note(times: Times, name: str, run: Callable[[], Any], count: int) -> Any:
    kept: list[Any] = []
    seconds = timed(lambda: kept.append(run()), clock=time.process_time)
    times.setdefault(name, []).append(seconds / count * 1e6)
    return kept[0]


def switch(context: Callable[[], Any]) -> None:
    with context():
        pass


def write(file: Path, content: bytes) -> None:
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def ours(times: Times, count: int, device: str, folder: Path) -> None:
    model, file = Experts(count, device), folder / "ours.safetensors"
    assert len(note(times, "inject", lambda: li.inject(model, TARGETS), count)) == count
    note(times, "second adapter on top", lambda: li.inject(model, TARGETS, name="b"), count)
    note(times, "disabled, in and out", lambda: switch(lambda: li.disabled(model)), count)
    assert len(note(times, "state", lambda: li.adapter_state(model), count)) == 2 * count
    if device != "meta":
        note(times, "export", lambda: li.export(model, file), count)
        content = file.read_bytes()
        note(times, "the write of its bytes alone", lambda: write(folder / "copy.safetensors", content), count)
        tensors = li.adapter_state(model)
        note(times, "safetensors' own save_file", lambda: save_file(tensors, folder / "plain.safetensors"), count)
    note(times, "uninject both", lambda: li.uninject(model), count)
    assert all(type(module) is not nn.Linear or "adapters" not in module._modules for module in model.modules())
    if device != "meta":
        assert len(note(times, "load into a fresh model", lambda: li.load(model, file), count)) == count


def peft(times: Times, count: int, device: str, folder: Path) -> None:
    def config() -> LoraConfig:
        return LoraConfig(r=8, target_modules=list(NAMES))

    file = folder / "peft"
    model = note(times, "inject", lambda: get_peft_model(Experts(count, device), config()), count)
    if device != "meta":
        note(times, "export", lambda: model.save_pretrained(file), count)
    note(times, "second adapter on top", lambda: model.add_adapter("b", config()), count)
    note(times, "disabled, in and out", lambda: switch(model.disable_adapter), count)
    note(times, "state", lambda: get_peft_model_state_dict(model), count)
    note(times, "uninject both", model.unload, count)
    if device != "meta":
        fresh = Experts(count, device)
        note(times, "load into a fresh model", lambda: PeftModel.from_pretrained(fresh, file), count)


def growth(options: Namespace, sizes: tuple[int, int], folder: Path) -> str:
    """Returns how many times as long the larger model takes, by the quickest rounds, since other work only adds."""
    found: list[Times] = [{}, {}]
    for _ in range(options.rounds):
        for times, count in zip(found, sizes, strict=True):
            ours(times, count, "cpu", folder)
    factor = sizes[1] / sizes[0]
    parts = [f"{name} {factor * min(found[1][name]) / min(found[0][name]):.2f}" for name in found[0]]
    return f"From {sizes[0]:,} to {sizes[1]:,} modules, {factor:.0f} times as many, times grow by: {', '.join(parts)}."


def compare(options: Namespace, device: str, folder: Path) -> str:
    mine: Times = {}
    theirs: Times = {}
    for turn in range(options.rounds):
        ours(mine, options.modules, device, folder)
        if turn < options.peft_rounds:
            peft(theirs, options.peft_modules, device, folder)
    rows = []
    for name in mine:
        own = statistics.median(mine[name])
        beside = ["-", "-"]
        if name in theirs:
            other = statistics.median(theirs[name])
            beside = [f"{other:.0f} µs", f"1/{other / own:.0f}"]
        rows.append([name, f"{own:.0f} µs", *beside])
    title = f"On {device}: {options.modules:,} modules for lora_inject, {options.peft_modules:,} for PEFT; per module."
    return f"{title}\n\n{markdown(['', 'lora_inject', 'PEFT', 'of PEFT'], rows)}"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--modules", type=int, default=11580)
    made.add_argument("--peft-modules", type=int, default=11580)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--peft-rounds", type=int, default=1)
    options = made.parse_args()
    torch.set_num_threads(1)
    sizes = (9_990, 39_960)
    if options.quick:
        options.modules = options.peft_modules = 30
        options.rounds = options.peft_rounds = 1
        sizes = (30, 120)
    with tempfile.TemporaryDirectory() as name:
        parts = [compare(options, device, Path(name)) for device in ("cpu", "meta")]
        options.rounds = min(options.rounds, 3)
        parts.append(growth(options, sizes, Path(name)))
    print("\n\n".join([*parts, machine()]))


if __name__ == "__main__":
    main()
