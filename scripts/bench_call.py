"""One token through one adapted linear layer without gradients, and what `import lora_inject` adds to `import torch`.

`python scripts/bench_call.py` prints the extra time of a call over the plain layer's, ours beside PEFT's, and the
seconds of both imports in fresh processes. `--device cuda` measures the calls there.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import lora_inject as li
from bench_common import machine, markdown, parser, ratio, rounds

IMPORT = "import time, torch; began = time.perf_counter(); import lora_inject; print(time.perf_counter() - began)"


class Holder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)


def call(dtype: torch.dtype, width: int, device: str, count: int, calls: int) -> list[object]:
    torch.manual_seed(0)
    base = Holder(width).to(device, dtype).eval().requires_grad_(False)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    li.inject(ours, "layer", rank=8, alpha=16, dtype=torch.float32)
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=["layer"]), theirs).eval()
    adapter = ours.layer.adapters["default"]
    nn.init.normal_(adapter.lora_B, std=0.02)
    theirs.layer.lora_A["default"].weight.data = adapter.lora_A.detach().clone()
    theirs.layer.lora_B["default"].weight.data = adapter.lora_B.detach().clone()
    x = torch.randn(1, 1, width, device=device, dtype=dtype)

    def many(model: Holder) -> None:
        layer = model.layer
        for _ in range(calls):
            layer(x)

    with torch.no_grad():
        assert torch.allclose(ours.layer(x).float(), theirs.layer(x).float(), rtol=2e-2, atol=2e-2)
        models = {"floor": base, "ours": ours, "PEFT": theirs}
        times = rounds({name: (lambda m=model: many(m)) for name, model in models.items()}, count, device)
    extra = {
        name: statistics.median(a - b for a, b in zip(times[name], times["floor"], strict=True)) / calls * 1e6
        for name in ("ours", "PEFT")
    }
    plain = statistics.median(times["floor"]) / calls * 1e6
    numbers = [f"{value:.1f} µs" for value in (plain, extra["ours"], extra["PEFT"])]
    return [str(dtype).removeprefix("torch."), width, *numbers, ratio(extra["ours"], extra["PEFT"])]


def imports(count: int) -> list[float]:
    found = []
    for _ in range(count):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        found.append(float(done.stdout))
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--rounds", type=int, default=200)
    options = made.parse_args()
    torch.set_num_threads(1)
    count, calls = (1, 2) if options.quick else (options.rounds, 50)
    widths = (4096,) if options.device == "cuda" else (256, 512)
    rows = [
        call(dtype, width, options.device, count, calls)
        for dtype in (torch.float32, torch.bfloat16)
        for width in widths
    ]
    print(markdown(["dtype", "width", "plain layer", "extra", "PEFT's extra", "ratio"], rows))
    seconds = imports(1 if options.quick else 7)
    print(f"\n`import lora_inject` after `import torch`: {statistics.median(seconds):.3f} s.")
    print(f"\n{machine(options.device)}")


if __name__ == "__main__":
    main()
