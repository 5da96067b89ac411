"""Parameters that were trained as a whole: values in other programs' files, updates of kind "full" here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_file import SiteRecord
from ..config import SiteConfig
from ..errors import MismatchError, UnsupportedError, listing
from ..host import unmerged_tensor
from ..rows import wide
from ..tree import walk
from .bundle import Bundle, described

KIND = "full"


def as_updates(bundle: Bundle, model: nn.Module) -> Bundle:
    """Returns the bundle with its trained values as sites of kind "full": Delta W = value - W.

    Raises:
        MismatchError: the model lacks a parameter, or has it in another shape.
        UnsupportedError: the model's weights are on the meta device, so that the difference cannot be taken.
    """
    if not bundle.full:
        return bundle
    weights = _weights(bundle, model)
    sites, entries, notes = dict(bundle.sites), dict(bundle.entries), list(bundle.notes)
    for path, value in bundle.full.items():
        update = difference(value, weights[path])
        config = SiteConfig(dtype=update.dtype)
        record = SiteRecord(path, (), KIND, config, {"parameter": path.rpartition(".")[2]}, {})
        entries[path] = {"lora_dense": update}
        sites[path] = described(record, entries[path])
        if not torch.equal(value.to(weights[path].dtype).to(value.dtype), value):
            notes.append(f"{path}: trained in {value.dtype}, used in the base's {weights[path].dtype}")
    return replace(bundle, sites=sites, entries=entries, full={}, notes=tuple(notes))


def as_values(bundle: Bundle, model: nn.Module | None) -> Bundle:
    """Returns the bundle with its sites of kind "full" as trained values: W + Delta W in W's dtype.

    Raises:
        UnsupportedError: the base's weights are not at hand.
    """
    updates = {path: record for path, record in bundle.sites.items() if record.kind == KIND}
    if not updates:
        return bundle
    wanted = replace(bundle, full={path: bundle.entries[path]["lora_dense"] for path in updates})
    if model is None:
        raise UnsupportedError(
            f"{bundle.path}: parameters trained as a whole are stored as updates here and as values there, which takes "
            f"the base's weights:\n{listing(list(updates))}\nExport from the model, or merge them into the base."
        )
    weights = _weights(wanted, model)
    full = {
        path: (wide(weights[path]) + wide(bundle.entries[path]["lora_dense"]) * record.config.scaling).to(
            weights[path].dtype
        )
        for path, record in updates.items()
    }
    sites = {path: record for path, record in bundle.sites.items() if path not in updates}
    entries = {path: bundle.entries[path] for path in sites}
    return replace(bundle, sites=sites, entries=entries, full=dict(bundle.full) | full)


def _weights(bundle: Bundle, model: nn.Module) -> dict[str, Tensor]:
    """Returns the base's parameters that the trained values replace, without merged updates, on the CPU."""
    nodes = {path: node for node in walk(model) for path in node.paths}
    found: dict[str, Tensor] = {}
    wrong: list[str] = []
    for path, value in bundle.full.items():
        owner, _, name = path.rpartition(".")
        weight: Any = unmerged_tensor(nodes[owner].module, name) if owner in nodes else None
        if weight is None:
            wrong.append(f"{path}: the model has no such parameter")
        elif tuple(weight.shape) != tuple(value.shape):
            wrong.append(f"{path}: shape {tuple(value.shape)} in the file, {tuple(weight.shape)} in the model")
        elif weight.is_meta:
            raise UnsupportedError(f"{path}: its weight is on the meta device: materialise the model first")
        else:
            found[path] = weight.detach().cpu()
    if wrong:
        raise MismatchError(f"{bundle.path}: {len(wrong)} trained parameters do not fit:\n{listing(wrong)}")
    return found


def difference(trained: Tensor, weight: Tensor) -> Tensor:
    """Returns trained - weight such that weight plus it, rounded once to the weight's dtype, is the trained value.

    In float32 where that suffices, else in float64.
    """
    exact = trained.double() - weight.double()
    short = exact.float()
    again = (wide(weight) + short).to(weight.dtype)
    return short if torch.equal(again, trained.to(weight.dtype)) else exact
