"""Kills exports at random moments and looks at what they leave: python tests/kill_export.py FOLDER ROUNDS.

Every round forks a child that exports two adapters in turn to one path, for ever, and is killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import lora_inject as li
from fuzz_formats import make_model
from lora_inject.formats import FORMATS


def filled(value: float) -> nn.Module:
    """Returns the model with an adapter whose update is `value` squared times that of ones."""
    model = make_model()
    li.inject(model, ["*.q_proj", "*.down_proj"], rank=2, alpha=4, seed=0)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.fill_(value)
    return model


def updates(model: nn.Module) -> tuple[float, ...]:
    """Returns the distinct numbers in all updates of a model."""
    deltas = [ref.adapter.delta(ref.module)["weight"] for ref in li.adapters(model)]
    return tuple(sorted({float(value) for delta in deltas for value in delta.detach().unique()}))


def killed_export(models: list[nn.Module], path: Path, format: str, seconds: float) -> None:
    """Runs exports in a child and kills it."""
    child = os.fork()
    if not child:
        while True:
            for model in models:
                li.export(model, path, format=format)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    rng, models = random.Random(0), [filled(1.0), filled(2.0)]
    allowed = {updates(model) for model in models}
    for known in FORMATS:
        path = folder / known.name
        li.export(models[0], path, format=known.name)
        seen = []
        for _ in range(rounds):
            killed_export(models, path, known.name, rng.uniform(0.001, 0.08))
            fresh = make_model()
            li.load(fresh, path)
            seen.append(updates(fresh) in allowed)
        print(json.dumps([known.name, sum(seen), len(list(folder.glob(f"{known.name}*")))]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
