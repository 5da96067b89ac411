"""Arithmetic on adapter files: sums, differences, cuts, norms, similarity, and adapters from full fine-tunes."""

from .combination import Combination
from .combine import add, resize, subtract
from .extract import extract
from .extraction import Extraction
from .norms import Norms, norms
from .similarity import Similarity, similarity

__all__ = [
    "Combination",
    "Extraction",
    "Norms",
    "Similarity",
    "add",
    "extract",
    "norms",
    "resize",
    "similarity",
    "subtract",
]
