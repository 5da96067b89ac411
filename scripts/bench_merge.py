"""Merging a checkpoint on disk: ours, `cp -r` and PEFT in turn, in one run on one disk.

`python scripts/bench_merge.py` makes a Llama-shaped bfloat16 checkpoint of 1.3 GB and an adapter for its seven
projections in a temporary folder, runs every contender several times, interleaved, each in a fresh process, and prints
medians and ratios. `--quick` does the same at a few MB, to see that it runs. PEFT means loading with transformers,
`PeftModel.from_pretrained`, `merge_and_unload` and `save_pretrained`. Times are those of the work itself,
without the imports; memory is the peak of the process above that of one that has only imported torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# getrusage would count the memory that the parent had when it started the process.
PEAK = "peak = int(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1]) * 1024"
IDLE = f"import json, torch; {PEAK}; print(json.dumps([0.0, peak]))"
OURS = f"""
import json, sys, time, torch
from lora_inject.checkpoint import merge_checkpoint
began = time.perf_counter()
merge_checkpoint(sys.argv[1], sys.argv[2] + ".safetensors", sys.argv[3])
took = time.perf_counter() - began
{PEAK}
print(json.dumps([took, peak]))
"""
PEFT = f"""
import json, sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
merged = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
merged.save_pretrained(sys.argv[3], max_shard_size=sys.argv[4])
took = time.perf_counter() - began
{PEAK}
print(json.dumps([took, peak]))
"""
SIZES = {
    "full": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "vocab_size": 32000},
    "quick": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2000},
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder: Path, size: str, shard: str, rank: int) -> None:
    """Writes the base, our adapter, and the same adapter as PEFT keeps it."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    import lora_inject as li

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=False)
    config.dtype = "bfloat16"
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "base", max_shard_size=shard)
    li.inject(model, [f"*.{name}" for name in PROJECTIONS], rank=rank, alpha=2 * rank)
    with torch.no_grad():
        for ref in li.adapters(model):
            ref.adapter.lora_B.normal_(0, 1e-3)
    ours = folder / "adapter.safetensors"
    li.export(model, ours)
    theirs = {f"base_model.model.{key}.weight": value for key, value in load_file(ours).items()}
    (folder / "adapter").mkdir()
    save_file(theirs, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM").save_pretrained(
        folder / "adapter"
    )


def run_python(code: str, *arguments: str) -> tuple[float, float]:
    """Returns seconds and peak bytes of one contender."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    seconds, peak = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds, peak


def run_cp(base: Path, out: Path, sync: bool) -> tuple[float, float]:
    """Returns the seconds that `cp -r` takes, with `sync` until everything is on the disk."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    if sync:
        subprocess.run(["sync", *map(str, out.iterdir())], check=True)
    return time.perf_counter() - began, 0.0


def contenders(folder: Path, shard: str) -> dict[str, Callable[[], tuple[float, float]]]:
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    return {
        "cp -r": lambda: run_cp(base, out, False),
        "cp -r, synced": lambda: run_cp(base, out, True),
        "lora_inject, synced": lambda: run_python(OURS, str(base), str(adapter), str(out)),
        "PEFT, not synced": lambda: run_python(PEFT, str(base), str(adapter), str(out), shard),
    }


def measure(folder: Path, shard: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Returns the results of every contender, run in turn, each from a settled disk."""
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, run in contenders(folder, shard).items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()
            found.setdefault(name, []).append(run())
    return found


def compare(folder: Path, shard: str) -> tuple[float, int, int]:
    """Returns the largest difference between our output and PEFT's, in units of the element's own size.

    Also how many elements differ, of how many.
    """
    import torch
    from safetensors.torch import load_file

    shutil.rmtree(folder / "out", ignore_errors=True)
    run_python(OURS, str(folder / "base"), str(folder / "adapter"), str(folder / "out"))
    run_python(PEFT, str(folder / "base"), str(folder / "adapter"), str(folder / "peft"), shard)
    ours = {k: v for f in sorted((folder / "out").glob("*.safetensors")) for k, v in load_file(f).items()}
    theirs = {k: v for f in sorted((folder / "peft").glob("*.safetensors")) for k, v in load_file(f).items()}
    assert ours.keys() == theirs.keys()
    base = {k: v for f in sorted((folder / "base").glob("*.safetensors")) for k, v in load_file(f).items()}
    assert sum(not torch.equal(value, base[key]) for key, value in ours.items()) == sum("proj" in key for key in base)
    worst, differ = 0.0, 0
    for key, value in ours.items():
        scale = value.float().abs().clamp_min(1e-3)
        worst = max(worst, float(((value.float() - theirs[key].float()).abs() / scale).max()))
        differ += int((value != theirs[key]).sum())
        assert torch.isfinite(value).all()
    shutil.rmtree(folder / "peft")
    return worst, differ, sum(value.numel() for value in ours.values())


def report(found: dict[str, list[tuple[float, float]]], idle: float, size: int) -> str:
    seconds = {name: statistics.median(time for time, _ in results) for name, results in found.items()}
    others = ["cp -r", "cp -r, synced", "PEFT, not synced"]
    lines = [
        f"| | seconds | {' | '.join(f'of {name}' for name in others)} | peak above `import torch` |",
        "|---" * 6 + "|",
    ]
    for name, results in found.items():
        peak = max(memory for _, memory in results)
        above = f"{(peak - idle) / 1e6:,.0f} MB" if peak else "-"
        took = seconds[name]
        ratios = " | ".join(f"{took / seconds[other]:.2f}" for other in others)
        lines.append(f"| {name} | {took:.2f} | {ratios} | {above} |")
    rounds = len(next(iter(found.values())))
    return "\n".join([f"Checkpoint of {size / 1e9:.2f} GB, medians of {rounds} interleaved rounds.", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few MB, one round: to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dir", type=Path, help="where to put the temporary folder: the disk that is measured")
    options = parser.parse_args()
    size, shard, rounds = ("quick", "2MB", 1) if options.quick else ("full", "500MB", options.rounds)
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        make(folder, size, shard, options.rank)
        idle = run_python(IDLE)[1]
        worst, differ, count = compare(folder, shard)
        found = measure(folder, shard, rounds)
        total = sum(path.stat().st_size for path in (folder / "base").iterdir())
        print(report(found, idle, total))
        print(f"\n{differ:,} of {count:,} elements differ from PEFT's, by at most {worst:.2g} of their size.")


if __name__ == "__main__":
    main()
