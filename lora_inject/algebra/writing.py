"""Writing a new adapter file, and what must not be overwritten."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter_file import SiteRecord, metadata
from ..config import as_dtype, check_option
from ..errors import StateError
from ..safewrite import write_tensors


def check_out(out: str | os.PathLike[str], overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuses to write over a file unless that is asked for.

    Raises:
        StateError: `out` exists; says whether it is one of the inputs.
    """
    path = Path(out)
    if overwrite or not os.path.exists(path):
        return
    what = "one of the inputs" if any(one.exists() and path.samefile(one) for one in inputs) else "there already"
    raise StateError(f"{path}: is {what}: choose another file, or allow it by overwrite=True (--overwrite)")


def given_dtype(dtype: Any) -> torch.dtype | None:
    """Returns the dtype that an option names, or None.

    Raises:
        ConfigError: not one that adapters are stored in.
    """
    found = as_dtype(dtype)
    check_option("dtype", found)
    return found  # type: ignore[no-any-return]


def write(out: str | os.PathLike[str], name: str, sites: Sequence[tuple[SiteRecord, Mapping[str, Tensor]]]) -> int:
    """Writes an adapter file, all or nothing, and returns its size in bytes.

    Raises:
        FormatError: the file cannot be written; an older one stays as it was.
    """
    tensors = {f"{record.prefix}{key}": tensor for record, found in sites for key, tensor in found.items()}
    return write_tensors(out, tensors, metadata(name, [record for record, _ in sites])).stat().st_size
