"""The main job on real input: adapt a sentence encoder, export, reload, merge, and take the adapters out again.

Task: name the package of Python's standard library that a docstring comes from. A linear head on the frozen encoder is
the baseline; it gets the best of three training lengths, judged on the held-out texts, which favours it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AutoModel

import demo_data
import demo_model
import lora_inject as li

RECIPE = Path(__file__).parent.parent / "configs" / "minilm.yaml"
LENGTHS = (5, 20, 80)
"""Epochs of the baseline's three runs."""
MARGIN = 0.05
"""Least gain in held-out accuracy for the demo to count as done."""


def fingerprint(model: nn.Module) -> str:
    """Returns a hash over the names and bytes of everything in the state dict."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(key.encode())
        digest.update(bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def check(what: str, holds: bool) -> None:
    """Prints one promise and ends the demo if it does not hold."""
    print(f"  {'ok' if holds else 'FAILED'}  {what}")
    if not holds:
        sys.exit(1)


def frozen_head(train: Tensor, held_out: Tensor, data: demo_data.Dataset) -> tuple[nn.Linear, float]:
    """Trains a linear head on the frozen encoder for three lengths of time.

    Returns the shortest trained one, from which adaptation goes on (a fully fitted one leaves little to learn from),
    and the best held-out accuracy of the three.
    """
    labels, wanted = demo_model.targets(data.train), demo_model.targets(data.held_out)
    heads = [demo_model.train_head(train, labels, len(data.labels), epochs) for epochs in LENGTHS]
    scores = [demo_model.accuracy(head, held_out, wanted) for head in heads]
    return heads[0], max(scores)


def adapt(
    encoder: demo_model.Encoder, head: nn.Linear, data: demo_data.Dataset, recipe: str, epochs: int
) -> tuple[li.Plan, list[float]]:
    """Injects, trains adapters and head with a progress bar, and returns the plan and the losses."""
    plan = li.inject(encoder.model, li.load_recipe(recipe))
    losses: list[float] = []
    steps = epochs * -(-len(data.train) // 32)
    with Progress() as progress:
        bar = progress.add_task("training adapters", total=steps)

        def tick(loss: float) -> None:
            losses.append(loss)
            progress.update(bar, advance=1, description=f"training adapters, loss {loss:.2f}")

        parameters = list(li.adapter_parameters(encoder.model).values())
        demo_model.train_adapters(encoder, head, parameters, data.train, epochs, tick)
        progress.update(bar, completed=steps)
    return plan, losses


def plot(path: Path, losses: list[float], before: float, after: float) -> None:
    """Saves the loss curve and both accuracies as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    left.plot(losses, linewidth=0.8)
    left.set(title="training loss", xlabel="step", ylabel="cross-entropy")
    bars = right.bar(["frozen encoder", "with LoRA"], [before, after], color=["#999999", "#3366aa"])
    right.bar_label(bars, fmt="%.3f")
    right.set(title="accuracy on held-out text", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local folder or hub id of an encoder; default: the packaged MiniLM")
    parser.add_argument("--recipe", default=str(RECIPE), help="a recipe file or preset (default: configs/minilm.yaml)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training texts")
    parser.add_argument("--quick", action="store_true", help="a small part of the data: all checks but the accuracy")
    args = parser.parse_args()
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    source = args.model or demo_model.packaged_model()
    data = demo_data.load(packages=5, limit=24) if args.quick else demo_data.load()
    print(f"{len(data.train):,} docstrings to train on, {len(data.held_out):,} held out, {len(data.labels)} packages")

    encoder = demo_model.Encoder(source)
    base = fingerprint(encoder.model)
    wanted = demo_model.targets(data.held_out)
    head, before = frozen_head(encoder.all(data.train), encoder.all(data.held_out), data)
    plan, losses = adapt(encoder, head, data, args.recipe, 1 if args.quick else args.epochs)
    adapted = encoder.all(data.held_out)
    after = demo_model.accuracy(head, adapted, wanted)
    file = li.export(encoder.model, args.out / "adapter.safetensors")
    plot(args.out / "demo.png", losses, before, after)

    print(f"\naccuracy on held-out text   frozen encoder {before:.3f}   with LoRA {after:.3f}   {after - before:+.3f}")
    print(f"trainable parameters        {plan.parameters:,} in adapters ({plan.share:.2%} of the encoder)")
    print(f"adapter file                {file} ({file.stat().st_size:,} bytes)\n")
    prove(encoder, data, head, adapted, file, source, base, args.out)
    print(f"\npicture in {args.out / 'demo.png'}; {time.perf_counter() - started:.0f} s in all")
    if not args.quick:
        check(f"LoRA beats the frozen encoder by at least {MARGIN:.0%} points", after - before >= MARGIN)


def prove(
    encoder: demo_model.Encoder,
    data: demo_data.Dataset,
    head: nn.Linear,
    adapted: Tensor,
    file: Path,
    source: str,
    base: str,
    out: Path,
) -> None:
    """Reloads, merges and uninjects, and checks each promise."""
    fresh = demo_model.Encoder(source)
    li.load(fresh.model, file)
    check("adapter file in a fresh model: outputs bit-equal", torch.equal(fresh.all(data.held_out), adapted))

    li.merge(fresh.model)
    li.uninject(fresh.model, keep_merged=True)
    fresh.model.save_pretrained(out / "merged")  # type: ignore[operator]
    fresh.model = AutoModel.from_pretrained(out / "merged").eval()
    merged = head(fresh.all(data.held_out)).argmax(1)
    check("merged checkpoint in plain transformers: same predictions", torch.equal(merged, head(adapted).argmax(1)))

    li.uninject(encoder.model)
    after = fingerprint(encoder.model)
    check(f"uninject: the base's exact bytes (sha256 {after[:16]}..., before {base[:16]}...)", after == base)


if __name__ == "__main__":
    main()
