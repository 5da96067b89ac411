"""The Typer application that every command joins, and the options that stand before the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..version import VERSION

PROGRAM = "lora-inject"

app = typer.Typer(
    name=PROGRAM,
    help="Low-rank adapters for any PyTorch model: plan, inspect, combine, merge and verify from the command line.",
    epilog="Exit codes: 0 done, 1 verify or check found something wrong, 2 error, 130 Ctrl-C.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on standard output.")]
"""The option that every command with a result has."""

Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The adapter file to write.")]
Rank = Annotated[int | None, typer.Option(help="Keep at most this rank at every site.")]
Energy = Annotated[
    float | None,
    typer.Option(help="Keep the smallest rank whose squared singular values hold this share of their sum, as 0.99."),
]
Dtype = Annotated[str | None, typer.Option(help="Store the result in this dtype (float32, ...).")]
Name = Annotated[str | None, typer.Option(help="Name of the adapter in the new file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Allow OUT to exist, and to be an input.")]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Accept adapters that were trained on different base weights.")
]
"""Options of the commands that work on adapter files."""


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{PROGRAM} {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks of errors; may stand anywhere.")] = False,
) -> None:
    """Takes the options that stand before the command; `main` reads --debug itself, as parsing can fail too."""
