"""`lora-inject extract`: an adapter from a full fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Dtype, Energy, Json, Name, Out, Overwrite, Rank, app
from .output import show

Patterns = Annotated[
    list[str] | None,
    typer.Option("--target", "-t", metavar="PATTERN", help="Take only these; a glob, or a regex after re:; repeat."),
]
Excluded = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Leave these out; repeat for more.")]
Whole = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Store the update of these parameters whole, of any shape; repeat."),
]


@app.command("extract")
def extract(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="Folder of the base checkpoint, or a .safetensors file.")
    ],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The same after a full fine-tune.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    targets: Patterns = None,
    exclude: Excluded = None,
    whole: Whole = None,
    dtype: Dtype = None,
    name: Name = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the difference of two checkpoints as an adapter to OUT, and show what the rank took from it."""
    import lora_inject as li

    report = li.extract(
        base,
        tuned,
        out,
        rank=rank,
        energy=energy,
        targets=targets,
        exclude=exclude or (),
        whole=whole or (),
        dtype=dtype,
        name=name or "default",
        overwrite=overwrite,
    )
    show(report, as_json)
