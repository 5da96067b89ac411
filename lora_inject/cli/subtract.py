"""`lora-inject subtract`: the difference of two adapter files."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import AnyBase, Dtype, Energy, Json, Name, Out, Overwrite, Rank, app
from .output import show


@app.command("subtract")
def subtract(
    a: Annotated[str, typer.Argument(metavar="A", help="The adapter file to subtract from.")],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The adapter file that is subtracted; path:0.7 takes 0.7 of it.")
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
    """Write the difference of two adapter files, A - B, to OUT; exact but for one rounding, unless cut."""
    import lora_inject as li

    report = li.subtract(
        a,
        b,
        out,
        rank=rank,
        energy=energy,
        dtype=dtype,
        name=name,
        check_base=not any_base,
        overwrite=overwrite,
    )
    show(report, as_json)
