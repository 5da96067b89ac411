"""`lora-inject convert`: an adapter of one format in another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, app
from .output import show


@app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An adapter of any known format, a file or a folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file or folder to write.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The format to write.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Folder of the base, for names, head counts and fingerprints.")
    ] = None,
    no_check_base: Annotated[
        bool, typer.Option("--no-check-base", help="Accept a base that the adapter was not trained on.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin and .pt files too, tensors alone.")
    ] = False,
    profile: Annotated[
        str | None, typer.Option(help="serve: a file of PEFT that all servers read alike; needs --model.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter in another program's format; what that cannot hold is an error."""
    from ..conversion import convert as run

    show(
        run(
            source,
            target,
            to,
            model=model,
            check_base=not no_check_base,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            profile=profile,
        ),
        as_json,
    )
