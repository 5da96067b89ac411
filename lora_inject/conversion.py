"""From file to file: an adapter of one format written in another, without building the model's weights."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .adapter_file import SiteRecord
from .checkpoint.base import read_base
from .checkpoint.model_names import ModelNames
from .checkpoint.weights import materialised
from .diffusion_models import build_diffusion, is_diffusion
from .errors import MismatchError, StateError, listing
from .fingerprint import fingerprint
from .formats import FORMATS, Bundle, Serve, profiled
from .formats.bundle import loaded
from .formats.format import format_named, recognise
from .formats.trained import KIND
from .models import build_on_meta
from .registry import by_kind
from .sites import join
from .tree import walk


@dataclass(frozen=True, repr=False)
class Conversion:
    """What `convert` did.

    Attributes:
        source: the file or folder that was read.
        target: the file or folder that was written.
        read: the format that was recognised.
        written: the format that was written.
        sites: how many low-rank updates it holds.
        full: how many parameters that were trained as a whole it holds.
        base: "checked" where the base's fingerprint was compared, "unknown" where it could not be.
        notes: how the file was understood where that was not plain.
    """

    source: str
    target: str
    read: str
    written: str
    sites: int
    full: int
    base: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        whole = f" and {self.full} whole parameters" if self.full else ""
        lines = [
            f"{self.source} ({self.read}) -> {self.target} ({self.written}): {self.sites} sites{whole}",
            f"base: {self.base}",
        ]
        return "\n".join([*lines, *self.notes])

    def __repr__(self) -> str:
        return f"<Conversion of {self.source} to {self.written}: {self.sites} sites>"

    def to_dict(self) -> dict[str, Any]:
        """Returns the conversion as values that JSON can hold."""
        return asdict(self)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    model: str | os.PathLike[str] | None = None,
    check_base: bool = True,
    allow_pickle: bool = False,
    overwrite: bool = False,
    profile: str | Serve | None = None,
) -> Conversion:
    """Writes the adapter of one file in another format; every tensor is used, or the call fails.

    Args:
        source: an adapter of any known format, recognised by its content.
        target: the file or folder to write.
        to: name of the format to write.
        model: the base, where names, head counts or weights of it are needed: the folder of a transformers model, with
            or without weights. With weights, fingerprints are checked, or made where the source has none; weights are
            read one at a time. Or the folder of a model or a pipeline of diffusers, whose weights are not read.
        check_base: False accepts a base that the adapter was not trained on.
        allow_pickle: read `.bin` and `.pt` files too, with torch's loader of weights alone.
        overwrite: replace what lies at `target`.
        profile: "serve", or a `Serve` with options, makes a file of PEFT that all servers read alike.

    Raises:
        ConfigError: no format of that name.
        FormatError: the source cannot be read or is broken, or the target cannot be written.
        MismatchError: the adapter does not fit the model, or was trained on other weights.
        UnsupportedError: the format cannot hold what the adapter does, or a model is needed and none was given.
        StateError: the target exists.
    """
    writer, place = format_named(FORMATS, to), Path(target)
    if os.path.exists(place) and not overwrite:
        raise StateError(f"{place} exists: choose another name, or pass overwrite=True (--overwrite)")
    names = _names(model)
    skeleton = names.model if names is not None else None if model is None else _skeleton(model)
    reader, content = recognise(FORMATS, source, allow_pickle=allow_pickle)
    bundle = loaded(reader.read(content, skeleton))
    if skeleton is not None:
        _check_paths(bundle, skeleton)
    if names is not None:
        bundle = _identified(bundle, names, check_base)
    whole = (*bundle.full, *(path for path, record in bundle.sites.items() if record.kind == KIND))
    with ExitStack() as stack:
        if names is not None:
            stack.enter_context(materialised(names, whole))
        bundle = profiled(bundle, writer.name, skeleton, profile)
        written = writer.write(bundle, place, skeleton)
    base = "unknown" if names is None else "checked" if check_base else "not checked"
    low_rank = len(bundle.sites) + len(bundle.full) - len(whole)
    return Conversion(str(source), str(written), reader.name, writer.name, low_rank, len(whole), base, bundle.notes)


def _check_paths(bundle: Bundle, model: nn.Module) -> None:
    """Refuses sites that the model lacks: their names would be written as they stand, for another model."""
    known = {path for node in walk(model) for path in node.paths}
    missing = [path for path, record in bundle.sites.items() if record.owner(path) not in known]
    missing += [path for path in bundle.full if path.rpartition(".")[0] not in known]
    if missing:
        count = len(bundle.sites) + len(bundle.full)
        raise MismatchError(
            f"{bundle.path}: the model has no module for {len(missing)} of {count} sites:\n"
            f"{listing(missing)}\nName the model that the adapter was made for."
        )


def _skeleton(model: str | os.PathLike[str]) -> nn.Module:
    return build_diffusion(Path(model)) if is_diffusion(Path(model)) else build_on_meta(str(model))


def _names(model: str | os.PathLike[str] | None) -> ModelNames | None:
    """Returns the names of the checkpoint in a model's folder, or None where there are no weights."""
    folder = None if model is None else Path(model)
    if folder is None or not any(folder.glob("*.safetensors")) or is_diffusion(folder):
        return None
    return ModelNames(read_base(folder))


def _identified(bundle: Bundle, names: ModelNames, check: bool) -> Bundle:
    """Returns the bundle with the fingerprint of every site, after comparing those that it has with the checkpoint."""
    nodes = {path: node for node in walk(names.model) for path in node.paths}
    sites: dict[str, SiteRecord] = {}
    differ: list[str] = []
    for path, record in bundle.sites.items():
        touched = by_kind(record.kind).touches(record.extras)
        owner = record.owner(path)
        if owner not in nodes or not touched:
            raise MismatchError(f"{bundle.path}: {path or '(root)'}: the model in {names.base.root} has no such module")
        with materialised(names, (join(owner, touched[0]),)):
            found = fingerprint(nodes[owner], touched)
        if record.base.get("hash") not in (None, found["hash"]):
            differ.append(path)
        sites[path] = record if record.base.get("hash") else record._replace(base=found)
    if differ and check:
        raise MismatchError(
            f"{bundle.path}: made for other base weights: {len(differ)} of {len(sites)} sites differ:\n"
            f"{listing(differ)}\nName its own base, or pass check_base=False (--no-check-base)."
        )
    return replace(bundle, sites=sites)
