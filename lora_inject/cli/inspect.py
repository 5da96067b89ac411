"""`lora-inject inspect`: what is in an adapter file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, app
from .output import show


@app.command("inspect")
def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter file.")],
    as_json: Json = False,
) -> None:
    """Show what is in an adapter file: sites, ranks, scaling, sizes, norms of A, B and the update, and the base."""
    from ..inspection import inspect_adapter

    show(inspect_adapter(adapter), as_json)
