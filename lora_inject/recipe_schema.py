"""Which keys a recipe has and which values they take; run as a module, it prints the JSON schema for editors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from .config import DTYPES, FACTORIZATIONS, INITS, SITE_OPTIONS, as_dtype, check_name, check_option
from .errors import ConfigError
from .registry import by_kind
from .targets import matcher


def _passing(check: Callable[[Any], object]) -> AfterValidator:
    """Keeps a value that the check lets through."""

    def keep(value: Any) -> Any:
        check(value)
        return value

    return AfterValidator(keep)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_mapping(value: Any) -> Any:
    return {"pattern": value} if isinstance(value, str) else value


_Pattern = Annotated[str, _passing(matcher)]


def _key(description: str, **constraints: Any) -> Any:
    """A key that may be absent; only keys that are there are ever read, so that the default is nobody's value."""
    return Field(default=None, description=description, **constraints)


def _choice(description: str, values: tuple[str, ...], *also: None) -> Any:
    enum = {"enum": [*values, *also]}
    return _key(f"{description}: {', '.join(['null'] * len(also) + list(values))}.", json_schema_extra=enum)


class SiteKeys(BaseModel):
    """The options that a target and the whole recipe take alike."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rank: int = _key("Inner size of the factors: a whole number of at least 1.", ge=1)
    dropout: float = _key("Dropout on the low-rank path while training: a number from 0 to below 1.", ge=0, lt=1)
    bias: bool = _key("Biases on both factors: true or false.")
    rslora: bool = _key("Scale by alpha / sqrt(rank): true or false.")
    dense: bool = _key("A full-size update where the factors would hold as many numbers: true or false.")
    train_a: bool = _key("Train A; false keeps it as it was drawn: true or false.")
    init: str = _choice("How A is drawn", INITS)
    factorization: str = _choice("How a convolution's update is split", FACTORIZATIONS)

    @field_validator(*SITE_OPTIONS, check_fields=False)
    @classmethod
    def _site_option(cls, value: Any, info: ValidationInfo) -> Any:
        check_option(str(info.field_name), as_dtype(value) if info.field_name == "dtype" else value)
        return value


def _target_schema(schema: dict[str, Any]) -> None:
    """Lets an editor take further keys only where an adapter class is named, whose options they can be."""
    schema["if"] = {"required": ["adapter"]}
    schema["else"] = {"propertyNames": {"enum": list(schema["properties"])}}


class TargetKeys(SiteKeys):
    """A pattern, and what its sites get instead of the recipe's own options."""

    # What an adapter class takes beside these is not known here: `unknown_keys` asks the class.
    model_config = ConfigDict(extra="allow", json_schema_extra=_target_schema)

    pattern: _Pattern = Field(
        description="Glob over the whole dotted path, or a regular expression after re:, as text in quotes."
    )
    # No null: a target that resets alpha or dtype would look like one that leaves them to the recipe.
    alpha: float = _key("Numerator of the scaling alpha / rank: a number above 0.", gt=0)
    dtype: str = _choice("Dtype of A and B", tuple(DTYPES))
    type: str = _key("Select only modules of this class: the name of a class or base class, as in Linear.")
    adapter: Annotated[str, _passing(by_kind)] = _key(
        "Serve the sites by this adapter class, as in block; it may take further keys."
    )


_Target = Annotated[TargetKeys, BeforeValidator(_as_mapping, json_schema_input_type=str | TargetKeys)]


class RecipeKeys(SiteKeys):
    """A recipe for lora_inject: what one injection selects, and how."""

    name: Annotated[str, _passing(check_name)] = _key(
        "Name of the adapters: letters, digits, _ and -.", pattern="^[A-Za-z0-9_-]+$"
    )
    description: str = _key("What the recipe is for: text.")
    targets: Annotated[
        list[_Target], BeforeValidator(_as_list, json_schema_input_type=str | list[_Target]), Field(min_length=1)
    ] = Field(
        description="Patterns, each as text in quotes or as a mapping with the key pattern and overrides: at least one."
    )
    exclude: Annotated[list[_Pattern], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] = _key(
        "Patterns of paths to leave out, as text in quotes."
    )
    alpha: float | None = _key(
        "Numerator of the scaling alpha / rank: a number above 0, or null for alpha = rank.", gt=0
    )
    dtype: str | None = _choice("Dtype of A and B, null for what suits the base", tuple(DTYPES), None)
    freeze: bool = _key("Stop everything but adapters from training: true or false.")
    share_tied: bool = _key("Sites that hold one and the same weight share one pair: true or false.")
    seed: int | None = _key("Draws A reproducibly: a whole number from 0 to below 2^63, or null.", ge=0, lt=2**63)


Location = tuple[str | int, ...]


def unknown_keys(value: Any) -> list[tuple[Location, list[str]]]:
    """Returns the location of every key in a target that neither targets nor its adapter class know, and those known.

    Args:
        value: the plain value of a recipe, valid or not.
    """
    targets = value.get("targets") if isinstance(value, dict) else None
    found: list[tuple[Location, list[str]]] = []
    for index, target in enumerate(targets if isinstance(targets, list) else ()):
        if isinstance(target, dict):
            known = _known(target)
            found += [(("targets", index, key), known) for key in target if key not in known]
    return found


def _known(target: dict[str, Any]) -> list[str]:
    """Returns the keys that a target may have; all that it has where its adapter class, itself wrong, cannot say."""
    keys = list(TargetKeys.model_fields)
    if "adapter" not in target:
        return keys
    try:
        return [*keys, *by_kind(target["adapter"]).extras]
    except ConfigError:
        return list(target)


def json_schema() -> str:
    """Returns the JSON schema of a recipe as the text of the file `configs/recipe.schema.json`."""
    schema = RecipeKeys.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        for entry in part["properties"].values():
            entry.pop("default", None)
            entry.pop("title")
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "title": "lora_inject recipe"}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(json_schema())
