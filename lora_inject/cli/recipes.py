"""`lora-inject presets` and `lora-inject schema`: which recipes there are, and what one may say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from ..tables import table
from .app import Json, app
from .output import show


@dataclass(frozen=True)
class _Presets:
    descriptions: dict[str, str]

    def __str__(self) -> str:
        rows = [(name, text.split(". ")[0].rstrip(".")) for name, text in self.descriptions.items()]
        return table(("preset", "for"), rows)

    def to_dict(self) -> dict[str, Any]:
        return {"presets": self.descriptions}


@app.command("presets")
def presets(as_json: Json = False) -> None:
    """List the recipes that come with the package; `plan MODEL --recipe NAME` shows what one selects."""
    from ..recipe_file import presets as files
    from ..recipe_file import read_recipe

    show(_Presets({name: " ".join(read_recipe(file).description.split()) for name, file in files().items()}), as_json)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from ..recipe_schema import json_schema

    typer.echo(json_schema(), nl=False)
