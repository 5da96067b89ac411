"""`lora-inject merge`: a checkpoint with adapters merged into its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, app
from .output import bytes_bar, show


@app.command("merge")
def merge(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Folder of the base checkpoint, or one .safetensors file.")
    ],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Adapter files; path:0.7 takes 0.7 of an update.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it loads like the base.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    via_model: Annotated[
        bool, typer.Option("--via-model", help="Load, merge and save with transformers, in memory.")
    ] = False,
    no_check_base: Annotated[
        bool, typer.Option("--no-check-base", help="Accept base weights other than the adapter was trained on.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that read, compute and write; chosen by itself if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the checkpoint BASE with the adapters merged into its weights to OUT."""
    from ..checkpoint import merge_checkpoint

    with bytes_bar("merging") as progress:
        report = merge_checkpoint(
            base,
            adapters,
            out,
            dry_run=dry_run,
            overwrite=overwrite,
            via_model=via_model,
            check_base=not no_check_base,
            threads=threads,
            progress=progress,
        )
    show(report, as_json)
