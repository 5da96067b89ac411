"""How llama.cpp calls a model's tensors, which of them it reorders, and where experts lie: by the gguf package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import LoraInjectError, UnsupportedError
from .experts import FUSED, PIECES
from .text_model import TextModel, text_model

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "phi3": "phi3",
}
"""Families of transformers whose tensors llama.cpp's converter renames and, for "llama", reorders, and no more."""
REORDERED = "llama"
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Names:
    """The tensors of one model.

    Attributes:
        text: the model.
        architecture: what GGUF calls its architecture.
        table: gguf's map from names of transformers to its own.
    """

    text: TextModel
    architecture: str
    table: Any

    def theirs(self, path: str) -> str | None:
        """Returns the tensor of a module's weight, or of a stack of experts; None where llama.cpp has none."""
        stem = self.text.embedding.rpartition(".")[0]
        inside = path.removeprefix(f"{stem}.") if stem else path
        plain = "lm_head" if path and path == self.text.head else f"model.{inside}"
        found: str | None = self.table.get_name(f"{plain}.weight", try_suffixes=(".weight",))
        return found

    @property
    def tied(self) -> bool:
        """Whether llama.cpp uses the embedding as output layer, which it does in families that have no other."""
        return self.text.tied or not self.text.head or self.theirs(self.text.head) is None

    @cached_property
    def ours(self) -> dict[str, str]:
        """Paths of the model's modules, and of the stacks in its packed experts, by the names of tensors."""
        paths = [path for path, module in self.text.modules.items() if isinstance(module, (nn.Linear, nn.Embedding))]
        for path, module in self.text.modules.items():
            if module._parameters.get(FUSED) is not None:
                paths += [f"{path}.{piece}" for piece in PIECES]
        return {name: path for path in paths if (name := self.theirs(path)) is not None}

    def stacked(self, tensor: str) -> bool:
        """Says whether one of the model's tensors is a stack of experts."""
        return self.ours[tensor] not in self.text.modules

    def heads(self, tensor: str) -> int | None:
        """Returns how many rotary heads the reordered rows of a tensor are, None for rows in transformers' order."""
        kinds = {"attn_q": self.text.heads, "attn_k": self.text.kv_heads}
        return kinds.get(tensor.split(".")[-2]) if self.architecture == REORDERED else None


def gguf_names(model: nn.Module | None, where: Path) -> Names:
    """Returns the names of a model's tensors.

    Raises:
        UnsupportedError: no model, or one of a family whose conversion is unknown here.
        LoraInjectError: the gguf package is not installed.
    """
    gguf = gguf_package()
    text = text_model(
        model, where, "which tensors of llama.cpp are which modules, and how many heads reorder their rows"
    )
    if text.family not in ARCHITECTURES:
        raise UnsupportedError(
            f"{where}: how llama.cpp stores models of the family {text.family!r} is unknown here (known: "
            f"{', '.join(ARCHITECTURES)}): export a PEFT folder and convert it with llama.cpp's convert_lora_to_gguf.py"
        )
    architecture = ARCHITECTURES[text.family]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return Names(text, architecture, gguf.get_tensor_name_map(number, text.layers))


def gguf_package() -> ModuleType:
    """Returns the gguf package.

    Raises:
        LoraInjectError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise LoraInjectError("GGUF adapters need the gguf package: pip install 'lora_inject[gguf]'") from None
    return gguf
