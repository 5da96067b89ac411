"""`lora-inject add`: the weighted sum of adapter files."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import AnyBase, Dtype, Energy, Json, Name, Out, Overwrite, Rank, app
from .output import show


@app.command("add")
def add(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Adapter files; path:0.7 takes 0.7 of an update.")
    ],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Dtype = None,
    name: Name = None,
    any_base: AnyBase = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the sum of adapter files, each times its weight, to OUT; exact but for one rounding, unless cut."""
    import lora_inject as li

    report = li.add(
        adapters,
        out,
        rank=rank,
        energy=energy,
        dtype=dtype,
        name=name,
        check_base=not any_base,
        overwrite=overwrite,
    )
    show(report, as_json)
