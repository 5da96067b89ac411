"""`lora-inject similarity`: how alike two adapter files are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import AnyBase, Json, app
from .output import show


@app.command("similarity")
def similarity(
    a: Annotated[Path, typer.Argument(metavar="A", help="An adapter file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    any_base: AnyBase = False,
    as_json: Json = False,
) -> None:
    """Show the cosine of the updates of two adapter files, and how much their column and row spaces share."""
    import lora_inject as li

    show(li.similarity(a, b, check_base=not any_base), as_json)
