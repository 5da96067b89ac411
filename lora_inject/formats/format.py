"""The contract of a file format, and the list of those that are known."""

from __future__ import annotations

import abc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torch import nn

from ..errors import ConfigError, FormatError, did_you_mean
from .bundle import Bundle, Source
from .content import Content, look
from .separate import separated


class Format(abc.ABC):
    """One program's way to store adapters."""

    name: ClassVar[str]
    """What `format=` and `--to` call it."""
    folder: ClassVar[bool] = False
    """Whether it is a folder instead of one file."""

    @abc.abstractmethod
    def recognises(self, content: Content) -> bool:
        """Says whether the content is of this format; must not fail on any content."""

    @abc.abstractmethod
    def read(self, content: Content, model: nn.Module | None) -> Source:
        """Returns the adapter in the native layout, every tensor of the file accounted for.

        Args:
            content: what `recognises` said yes to.
            model: the model that it is for, on the meta device perhaps; None where only the file is known, and names
                and kinds must be taken from it alone.

        Raises:
            FormatError: the content is broken, or holds what has no counterpart here; names it.
            MismatchError: it does not fit the model.
        """

    def write(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        """Writes an adapter, all or nothing, and returns where it is; arguments and errors are those of `write_sites`.

        A pair that several modules share is written once for each.
        """
        return self.write_sites(separated(bundle, model), path, model)

    @abc.abstractmethod
    def write_sites(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        """Writes an adapter whose sites are one module each.

        Args:
            bundle: the adapter.
            path: the file or folder to write.
            model: the model that it is for, where names or numbers of the base are needed.

        Raises:
            UnsupportedError: the format cannot hold what the adapter does; names it.
            FormatError: it cannot be written.
        """


def format_named(formats: Sequence[Format], name: object) -> Format:
    """Returns the format of that name.

    Raises:
        ConfigError: there is none.
    """
    for known in formats:
        if known.name == name:
            return known
    raise ConfigError(f"format {name!r} is unknown: {did_you_mean(str(name), [known.name for known in formats])}")


def recognise(
    formats: Sequence[Format], path: str | os.PathLike[str], *, allow_pickle: bool = False
) -> tuple[Format, Content]:
    """Returns the format of what lies at a path, known by its content, not by its name.

    Raises:
        FormatError: nothing there, a broken file, or none of the known formats.
    """
    content = look(path, allow_pickle=allow_pickle)
    for known in formats:
        if known.recognises(content):
            return known, content
    some = ", ".join(content.names[:3])
    raise FormatError(
        f"{path}: not an adapter of a known format ({', '.join(known.name for known in formats)}): "
        + (f"its tensors are called {some}, ..." if some else "it holds no tensor")
    )
