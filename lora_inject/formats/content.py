"""What lies at a path, looked at once: enough to tell which program wrote it, before any tensor is read."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..safefile import Header, open_regular, parse_json, read_header, read_tensors
from .sizes import check_sizes

CONFIG = "adapter_config.json"
CONFIG_LIMIT = 16 * 2**20
"""Largest adapter_config.json in bytes that is parsed."""
TENSOR_FILES = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, eq=False)
class Content:
    """A file, or a folder with an adapter's config and tensors.

    Attributes:
        path: what the user named.
        file: the file with the tensors.
        magic: its first four bytes.
        header: its header, where it is a safetensors file.
        config: adapter_config.json of the folder, where there is one.
        pickled: tensors by name, read from a pickle that the user allowed.
    """

    path: Path
    file: Path
    magic: bytes
    header: Header | None = None
    config: Mapping[str, Any] | None = None
    pickled: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self.header.tensors if self.header is not None else self.pickled)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the safetensors file, empty for other files."""
        return {} if self.header is None else self.header.metadata

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, from the header where there is one."""
        entries = self.pickled if self.header is None else self.header.tensors
        return {name: tuple(entry.shape) for name, entry in entries.items()}

    def read(self, model: nn.Module | None, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Returns the named tensors, or all, on the CPU, after checking that the model could use their sizes.

        Raises:
            MismatchError: tensors larger than any that the model could use.
            FormatError: the file cannot be read any more, or a tensor is no floating-point one or not finite.
        """
        shapes = self.shapes
        wanted = list(shapes) if names is None else list(names)
        check_sizes({name: shapes[name] for name in wanted}, model, self.file)
        found = self._raw(wanted)
        for name, tensor in found.items():
            if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
                raise FormatError(f"{self.file}: {name}: dtype {tensor.dtype} is none of an adapter's tensor")
            if not torch.isfinite(tensor).all():
                raise FormatError(f"{self.file}: {name}: holds NaN or infinity: the adapter is broken, train it again")
        return found

    def numbers(self, names: Iterable[str]) -> dict[str, float]:
        """Returns the named tensors of one element each, of whatever real dtype, as numbers.

        Raises:
            FormatError: the file cannot be read any more, or a tensor is no single finite number.
        """
        numbers: dict[str, float] = {}
        shapes, names = self.shapes, list(names)
        several = next((name for name in names if math.prod(shapes[name]) != 1), None)
        if several is not None:
            raise FormatError(f"{self.file}: {several}: shape {shapes[several]}: no number")
        for name, tensor in self._raw(names).items():
            if tensor.is_complex() or tensor.dtype == torch.bool:
                raise FormatError(f"{self.file}: {name}: shape {tuple(tensor.shape)} in {tensor.dtype}: no number")
            numbers[name] = float(tensor.item())
            if not math.isfinite(numbers[name]):
                raise FormatError(f"{self.file}: {name}: {numbers[name]} is not a finite number")
        return numbers

    def _raw(self, names: list[str]) -> dict[str, Tensor]:
        return {n: self.pickled[n] for n in names} if self.header is None else read_tensors(self.header, names)


def look(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Content:
    """Returns what lies at a path; headers and configs are read and checked, tensors are not.

    Args:
        path: a file or a folder.
        allow_pickle: read `.bin` and `.pt` files too, with torch's loader of weights alone.

    Raises:
        FormatError: nothing there, nothing that holds an adapter's tensors, or a file that is broken.
    """
    path = Path(path)
    file = _tensor_file(path, allow_pickle) if os.path.isdir(path) else path
    with open_regular(file) as opened:
        magic = opened.read(4)
    config = _read_config(file.parent / CONFIG) if file is not path or _goes_with_config(file) else None
    if magic == b"GGUF":
        return Content(path, file, magic)
    if file.suffix in PICKLES:
        return Content(path, file, magic, config=config, pickled=_unpickle(file, allow_pickle))
    return Content(path, file, magic, read_header(file), config)


def _goes_with_config(file: Path) -> bool:
    """Says whether a file alone belongs to the config beside it: one of PEFT, mlx-lm (numbered too) or torchtune."""
    return file.name.endswith(TENSOR_FILES[:2]) or (file.suffix in PICKLES and file.name.startswith("adapter"))


def _tensor_file(folder: Path, allow_pickle: bool) -> Path:
    found = [folder / name for name in TENSOR_FILES if (folder / name).is_file()]
    if allow_pickle and not found:
        found = sorted(file for file in folder.iterdir() if file.suffix in PICKLES and file.name.startswith("adapter"))
    if len(found) != 1:
        several = f"{len(found)} adapters ({', '.join(file.name for file in found)})"
        raise FormatError(
            f"{folder}: a folder with {several if found else 'no adapter'}: wanted is one of "
            f"{', '.join(TENSOR_FILES)}. Pickles (adapter_model.bin, adapter_0.pt) are read by `lora-inject convert "
            "--allow-pickle` alone"
        )
    return found[0]


def _read_config(file: Path) -> Mapping[str, Any] | None:
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > CONFIG_LIMIT:
            raise FormatError(f"{file}: larger than {CONFIG_LIMIT} bytes: no adapter's config is")
        value = parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file}: must hold a JSON object")
    return value


def _unpickle(file: Path, allowed: bool) -> dict[str, Tensor]:
    if not allowed:
        raise FormatError(
            f"{file}: a pickle can run code when it is read: convert it with `lora-inject convert --allow-pickle`, "
            "which reads tensors alone (torch.load with weights_only=True)"
        )
    try:
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        brief = str(error).splitlines()[0]
        raise FormatError(f"{file}: not a file of plain tensors: {brief}") from error
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        raise FormatError(f"{file}: must hold a dictionary of tensors by name")
    return {name: tensor.detach() for name, tensor in value.items()}
