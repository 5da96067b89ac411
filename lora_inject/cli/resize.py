"""`lora-inject resize`: an adapter file with lower ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Dtype, Energy, Json, Name, Out, Overwrite, Rank, app
from .output import show


@app.command("resize")
def resize(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter file.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Dtype = None,
    name: Name = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the nearest adapter of a lower rank to OUT, and show what that took from every site."""
    import lora_inject as li

    show(li.resize(adapter, out, rank=rank, energy=energy, dtype=dtype, name=name, overwrite=overwrite), as_json)
