"""Hugging Face PEFT's format: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from ..errors import FormatError, listing
from ..safefile import write_tensors
from .bundle import Bundle, Source
from .content import CONFIG, TENSOR_FILES, Content
from .folder import write_folder, write_text
from .format import Format
from .peft_keys import PREFIX
from .peft_read import Reading
from .peft_write import folder_of, ready
from .resolve import resolve

FILES = (CONFIG, TENSOR_FILES[0], "README.md")
"""What PEFT writes into such a folder; one that holds anything else is not replaced."""


class Peft(Format):
    """`adapter_config.json` says ranks, scales and targets, `adapter_model.safetensors` holds the tensors."""

    name = "peft"
    folder = True

    def recognises(self, content: Content) -> bool:
        if content.config is not None:
            return "peft_type" in content.config
        return any(name.startswith(PREFIX) for name in content.names)

    def read(self, content: Content, model: nn.Module | None) -> Source:
        return resolve(Reading(content, model).parsed(), model)

    def write(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        config, tensors = folder_of(bundle, model)
        _check_replaceable(path)

        def fill(folder: Path) -> None:
            write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
            write_tensors(folder / TENSOR_FILES[0], ready(tensors), {"format": "pt"})

        return write_folder(path, fill)


def _check_replaceable(path: Path) -> None:
    others = sorted(file.name for file in path.iterdir() if file.name not in FILES) if path.is_dir() else []
    if others:
        raise FormatError(
            f"{path}: a folder of an adapter is replaced as a whole, and this one holds more:\n{listing(others)}\n"
            "Name a new folder."
        )
