"""The architectures of the installed transformers: a config class each, and the model classes that take it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .called import CALLED

# Classes with a head come first, since a head is where weights are tied.
PREFERRED = (
    "PRETRAINING",
    "MULTIMODAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM",
    "MASKED_LM",
    "CTC",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
)


@dataclass(frozen=True)
class Architecture:
    """A model type, and the names of the model classes for it, the one to try first in front."""

    name: str
    config_class: str
    model_classes: tuple[str, ...]


def architectures() -> list[Architecture]:
    """Returns every model type of the installed transformers that has a model class, in alphabetical order."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found = [Architecture(name, config, _model_classes(name)) for name, config in CONFIG_MAPPING_NAMES.items()]
    return sorted(found, key=lambda architecture: architecture.name.lower())


def _model_classes(name: str) -> tuple[str, ...]:
    from transformers.models.auto import modeling_auto

    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in PREFERRED]
    entries = [mapping.get(name) for mapping in (*mappings, modeling_auto.MODEL_MAPPING_NAMES)]
    flat = [[entry] if isinstance(entry, str) else list(entry or ()) for entry in entries]
    return tuple(dict.fromkeys(entry for group in flat for entry in group))


def config_class(architecture: Architecture) -> Any:
    """Returns the config class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[architecture.name]


def model_classes(architecture: Architecture) -> Iterator[Any]:
    """Yields the model classes: those of the auto classes, then others of its modeling files that take the config."""
    import transformers

    config = config_class(architecture)
    seen = set()
    for name in architecture.model_classes:
        found = getattr(transformers, name, None)
        if found is not None:
            seen.add(name)
            yield found
    try:
        module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    except ModuleNotFoundError as error:
        if seen and error.name == config.__module__.replace(".configuration_", ".modeling_"):
            return  # it borrows the model classes of another architecture
        raise
    for name, found in inspect.getmembers(module, inspect.isclass):
        takes = getattr(found, "config_class", None) is config and issubclass(found, transformers.PreTrainedModel)
        if takes and name not in seen and ("forward" in vars(found) or architecture.name in CALLED):
            yield found


def wholes(architecture: Architecture) -> list[Architecture]:
    """Returns the architectures of the same package whose configs hold the config of this one, the smallest first."""
    config = config_class(architecture)
    package = config.__module__.rpartition(".")[0]
    found = {}
    for other in architectures():
        if other.model_classes and package_of(other) == package:
            parts = _parts(config_class(other))
            if config in parts and config_class(other) is not config:
                found[other] = len(parts)
    return sorted(found, key=lambda other: found[other])


def package_of(architecture: Architecture) -> str:
    """Returns the package of transformers that its config class comes from, without an import."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    return f"transformers.models.{model_type_to_module_name(architecture.name)}"


def _parts(config: Any) -> list[Any]:
    """Returns the classes of all configs within a config class, at any depth."""
    inside = [part for part in getattr(config, "sub_configs", {}).values() if inspect.isclass(part)]
    return [*inside, *(deeper for part in inside if part is not config for deeper in _parts(part))]
