"""The built-in adapter classes, one family of modules per file; importing this package registers them."""

from . import parameter  # isort: skip - the most general class is asked last
from . import (
    attention,
    bilinear,
    block,
    conv,
    conv_transpose,
    embedding,
    embedding_bag,
    full,
    linear,
    quantized,
    recurrent,
)

__all__ = [
    "attention",
    "bilinear",
    "block",
    "conv",
    "conv_transpose",
    "embedding",
    "embedding_bag",
    "full",
    "linear",
    "parameter",
    "quantized",
    "recurrent",
]
