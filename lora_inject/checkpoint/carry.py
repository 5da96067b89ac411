"""The files of a checkpoint that are no weights: which go along, which stay behind, and what changes in config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .base import INDEX, Base
from .changes import TIE

REPORTS = ("merge_report.json", "merge_report.txt")
OTHER_WEIGHTS = (
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "rust_model.ot",
    "*.onnx",
    "*.onnx_data",
    "*.gguf",
    "*.ckpt",
    "*.pth",
    "*.pt",
)
"""Copies of the weights in other formats; beside merged weights they would be wrong."""
CACHES = (".git", ".cache", ".lora_inject_merge")


def files_beside(base: Base) -> tuple[list[str], list[str]]:
    """Returns the relative paths of the files that go along unchanged, and of those that stay behind."""
    carried: list[str] = []
    left: list[str] = []
    if base.folder is None:
        return carried, left
    written = {shard.path.name for shard in base.shards} | {base.index_name, *REPORTS}
    for where, folders, files in os.walk(base.folder):
        inside = Path(where).relative_to(base.folder)
        folders[:] = sorted(name for name in folders if name not in CACHES)
        left += [str(inside / name) for name in folders if (Path(where) / name).is_symlink()]
        for name in sorted(files):
            path = (inside / name).as_posix()
            if path not in written and (Path(where) / name).is_file():
                (left if _is_weight(path) else carried).append(path)
    return carried, left


def _is_weight(path: str) -> bool:
    name = path.rpartition("/")[2]
    # A folder inside has weights of its own, as the modules of sentence-transformers do.
    at_top = "/" not in path and (name.endswith(".safetensors") or name.endswith(INDEX))
    return at_top or any(fnmatchcase(name, pattern) for pattern in OTHER_WEIGHTS)


def new_config(base: Base, untied: bool) -> bytes | None:
    """Returns the config.json of the output where it differs from the base's, that is where weights are untied."""
    if base.config is None or not untied:
        return None
    changed = _untie(base.config) | {TIE: False}
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _untie(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: False if key == TIE else _untie(value) if isinstance(value, dict) else value
        for key, value in config.items()
    }


def may_be_tied(base: Base, rows: int) -> bool:
    """Says whether a weight with that many rows could be an embedding that the config ties to a head."""
    config = base.config
    if config is None:
        return False
    return rows in _values(config, "vocab_size") and any(_values(config, TIE) or [True])


def _values(config: Mapping[str, Any], key: str) -> list[Any]:
    found = [config[key]] if key in config else []
    for value in config.values():
        if isinstance(value, dict):
            found += _values(value, key)
    return found
