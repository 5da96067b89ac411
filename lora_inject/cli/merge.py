"""`lora-inject merge`: a checkpoint with adapters merged into its weights."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import Json, app
from .output import bytes_bar, show


@app.command("merge")
def merge(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Folder of the base checkpoint, or one .safetensors file.")
    ],
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER... OUT",
            help="Adapter files, path:0.7 for 0.7 of an update; last the folder to write, which loads like BASE.",
        ),
    ],
    named: Annotated[
        list[str] | None, typer.Option("--adapter", help="One more adapter file, path or path:0.7; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    via_model: Annotated[
        bool, typer.Option("--via-model", help="Load, merge and save with transformers, in memory.")
    ] = False,
    no_check_base: Annotated[
        bool, typer.Option("--no-check-base", help="Accept base weights other than the adapter was trained on.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="Store the tensors that change in this dtype, float32 say.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that read, compute and write; chosen by itself if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the checkpoint BASE with the adapters merged into its weights to OUT."""
    from ..checkpoint import merge_checkpoint

    *files, out = places
    files += named or []
    if not files:
        raise typer.BadParameter("give at least one ADAPTER before OUT, or one by --adapter")

    with bytes_bar("merging") as progress:
        report = merge_checkpoint(
            base,
            files,
            out,
            dry_run=dry_run,
            overwrite=overwrite,
            via_model=via_model,
            check_base=not no_check_base,
            dtype=dtype,
            threads=threads,
            progress=progress,
        )
    show(report, as_json)
