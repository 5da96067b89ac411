"""Hugging Face PEFT's format: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..errors import FormatError, listing
from ..safefile import parse_json
from ..safewrite import write_tensors
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

BASE_KEY = "lora_inject_base"
"""Where the metadata of the tensors' file have fingerprints of the base, where lora_inject wrote it."""


class Peft(Format):
    """`adapter_config.json` says ranks, scales and targets, `adapter_model.safetensors` holds the tensors."""

    name = "peft"
    folder = True

    def recognises(self, content: Content) -> bool:
        if content.config is not None:
            # torchtune writes such a config too, beside tensors of its own names.
            return "peft_type" in content.config and not any(".lora_a." in name for name in content.names)
        return any(name.startswith(PREFIX) for name in content.names)

    def read(self, content: Content, model: nn.Module | None) -> Source:
        return _identified(resolve(Reading(content, model).parsed(), model), content)

    def write_sites(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        config, tensors = folder_of(bundle, model)

        def fill(folder: Path) -> None:
            _check_replaceable(path)
            write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
            write_tensors(folder / TENSOR_FILES[0], ready(tensors), {"format": "pt"} | _fingerprints(bundle))

        return write_folder(path, fill)


def _fingerprints(bundle: Bundle) -> dict[str, str]:
    """Returns metadata with the fingerprints of the base, which PEFT does not look at."""
    known = {path: dict(record.base) for path, record in bundle.sites.items() if record.base.get("hash")}
    return {BASE_KEY: json.dumps(known)} if known else {}


def _identified(bundle: Bundle, content: Content) -> Bundle:
    """Returns the adapter with the fingerprints that the file has of the base."""
    where = f"{content.file}: metadata {BASE_KEY!r}"
    known = parse_json(content.metadata.get(BASE_KEY, "{}"), where)
    if not isinstance(known, dict) or not all(map(_is_fingerprint, known.values())):
        raise FormatError(f"{where}: must hold a shape and a hash by path")
    sites = {path: record._replace(base=known.get(path, record.base)) for path, record in bundle.sites.items()}
    return replace(bundle, sites=sites)


def _is_fingerprint(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"shape", "hash"} or not isinstance(value["hash"], str):
        return False
    return isinstance(value["shape"], list) and all(isinstance(size, int) for size in value["shape"])


def _check_replaceable(path: Path) -> None:
    others = sorted(file.name for file in path.iterdir() if file.name not in FILES) if path.is_dir() else []
    if others:
        raise FormatError(
            f"{path}: a folder of an adapter is replaced as a whole, and this one holds more:\n{listing(others)}\n"
            "Name a new folder."
        )
