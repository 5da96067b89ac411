"""Merge adapters into a checkpoint on disk and write a checkpoint that plain `from_pretrained` loads.

`python scripts/merge_and_export.py BASE ADAPTER[:WEIGHT]... OUT`. The same as `lora-inject merge`, for those who have a
clone and no command: both call `lora_inject.checkpoint.merge_checkpoint`, which docs/merging.md describes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from lora_inject import LoraInjectError
from lora_inject.checkpoint import merge_checkpoint


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="folder of the base checkpoint, or one .safetensors file")
    parser.add_argument("adapters", nargs="+", help="adapter files; path:0.7 takes 0.7 of an update")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    parser.add_argument("--via-model", action="store_true", help="load, merge and save with transformers")
    parser.add_argument("--no-check-base", action="store_true", help="accept other base weights")
    parser.add_argument("--dtype", help="dtype of the tensors that change, float32 for example")
    return parser.parse_args(argv)


def show_progress() -> Callable[[int, int, str], None]:
    shown = [-1]

    def show(done: int, total: int, what: str) -> None:
        percent = 100 * done // max(1, total)
        if percent > shown[0]:
            shown[0] = percent
            print(f"\r{percent:3d} %  {what}", end="", file=sys.stderr, flush=True)

    return show


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        report = merge_checkpoint(
            options.base,
            options.adapters,
            options.out,
            dry_run=options.dry_run,
            overwrite=options.overwrite,
            via_model=options.via_model,
            check_base=not options.no_check_base,
            dtype=options.dtype,
            progress=show_progress() if sys.stderr.isatty() else None,
        )
    except LoraInjectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
