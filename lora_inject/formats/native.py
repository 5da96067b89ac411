"""lora_inject's own format: docs/file-format.md."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..adapter_file import FORMAT, metadata, read_adapter_file
from ..errors import UnsupportedError, listing
from ..safewrite import write_tensors
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
        assert content.header is not None
        return read_adapter_file(content.header)

    def write(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        return self.write_sites(bundle, path, model)

    def write_sites(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        if bundle.full and model is None:
            raise UnsupportedError(
                f"{bundle.path}: holds parameters that were trained as a whole, which this format stores as updates of "
                f"the base:\n{listing(list(bundle.full))}\nName the base with its weights (--model), or load the file "
                "into the model and export it from there."
            )
        bundle = bundle if model is None else as_updates(bundle, model)
        return write_tensors(path, bundle.tensors, metadata(bundle.name, list(bundle.sites.values())))
