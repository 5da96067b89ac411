"""Transformers models by folder or hub id: built without weights from the config alone, or loaded."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .errors import FormatError, LoraInjectError, UnsupportedError


def build_on_meta(model: str) -> nn.Module:
    """Returns the model that a config describes, on the meta device: every path and shape, and no weight is read.

    Code that a folder or a hub repository brings along is never run.

    Args:
        model: a folder with config.json, that file itself, or a hub id.

    Raises:
        FormatError: no config there, or one that transformers cannot build a model from.
        UnsupportedError: an architecture that the installed transformers does not have.
        LoraInjectError: transformers is not installed.
    """
    config = read_config(model)
    build = _model_class(model, config)._from_config
    try:
        with torch.device("meta"):
            built: nn.Module = build(config)
    except Exception as error:
        raise FormatError(f"{model}: transformers cannot build the model of its config: {_brief(error)}") from error
    return built


def load_pretrained(model: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Returns the model with its weights, on the CPU, in eval mode.

    Code that a folder or a hub repository brings along is never run.

    Args:
        model: a folder with config.json and weights, or a hub id.
        dtype: the dtype to load it in; None means the one in its config.

    Raises:
        FormatError: config or weights are missing, or cannot be read.
        UnsupportedError: an architecture that the installed transformers does not have.
        LoraInjectError: transformers is not installed.
    """
    load = _model_class(model, read_config(model)).from_pretrained
    try:
        loaded: nn.Module = load(model, dtype="auto" if dtype is None else dtype)
    except Exception as error:
        raise FormatError(f"{model}: transformers cannot load the model: {_brief(error)}") from error
    return loaded.eval()


def read_config(model: str) -> Any:
    """Returns the transformers config of a folder, of a config.json, or of a hub id.

    Raises:
        FormatError: no such folder, no config in it, or one that transformers cannot read.
        LoraInjectError: transformers is not installed.
    """
    _check_place(model)
    auto: Any = _transformers().AutoConfig
    try:
        return auto.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        raise FormatError(f"{model}: transformers finds no config that it can read: {_brief(error)}") from error


def _check_place(model: str) -> None:
    """Refuses what can only be meant as a local path and holds no config, before the hub is asked for it."""
    place = Path(model)
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise FormatError(f"{model}: the folder has no config.json: name the folder of a transformers model")
    elif not place.exists() and (model.startswith(("/", ".", "~")) or "\\" in model or model.count("/") > 1):
        raise FormatError(f"{model}: no such folder: give the folder of a transformers model, or its id on the hub")


def _model_class(model: str, config: Any) -> Any:
    """Returns the class that the config names, or the bare model of its type where it names none."""
    library = _transformers()
    if not config.architectures:
        return _bare_class(model, config)
    name = config.architectures[0]
    found = getattr(library, name, None)
    if found is None:
        raise UnsupportedError(
            f"{model}: its config names the architecture {name!r}, which transformers {library.__version__} does not "
            "have: upgrade transformers, or, if the model brings its own code, load it in Python and call "
            "lora_inject there"
        )
    return found


def _bare_class(model: str, config: Any) -> Any:
    known: Any = _transformers().MODEL_MAPPING
    try:
        found = known[type(config)]
    except KeyError:
        raise UnsupportedError(
            f'{model}: its config names no architecture, and there is none for the type {config.model_type!r}: add "'
            'architectures" to config.json'
        ) from None
    return found[0] if isinstance(found, (list, tuple)) else found


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise LoraInjectError(
            "models are read with transformers, which is not installed: pip install 'lora_inject[transformers]'"
        ) from None
    return transformers


def _brief(error: Exception) -> str:
    """Returns the first paragraph of another library's message: the rest repeats it or advertises."""
    text = " ".join(str(error).strip().split("\n\n")[0].split())
    return f"{type(error).__name__}: {text}"
