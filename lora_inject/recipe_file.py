"""Finds a recipe's file or preset, reads it, and says with file and line what it cannot use."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .config import SITE_OPTIONS, Injection
from .errors import RecipeError, did_you_mean, listing, nearest
from .recipe import Recipe
from .recipe_schema import Location, RecipeKeys, TargetKeys, unknown_keys
from .recipe_yaml import Document, Place, YamlProblem, parse
from .targets import Target

LIMIT = 32 * 1024
"""Bytes that a recipe may have: PyYAML takes half a second for so many, and a recipe has a few hundred."""

SHOWN = 12
"""Problems of one file that are reported at most."""


def read_recipe(path_or_preset: str | os.PathLike[str]) -> Recipe:
    """Returns the recipe in a YAML file, or the preset of that name.

    Args:
        path_or_preset: a path (a `Path`, or text with a slash or ending in .yaml or .yml), or a preset's name.

    Raises:
        RecipeError: no such file or preset, a file that is too large or not YAML, or a key or value that cannot be
            used.
    """
    source = _find(path_or_preset)
    try:
        document = parse(_text(source))
    except YamlProblem as problem:
        raise RecipeError(_line(source, problem.place, str(problem))) from None
    return _recipe(_checked(source, document))


def presets() -> dict[str, Path]:
    """Returns the presets' files by name, sorted: those in the package, or in the source tree beside the package."""
    package = Path(__file__).resolve().parent
    installed, source = package / "configs", package.parent / "configs"
    folder = installed if installed.is_dir() else source
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _find(path_or_preset: object) -> Path:
    """Returns the file that a path or a preset's name stands for."""
    if isinstance(path_or_preset, os.PathLike):
        return Path(path_or_preset)
    if not isinstance(path_or_preset, str):
        raise RecipeError(f"recipe {path_or_preset!r}: give a path, or the name of a preset")
    if "/" in path_or_preset or "\\" in path_or_preset or path_or_preset.lower().endswith((".yaml", ".yml")):
        return Path(path_or_preset)
    known = presets()
    if path_or_preset in known:
        return known[path_or_preset]
    close = " or ".join(repr(name) for name in nearest(path_or_preset[:60].lower(), known))
    raise RecipeError(
        f"no preset is named {path_or_preset[:60]!r}{f': did you mean {close}?' if close else '.'} "
        f"There are {', '.join(known) or 'none'}. For a file, write a path with a slash or the ending .yaml."
    )


def _text(source: Path) -> str:
    """Returns the text of a file after a look at its kind and size."""
    try:
        # Opening what is no regular file, a pipe say, could wait for ever.
        if not source.is_file():
            what = "not a file" if source.exists() else "no such file"
            raise RecipeError(f"{source}: {what}: give the path of a recipe, or the name of a preset")
        with source.open("rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}") from error
    if len(data) > LIMIT:
        raise RecipeError(f"{source}: larger than {LIMIT // 1024} KiB, which no recipe is: is it the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        place = Place(before.count(b"\n") + 1, error.start - before.rfind(b"\n"))
        raise RecipeError(_line(source, place, "not UTF-8 text: save the file as UTF-8")) from None


def _checked(source: Path, document: Document) -> RecipeKeys:
    """Returns the document's keys and values after every check, or reports all that are wrong."""
    if not isinstance(document.value, dict):
        found = "is empty" if document.value is None else f"holds {_show(document.value)}"
        text = f'{found}, and a recipe is a mapping with the key targets, as in\n  targets: ["*.q_proj", "*.v_proj"]'
        raise RecipeError(_line(source, document.place(()), text))
    problems = [_unknown(document, location, known) for location, known in unknown_keys(document.value)[:SHOWN]]
    keys = None
    try:
        keys = RecipeKeys.model_validate(document.value)
    except ValidationError as error:
        problems += [_problem(document, item) for item in error.errors(include_url=False)[:SHOWN]]
    if problems or keys is None:
        lines = [_line(source, place, text) for place, text in sorted(problems)]
        raise RecipeError(lines[0] if len(lines) == 1 else f"{source}: several problems:\n{listing(lines, SHOWN)}")
    return keys


def _unknown(document: Document, location: Location, known: Sequence[str]) -> tuple[Place, str]:
    key = str(location[-1])[:60]
    return document.place(location, of_key=True), f"unknown key {key!r}: {did_you_mean(key, known)}"


def _problem(document: Document, item: Any) -> tuple[Place, str]:
    """Returns place and text of one thing that pydantic found."""
    location: Location = item["loc"]
    if item["type"] == "extra_forbidden":
        return _unknown(document, location, list(RecipeKeys.model_fields))
    model, key = _owner(location)
    description = model.model_fields[key].description
    if item["type"] == "missing":
        return document.place(location), f"key {key!r} is missing. {description}"
    if item["type"] == "value_error" and key not in SITE_OPTIONS:
        return document.place(location), str(item["ctx"]["error"])
    return document.place(location), f"{key}: {_show(item['input'])} will not do. {description}"


def _owner(location: Location) -> tuple[type[RecipeKeys] | type[TargetKeys], str]:
    """Returns the model and the key that a location belongs to."""
    if location[0] == "targets" and len(location) > 2:
        return TargetKeys, str(location[2])
    return RecipeKeys, str(location[0])


def _show(value: Any) -> str:
    """Returns a value as YAML would spell it, shortened."""
    if isinstance(value, (list, dict)):
        return f"{'an empty' if not value else 'a'} {'list' if isinstance(value, list) else 'mapping'}"
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _line(source: Path, place: Place, text: str) -> str:
    return f"{source}:{place.line}:{place.column}: {text}"


def _recipe(keys: RecipeKeys) -> Recipe:
    """Returns the recipe that the keys describe; a key that was not given keeps the default of `inject`."""
    given = keys.model_dump(exclude_unset=True)
    targets = tuple(Target(**target) for target in given.pop("targets"))
    description = given.pop("description", "")
    return Recipe(targets, Injection().override(given), description)
