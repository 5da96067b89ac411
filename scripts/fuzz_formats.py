"""Mutates valid adapter files of every format and loads them: `python scripts/fuzz_formats.py --seconds 60`.

Every mutated file must load, or be refused by one of lora_inject's own errors with the model untouched, in time. What
breaks that rule is printed with the seed that makes it again, and kept in the folder given by --keep.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_inject as li
from lora_inject.formats import FORMATS

LIMIT = 5.0
"""Seconds that one load may take; they are rare events of a busy machine, a hang takes for ever."""
NASTY: list[object] = [
    None,
    True,
    -1,
    0,
    0.5,
    1e308,
    2**31,
    2**63,
    2**64 - 1,
    10**40,
    "",
    "../x",
    "x\0y",
    "\ud7ff",
    "NaN",
]
NASTY += [[], {}, [[[[]]]], {"r": {"r": {}}}, ["a", 1], "a" * 5000, -(2**63), "LORA", [2**62, 2**62], "__class__"]


def make_model() -> nn.Module:
    """Returns a small causal language model, the same at every call."""
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def make_samples(folder: Path) -> dict[str, Path]:
    """Returns a valid adapter of every format, written by its own writer."""
    model = make_model()
    li.inject(model, ["*.q_proj", "*.down_proj"], rank=2, alpha=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    samples = {known.name: folder / known.name / "sample" for known in FORMATS}
    for name, path in samples.items():
        path.parent.mkdir(parents=True)
        samples[name] = li.export(model, path, format=name)
    return samples


def flip(rng: random.Random, data: bytearray) -> None:
    """Changes a few bytes, most of them near the front, where headers are."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        end = len(data) if rng.random() < 0.3 else min(len(data), rng.choice((8, 16, 400)))
        data[rng.randrange(max(1, end))] = rng.choice((0, 255, rng.randrange(256), 0x22, 0x7B))


def cut(rng: random.Random, data: bytearray) -> None:
    """Takes the end away, or something out of the middle."""
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 7, len(data)))]


def grow(rng: random.Random, data: bytearray) -> None:
    """Repeats a part, or adds noise."""
    start = rng.randrange(len(data))
    data[start:start] = rng.choice((data[start : start + 40], bytes(rng.randrange(256) for _ in range(9))))


def number(rng: random.Random, data: bytearray) -> None:
    """Writes an extreme number of eight bytes somewhere in front."""
    start = rng.choice((0, 0, 8, rng.randrange(len(data))))
    data[start : start + 8] = rng.choice((2**60, 2**63, 0, 2**64 - 1, 2**32, len(data))).to_bytes(8, "little")


def edit_json(rng: random.Random, data: bytearray) -> None:
    """Changes the JSON of a safetensors header, of its metadata, or of a config, and writes it back well-formed."""
    framed = data[:1] != b"{"
    length = int.from_bytes(data[:8], "little") if framed else len(data)
    start = 8 if framed else 0
    value = json.loads(bytes(data[start : start + length]))
    metadata = value.get("__metadata__") if framed else None
    inner = [key for key, text in (metadata or {}).items() if text[:1] in "{["]
    if inner and rng.random() < 0.6:
        key = rng.choice(inner)
        metadata[key] = json.dumps(edited(rng, json.loads(metadata[key])))
    else:
        value = edited(rng, value)
    raw = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    data[: start + length] = (len(raw).to_bytes(8, "little") if framed else b"") + raw


def edited(rng: random.Random, value: object) -> object:
    """Returns the value with one of its parts, at any depth, replaced, renamed, doubled or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        way = rng.random()
        if way < 0.6:
            return value | {key: edited(rng, value[key])}
        rest = {other: item for other, item in value.items() if other != key}
        if way < 0.75:
            return rest
        return rest | {rng.choice((str(key) + "x", "../" + str(key), "", "__metadata__", str(key)[1:])): value[key]}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], edited(rng, value[place]), *value[place + rng.choice((0, 1, 1)) :]]
    return rng.choice(NASTY)


MUTATIONS: list[Callable[[random.Random, bytearray], None]] = [flip, cut, grow, number, edit_json, edit_json, edit_json]


def mutate(rng: random.Random, sample: Path, target: Path) -> None:
    """Writes a mutated copy of a sample, a file or a folder."""
    if sample.is_dir():
        shutil.copytree(sample, target)
    else:
        shutil.copy(sample, target)
    files = sorted(path for path in target.rglob("*") if path.is_file()) if sample.is_dir() else [target]
    for _ in range(rng.choice((1, 1, 1, 2))):
        file = rng.choice(files)
        data = bytearray(file.read_bytes())
        if not data:
            continue
        try:
            rng.choice(MUTATIONS)(rng, data)
        except Exception:  # the file is no JSON any more after the first mutation
            flip(rng, data)
        file.write_bytes(data)


@contextmanager
def in_time() -> Iterator[None]:
    """Raises TimeoutError where the body takes too long."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {LIMIT:.0f} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def state_of(model: nn.Module) -> tuple[object, ...]:
    """Returns what must not change: classes, flags, and every number."""
    kinds = tuple((path, type(module), module.training) for path, module in model.named_modules())
    numbers = tuple((key, p.requires_grad, p.detach().numpy().tobytes()) for key, p in model.named_parameters())
    return kinds, numbers


def attempt(model: nn.Module, path: Path) -> str:
    """Loads a file and returns "loaded" or "refused"; anything else is an error of ours.

    Raises:
        AssertionError: the model changed although loading failed, or did not come back.
        Exception: loading failed in a way of its own.
    """
    before = state_of(model)
    try:
        with in_time():
            li.load(model, path, check_base=False)
        outcome = "loaded"
        li.uninject(model)
    except li.LoraInjectError:
        outcome = "refused"
    assert state_of(model) == before, "the model changed"
    return outcome


def fuzz(name: str, sample: Path, seeds: Iterator[int], keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Tries one mutation per seed; returns how they went, and a line for each that broke the rule."""
    model, counts, broken = make_model(), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            target = Path(folder) / f"{seed}"
            mutate(random.Random(f"{name}:{seed}"), sample, target)
            try:
                counts[attempt(model, target)] += 1
            except Exception as error:
                broken.append(f"{name}, seed {seed}: {type(error).__name__}: {str(error)[:200]}")
                model = make_model()
                if keep is not None:
                    shutil.move(target, keep / f"{name}-{seed}")
                    continue
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    return counts, broken


def until(deadline: float, start: int) -> Iterator[int]:
    """Yields numbers from `start` on until the clock says stop."""
    while time.monotonic() < deadline:
        yield start
        start += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for each format")
    parser.add_argument("--format", action="append", choices=[known.name for known in FORMATS])
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--keep", type=Path, help="folder for files that broke the rule")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(Path(folder))
        for name in options.format or samples:
            seeds = until(time.monotonic() + options.seconds, options.seed)
            counts, broken = fuzz(name, samples[name], seeds, options.keep)
            print(f"{name}: {sum(counts.values()) + len(broken)} files: {dict(counts)}, {len(broken)} broke the rule")
            print("\n".join(broken[:20]), end="\n" if broken else "")
            failed |= bool(broken)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
