"""lora_inject's own format: docs/file-format.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ..adapter_file import FORMAT, SiteRecord, metadata, read_adapter_file
from ..errors import UnsupportedError, listing
from ..safefile import write_tensors
from .bundle import Bundle, Source
from .content import Content
from .format import Format
from .trained import as_updates


class LoraInject(Format):
    """One safetensors file, tensors by the path of their site, options and the base's fingerprint in the metadata."""

    name = "lora_inject"

    def recognises(self, content: Content) -> bool:
        return content.metadata.get("format") == FORMAT

    def read(self, content: Content, model: nn.Module | None) -> Source:
        return read_adapter_file(content.file)

    def write(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        if bundle.full and model is None:
            raise UnsupportedError(
                f"{bundle.path}: holds parameters that were trained as a whole, which this format stores as updates of "
                f"the base:\n{listing(list(bundle.full))}\nName the base with its weights (--model), or load the file "
                "into the model and export it from there."
            )
        bundle = bundle if model is None else as_updates(bundle, model)
        records = [_known(record, bundle.entries[record.path]) for record in bundle.sites.values()]
        return write_tensors(path, bundle.tensors, metadata(bundle.name, records))


def _known(record: SiteRecord, tensors: Mapping[str, Tensor]) -> SiteRecord:
    """Returns the record with the shape of its weight in place of a fingerprint, where the origin had none."""
    return record if record.base else replace(record, base={"shape": _shape(record, tensors), "hash": None})


def _shape(record: SiteRecord, tensors: Mapping[str, Tensor]) -> list[int]:
    """Returns the weight's shape, rows from B and columns (and the kernel) from A."""
    if "lora_dense" in tensors:
        return list(tensors["lora_dense"].shape)
    a, b = tensors["lora_A"], tensors["lora_B"]
    if "parameter" in record.extras:
        return [*b.shape[:-1], a.shape[-1]]
    return [b.shape[0], *a.shape[1:]]
