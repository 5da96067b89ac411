"""`lora-inject inspect`: what is in an adapter file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, app
from .output import rank, show


@app.command("inspect")
def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter file.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="The base's folder or .safetensors file: adds |W| and |dW| / |W|."),
    ] = None,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Add singular values and effective ranks; --html and --png do too.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with heat map and spectra.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write the same overview as a PNG.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")] = False,
    no_check_base: Annotated[
        bool, typer.Option("--no-check-base", help="Accept a base other than the adapter was trained on.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what is in an adapter file: sites, ranks, scaling, sizes, norms of A, B and the update, and the base."""
    from ..inspection import inspect_adapter
    from ..report.files import check_free, write_html, write_png
    from ..report.picture import require_matplotlib

    writers = {file: write for file, write in ((html, write_html), (png, write_png)) if file is not None}
    check_free([file for file in (html, png) if file], [adapter, *filter(None, [base])], overwrite)
    if png is not None:
        require_matplotlib()
    found = inspect_adapter(adapter, spectra=spectra or bool(writers), base=base, check_base=not no_check_base)
    for file, write in writers.items():
        if not rank():
            write(found, file)
    show(found, as_json)
