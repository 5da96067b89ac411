"""Writing a folder all at once: built beside its place, synced, and put there in one step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import FormatError
from ..safewrite import places, sync

EXCHANGE = 2
"""RENAME_EXCHANGE of Linux' renameat2: two names change places in one step."""
HERE = -100
"""AT_FDCWD: paths are relative to the current directory."""


def write_folder(path: Path, fill: Callable[[Path], None]) -> Path:
    """Builds a folder under a temporary name beside `path` and puts it in the place of what was there.

    Where the system cannot exchange two folders in one step, the old one is set aside first, and put back if the new
    one cannot take its place.

    Args:
        path: the folder to write.
        fill: writes the files into the folder that it is given.

    Raises:
        FormatError: it cannot be written, or `path` is a file; what was there stays.
    """
    place, beside = places(path)
    if place.exists() and not place.is_dir():
        raise FormatError(f"{path}: is a file, and a folder is to be written: name another place")
    try:
        beside.mkdir()
        fill(beside)
        sync(beside)
        _place(beside, place)
        sync(place.parent)
    except OSError as error:
        raise FormatError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return path


def _place(new: Path, path: Path) -> None:
    """Puts the new folder at `path`; what was there is at `new` then."""
    if not path.is_dir():
        os.rename(new, path)
    elif not _exchange(new, path):
        aside = new.with_suffix(".old")
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(aside, path)
            raise
        os.rename(aside, new)


def _exchange(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError, AttributeError):
        swap = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(swap(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0)
    return False


def write_text(path: Path, text: str) -> None:
    """Writes a text file and forces it to disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)
