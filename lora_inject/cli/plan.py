"""`lora-inject plan`: what an injection would do, from the model's config alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .app import Json, app
from .output import show

Patterns = Annotated[
    list[str] | None,
    typer.Option("--target", "-t", metavar="PATTERN", help="Select modules by a glob, or a regex after re:; repeat."),
]


@app.command("plan")
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder with config.json, or hub id, of a transformers model.")
    ],
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="A preset, or the path of a YAML file.")] = None,
    target: Patterns = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave modules out; replaces the recipe's exclude; repeat for more."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Numerator of the scaling; the rank if not given.")] = None,
    bias: Annotated[bool | None, typer.Option("--bias", help="Give both factors a bias.")] = None,
    rslora: Annotated[bool | None, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the adapters.")] = None,
    as_json: Json = False,
) -> None:
    """Show where adapters would go. The model is built without weights; nothing is read but its config."""
    if (recipe is None) == (not target):
        raise typer.BadParameter("give either --recipe or at least one --target", param_hint="--recipe / --target")
    import lora_inject as li

    from ..models import build_on_meta

    asked: dict[str, Any] = {
        "exclude": exclude or None,
        "rank": rank,
        "alpha": alpha,
        "bias": bias,
        "rslora": rslora,
        "name": name,
    }
    given = {option: value for option, value in asked.items() if value is not None}
    targets = target if recipe is None else li.load_recipe(recipe)
    show(li.plan(build_on_meta(model), targets, **given), as_json)
