"""A recipe: targets and options of one injection as a value, and the YAML that it is read from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .config import Injection
from .targets import Target


@dataclass(frozen=True, eq=False)
class Recipe:
    """What one injection selects and how; `inject(model, recipe)` takes it in place of targets.

    Attributes:
        targets: the patterns with their overrides, in order.
        injection: name, options, exclude, freeze, share_tied and seed.
        description: what the recipe is for.
    """

    targets: tuple[Target, ...]
    injection: Injection = field(default_factory=Injection)
    description: str = ""


def load_recipe(path_or_preset: str | Path) -> Recipe:
    """Returns the recipe in a YAML file, or the preset of that name.

    Args:
        path_or_preset: a path (anything with a slash or ending in .yaml or .yml), or a name such as "llama".

    Raises:
        RecipeError: no such file or preset, or a key or value that cannot be used; gives file, line and the nearest
            valid key.
    """
    from .recipe_file import read_recipe

    return read_recipe(path_or_preset)
