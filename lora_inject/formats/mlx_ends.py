"""Embedding and output layer in mlx-lm, where a tied model has one matrix, and one update, for both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import MismatchError
from .factors import Factors
from .refusals import refuse
from .text_model import TextModel, text_model

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embedding", "embeddings")
"""Last names of input embeddings in mlx-lm's models."""


def with_head(factors: list[Factors], model: nn.Module | None, where: Path) -> list[Factors]:
    """Returns the updates with one of the output layer where mlx-lm, in a tied model, lets the embedding's act on it.

    There the embedding's matrix is used twice, with its update: Delta W (vocab, dim) = scale * a b for both layers.
    """
    text = _tied(factors, model, where)
    if text is None:
        return factors
    lost = [one.path for one in factors if one.kind == "embedding" and one.path != text.embedding]
    if lost:
        raise MismatchError(f"{where}: {', '.join(lost)}: the model's embedding is called {text.embedding}")
    return [*factors, *(_mirrored(one, text.head) for one in factors if one.kind == "embedding")]


def without_head(factors: list[Factors], model: nn.Module | None, where: Path) -> list[Factors]:
    """Returns the updates without that of a tied output layer, which follows the embedding's in mlx-lm.

    Raises:
        UnsupportedError: the two are not the same update.
    """
    text = _tied(factors, model, where)
    if text is None:
        return factors
    by_path = {one.path: one for one in factors if one.parameter is None}
    embedding, head = by_path.get(text.embedding), by_path.get(text.head)
    if (embedding or head) and not _same(embedding and _mirrored(embedding, text.head), head):
        ends = " and ".join(one.path for one in (embedding, head) if one is not None)
        refuse(where, "mlx-lm", [f"{ends}: the model ties them, and mlx-lm has one update for both"])
    return [one for one in factors if one is not head]


def _tied(factors: Iterable[Factors], model: nn.Module | None, where: Path) -> TextModel | None:
    """Returns the model where it ties its embeddings and that may matter."""
    if not any(one.kind == "embedding" or (model is not None and one.path.endswith("lm_head")) for one in factors):
        return None
    text = text_model(model, where, "whether the output layer shares the embedding's weight")
    return text if text.tied else None


def _mirrored(one: Factors, path: str) -> Factors:
    return replace(one, path=path, a=one.b.t(), b=one.a.t(), kind="linear")


def _same(one: Factors | None, other: Factors | None) -> bool:
    if one is None or other is None or (one.a.dtype, one.b.dtype) != (other.a.dtype, other.b.dtype):
        return False
    return one.scaling == other.scaling and torch.equal(one.a, other.a) and torch.equal(one.b, other.b)
