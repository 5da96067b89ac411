"""Other people's files: which formats are known, and reading an adapter of any of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..errors import ConfigError
from .bundle import Bundle, Source
from .diffusers import Diffusers
from .format import Format, format_named, recognise
from .gguf import Gguf
from .kohya import Kohya
from .mlx import Mlx
from .native import LoraInject
from .peft import Peft
from .serve import Serve
from .torchtune import Torchtune

FORMATS: tuple[Format, ...] = (LoraInject(), Peft(), Mlx(), Torchtune(), Gguf(), Kohya(), Diffusers())
"""All formats, asked in this order whether they recognise a file."""

__all__ = ["FORMATS", "Bundle", "Serve", "Source", "profiled", "read_adapter", "write_adapter"]


def read_adapter(path: str | os.PathLike[str], model: nn.Module | None, *, allow_pickle: bool = False) -> Source:
    """Returns the adapter at a path, its format recognised by its content.

    Args:
        path: a file or a folder.
        model: the model that it is for, or None.
        allow_pickle: read pickles too, tensors alone.

    Raises:
        FormatError: no adapter of a known format, or a broken one.
        MismatchError: it does not fit the model.
    """
    known, content = recognise(FORMATS, path, allow_pickle=allow_pickle)
    found = known.read(content, model)
    return replace(found, program=known.name) if isinstance(found, Bundle) else found


def write_adapter(
    bundle: Bundle,
    path: str | os.PathLike[str],
    format: str,
    model: nn.Module | None,
    profile: str | Serve | None = None,
) -> Path:
    """Writes an adapter in the named format and returns where it is.

    Raises:
        ConfigError: no such format, or no such profile for it.
        UnsupportedError: the format cannot hold what the adapter does.
        FormatError: it cannot be written.
    """
    known = format_named(FORMATS, format)
    return known.write(profiled(bundle, known.name, model, profile), Path(path), model)


def profiled(bundle: Bundle, format: str, model: nn.Module | None, profile: str | Serve | None) -> Bundle:
    """Returns the adapter as a profile wants it, or as it is without one.

    Raises:
        ConfigError: no such profile for the format.
        UnsupportedError: the profile cannot hold what the adapter does.
    """
    if profile is None:
        return bundle
    if format != Peft.name or (profile != "serve" and not isinstance(profile, Serve)):
        raise ConfigError(
            f"profile={profile!r} with format={format!r}: there is profile='serve' for format='peft' alone"
        )
    return (Serve() if isinstance(profile, str) else profile).apply(bundle, model)
