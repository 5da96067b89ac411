"""Writing reports: all checks before the work, and each file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import StateError
from ..inspected import Inspection
from ..safewrite import write_whole
from .page import html_page
from .picture import png_picture

FilePath = str | os.PathLike[str]


def check_free(files: Iterable[FilePath], inputs: Iterable[FilePath], overwrite: bool = False) -> None:
    """Refuses places that a report cannot be written to.

    Args:
        files: the reports.
        inputs: files and folders that are read.
        overwrite: whether files that exist may be replaced; inputs never are.

    Raises:
        StateError: a folder that does not exist, a file that does, one that is read, or two reports in one file.
    """
    seen = {Path(path).resolve(): "is what is read" for path in inputs}
    for path in map(Path, files):
        at = path.resolve()
        if at in seen:
            raise StateError(f"{path}: {seen[at]}: choose another file for the report")
        if any(at.is_relative_to(place) for place in seen):
            raise StateError(f"{path}: lies in the base's folder: choose a file outside of it for the report")
        if not at.parent.is_dir():
            raise StateError(f"{path}: there is no folder {at.parent}: make it first")
        if at.is_dir():
            raise StateError(f"{path}: is a folder: name a file")
        if at.exists() and not overwrite:
            raise StateError(f"{path}: exists: choose another file, or give overwrite=True (--overwrite)")
        seen[at] = "is another report"


def write_html(inspection: Inspection, path: FilePath) -> Path:
    """Writes the inspection as one HTML page that needs nothing else.

    Raises:
        FormatError: the disk does not take the file; an older one stays as it was.
    """
    page = html_page(inspection)
    return write_whole(path, lambda beside: beside.write_text(page, encoding="utf-8"))


def write_png(inspection: Inspection, path: FilePath) -> Path:
    """Writes the inspection's heat map, spectra and effective ranks as a PNG.

    Raises:
        ConfigError: matplotlib is missing.
        FormatError: the disk does not take the file; an older one stays as it was.
    """
    picture = png_picture(inspection)
    return write_whole(path, lambda beside: beside.write_bytes(picture))
