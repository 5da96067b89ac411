"""A training step and what it keeps for the backward pass: lora_inject, PEFT and the frozen model side by side.

`python scripts/bench_training.py` trains adapters on all seven projections of a small Llama on the CPU, in float32 and
bfloat16, with and without dropout. `--device cuda` takes the sizes of Llama-3-8B (hidden 4096, sequence 2048, a few
blocks), bfloat16 and ranks 16 and 64, and reports peak memory. `--compile` compares the models under torch.compile.
The floor is the same model frozen, its embedding output requiring grad. Overhead is step time / floor - 1, and its
limit the time of the adapters' bare products / floor.
"""

from __future__ import annotations

import copy
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_inject as li
from bench_common import PROJECTIONS, machine, markdown, overhead, parser, ratio, rounds

SIZES: dict[str, dict[str, int]] = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8},
    "cuda": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32},
        "num_key_value_heads": 8,
    },
    "quick": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
SHAPES = {"cpu": (4, 128), "cuda": (2, 2048), "quick": (2, 8)}


def models(base: nn.Module, rank: int, dropout: float) -> dict[str, nn.Module]:
    """Returns the frozen model, and copies with our adapters and with PEFT's, in float32, with equal numbers."""
    floor = copy.deepcopy(base).requires_grad_(False)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(floor)
    li.inject(ours, [f"*.{name}" for name in PROJECTIONS], rank=rank, dropout=dropout, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=list(PROJECTIONS))
    theirs = inject_adapter_in_model(config, theirs)
    with torch.no_grad():
        for ref in li.adapters(ours):
            nn.init.normal_(ref.adapter.lora_B, std=0.02)
            layer: Any = theirs.get_submodule(ref.path)
            for own, name in ((ref.adapter.lora_A, "lora_A"), (ref.adapter.lora_B, "lora_B")):
                # As get_peft_model does by default: adapters in float32 on a half-precision base.
                getattr(layer, name)["default"].weight.data = own.detach().clone()
    return {"floor": floor, "ours": ours, "PEFT": theirs}


def step(model: nn.Module, ids: Tensor) -> Tensor:
    """Runs forward and backward once and returns the loss; the gradients are dropped by the next call."""
    model.zero_grad(set_to_none=True)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)  # type: ignore[operator]
    loss: Tensor = model(inputs_embeds=embedded, use_cache=False).logits.float().square().mean()
    loss.backward()
    return loss


def kept(model: nn.Module, ids: Tensor) -> int:
    """Returns how many bytes autograd saves beside the parameters, each storage once."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        # Alive until the end, so that no other tensor gets its address.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)  # type: ignore[operator]
        out = model(inputs_embeds=embedded, use_cache=False).logits
    assert out.requires_grad
    return sum(size for storage, size in saved.items() if storage not in own)


def products(model: nn.Module, tokens: int) -> Callable[[], None]:
    """Returns what runs the six small products of each adapter alone, in the base's dtype, their operands at hand.

    Two on the way forward and four back are the least that low-rank adapters can do. Layers of one shape share memory,
    so that it is in the processor's caches.
    """
    like = next(model.parameters())

    @cache
    def operands(rows: int, columns: int, rank: int) -> list[Tensor]:
        shapes = ((tokens, columns), (tokens, rows), (rank, columns), (rows, rank))
        return [like.new_zeros(shape) for shape in shapes]

    sites = [operands(*ref.module._parameters["weight"].shape, ref.adapter.config.rank) for ref in li.adapters(model)]

    @torch.no_grad()
    def run() -> None:
        for x, output, first, second in sites:
            inner = x @ first.t()
            output.addmm_(inner, second.t())
            inner_grad = output @ second
            x.addmm_(inner_grad, first)
            inner_grad.t() @ x
            output.t() @ inner

    return run


def peak(run: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - held


def accuracy(held: dict[str, nn.Module], ids: Tensor) -> dict[str, float]:
    """Returns the mean relative error of the adapters' gradients, without dropout, for us and for PEFT.

    The reference is our model in a wider dtype with the same numbers.
    """
    wide = torch.float64 if next(held["floor"].parameters()).dtype == torch.float32 else torch.float32
    exact = copy.deepcopy(held["ours"]).to(wide)
    for model in (exact, held["ours"], held["PEFT"]):
        assert torch.isfinite(step(model.eval(), ids))
        model.train()
    errors: dict[str, list[float]] = {"ours": [], "PEFT": []}
    for wanted, ref in zip(li.adapters(exact), li.adapters(held["ours"]), strict=True):
        layer: Any = held["PEFT"].get_submodule(ref.path)
        for name in ("lora_A", "lora_B"):
            reference = getattr(wanted.adapter, name).grad
            found = {"ours": getattr(ref.adapter, name).grad, "PEFT": getattr(layer, name)["default"].weight.grad}
            for whose, gradient in found.items():
                errors[whose].append(float((gradient.to(wide) - reference).norm() / reference.norm()))
    return {whose: sum(each) / len(each) for whose, each in errors.items()}


def cases(options: Namespace) -> Iterator[tuple[torch.dtype, int, float]]:
    if options.device == "cuda":
        yield from ((torch.bfloat16, rank, dropout) for rank in (16, 64) for dropout in (0.0, 0.1))
        return
    for dtype in (torch.float32, torch.bfloat16):
        yield from ((dtype, 16, dropout) for dropout in (0.0, 0.1))


def measure(options: Namespace, dtype: torch.dtype, rank: int, dropout: float) -> list[object]:
    size = "quick" if options.quick else options.device
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], vocab_size=512, attn_implementation="sdpa")
    base = LlamaForCausalLM(config).to(options.device, dtype).train()
    shape = SHAPES[size]
    if size == "cpu" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # A processor that only emulates bfloat16 is forty times slower in it.
        shape = (1, 64)
    ids = torch.randint(0, 512, shape, device=options.device)
    held = models(base, rank, dropout)
    errors = accuracy(held, ids)
    assert errors["ours"] < (1e-5 if dtype == torch.float32 else 0.05), f"gradients are off by {errors['ours']:.2g}"
    if options.device == "cuda":
        memory: dict[str, int] = {name: peak(lambda m=model: step(m, ids)) for name, model in held.items()}
    else:
        memory = {name: kept(model, ids) for name, model in held.items()}
    if options.compile:
        # Each case is a program of its own, and torch gives up on code that it has compiled too often.
        torch._dynamo.reset()
        for model in held.values():
            model.compile(fullgraph=True)
    runs = {name: (lambda m=model: step(m, ids)) for name, model in held.items()}
    runs["products"] = products(held["ours"], ids.numel())
    # What a slow machine cannot do in its share of four minutes is measured in fewer rounds.
    began = time.perf_counter()
    runs["floor"]()
    once = time.perf_counter() - began
    count = 1 if options.quick else max(3, min(options.rounds, int(12 / max(once, 1e-3))))
    times = rounds(runs, count, options.device, warm=1)
    ours, theirs = overhead(times, "ours"), overhead(times, "PEFT")
    limit = overhead(times, "products") + 1
    mine, other = (memory[name] - memory["floor"] for name in ("ours", "PEFT"))
    return [
        *(
            str(dtype).removeprefix("torch."),
            rank,
            dropout,
            ids.numel(),
            f"{sorted(times['floor'])[count // 2]:.3f} s",
            count,
        ),
        *(f"{limit:.3f}", f"{ours:.3f}", f"{theirs:.3f}", ratio(ours, theirs)),
        *(f"{mine / 1e6:.1f} MB", f"{other / 1e6:.1f} MB", ratio(mine, other)),
        *(f"{errors[whose]:.2g}" for whose in ("ours", "PEFT")),
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--compile", action="store_true", help="under torch.compile, without graph breaks")
    made.add_argument("--rounds", type=int, default=40)
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    memory = "peak above held" if options.device == "cuda" else "kept"
    headers = ["base", "rank", "dropout", "tokens", "floor", "rounds", "limit", "overhead", "PEFT's", "ratio"]
    headers += [memory, "PEFT's", "ratio", "gradients off by", "PEFT's"]
    rows = [measure(options, *case) for case in cases(options)]
    print(markdown(headers, rows), machine(options.device), sep="\n\n")


if __name__ == "__main__":
    main()
