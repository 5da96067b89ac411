"""The built-in adapter classes, one family of modules per file; importing this package registers them."""

from . import block, conv, embedding, linear

__all__ = ["block", "conv", "embedding", "linear"]
