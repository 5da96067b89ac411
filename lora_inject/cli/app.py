"""The Typer application that every command joins, and the options that stand before the command."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import VERSION

PROGRAM = "lora-inject"

app = typer.Typer(
    name=PROGRAM,
    help="Low-rank adapters for any PyTorch model: plan, inspect, merge and verify from the command line.",
    epilog="Exit codes: 0 done, 1 verify found a dead adapter, 2 error, 130 Ctrl-C.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on standard output.")]
"""The option that every command with a result has."""


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
