"""`lora-inject norms`: how large the updates of an adapter file are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, app
from .output import show


@app.command("norms")
def norms(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter file.")],
    as_json: Json = False,
) -> None:
    """Show the Frobenius, spectral and nuclear norm, the effective and the stable rank of every update."""
    import lora_inject as li

    show(li.norms(adapter), as_json)
