"""What formats for language models need to know of one: its family, its heads, and whether it ties its embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from ..tree import walk

SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size")


@dataclass(frozen=True)
class TextModel:
    """A transformers language model.

    Attributes:
        family: `model_type` of its config.
        layers: number of its layers.
        heads: number of its query heads.
        kv_heads: number of its key and value heads.
        head_dim: size of one head.
        embedding: path of the input embedding, "" where there is none.
        head: path of the output layer, "" where there is none.
        tied: whether these two share their weight.
        modules: its modules by every path.
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    embedding: str
    head: str
    tied: bool
    modules: dict[str, nn.Module]


def text_model(model: nn.Module | None, where: object, why: str) -> TextModel:
    """Returns what the model's config says.

    Args:
        model: the model, on the meta device perhaps.
        where: the file, for messages.
        why: what it is needed for, for messages.

    Raises:
        UnsupportedError: no model, or one without a transformers config of a language model.
    """
    if model is None:
        raise UnsupportedError(
            f"{where}: the file alone does not tell {why}: name the model that the adapter is for (--model DIR on the "
            "command line; its config is enough)"
        )
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers: list[Any] = [getattr(config, name, None) for name in SIZES]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise UnsupportedError(
            f"{where}: {type(model).__name__} has no config of a transformers language model, which tells {why}"
        )
    layers, heads, width = numbers
    modules = {path: node.module for node in walk(model) for path in node.paths}
    paths = {id(module): path for path, module in reversed(modules.items())}
    ends = [_end(model, getter, paths) for getter in ("get_input_embeddings", "get_output_embeddings")]
    return TextModel(
        family=str(config.model_type),
        layers=layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or width // heads,
        embedding=ends[0],
        head=ends[1],
        tied=bool(getattr(config, "tie_word_embeddings", False)) and bool(ends[1]),
        modules=modules,
    )


def _end(model: nn.Module, getter: str, paths: dict[int, str]) -> str:
    """Returns the path of the input embedding or the output layer."""
    try:
        return paths.get(id(getattr(model, getter)()), "")
    except (AttributeError, NotImplementedError):
        return ""
