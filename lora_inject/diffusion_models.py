"""diffusers' models and pipelines by their folders: built from the configs alone, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import FormatError, LoraInjectError, UnsupportedError
from .formats.components import COMPONENTS
from .models import build_on_meta
from .safefile import parse_json

INDEX, CONFIG, CLASS = "model_index.json", "config.json", "_class_name"
LIMIT = 2**20
"""Largest config in bytes that is parsed."""


def is_diffusion(folder: Path) -> bool:
    """Says whether the folder holds a pipeline of diffusers, or one of its models."""
    return (folder / INDEX).is_file() or ((folder / CONFIG).is_file() and CLASS in _read(folder / CONFIG))


def build_diffusion(folder: Path) -> nn.Module:
    """Returns the model of a folder on the meta device; of a pipeline, a container of those that can have adapters.

    Args:
        folder: the folder of a pipeline, with model_index.json, or of one model of diffusers, with config.json.

    Raises:
        FormatError: a config that is missing or cannot be read, or from which no model can be built.
        UnsupportedError: a class that the installed diffusers does not have, or a pipeline without known components.
        LoraInjectError: diffusers is not installed.
    """
    if not (folder / INDEX).is_file():
        return _model(folder)
    listed = _read(folder / INDEX)
    names = [name for name in COMPONENTS if isinstance(listed.get(name), list) and None not in listed[name]]
    if not names:
        raise UnsupportedError(f"{folder}: the pipeline has none of the components {', '.join(COMPONENTS)}")
    members = {name: folder / name for name in names}
    return nn.ModuleDict(
        {name: _model(at) if is_diffusion(at) else build_on_meta(str(at)) for name, at in members.items()}
    )


def _read(file: Path) -> Mapping[str, Any]:
    try:
        if file.stat().st_size > LIMIT:
            raise FormatError(f"{file}: larger than {LIMIT} bytes: no model's config is")
        value = parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file}: must hold a JSON object")
    return value


def _model(folder: Path) -> nn.Module:
    config = _read(folder / CONFIG)
    try:
        import diffusers
    except ImportError:
        raise LoraInjectError(
            f"{folder}: a model of diffusers, which is not installed: pip install diffusers"
        ) from None
    name = str(config.get(CLASS))
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise UnsupportedError(f"{folder}: diffusers {diffusers.__version__} has no model {name!r}: upgrade diffusers")
    build: Any = found.from_config
    try:
        with torch.device("meta"):
            built: nn.Module = build(dict(config))
    except Exception as error:
        brief = " ".join(str(error).split())[:300]
        raise FormatError(f"{folder}: diffusers cannot build the model of its config: {brief}") from error
    return built
