"""Adapter for `nn.EmbeddingBag`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..host import base_class
from ..registry import register
from .embedding import EmbeddingAdapter


@register
class EmbeddingBagAdapter(EmbeddingAdapter):
    """y = bag(W) + scaling * bag(B) A over the rows of each bag: B (num_embeddings, rank), A (rank, embedding_dim).

    Sums and means are linear, so the bag is formed over the small rows of B; a maximum is not, and reads W + delta.
    """

    kind = "embedding_bag"
    portable = False

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """`nn.EmbeddingBag` and subclasses."""
        return isinstance(module, nn.EmbeddingBag)

    @classmethod
    def knows_forward(cls, module: nn.Module) -> bool:
        """True for sums and means with torch's own forward."""
        own = base_class(module).forward  # type: ignore[attr-defined]
        plain = "weight" in module._parameters and own is nn.EmbeddingBag.forward
        return plain and getattr(module, "mode", "max") != "max"

    @staticmethod
    def base_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        """The bags of W."""
        return _bags(host, host._parameters["weight"], *args, **kwargs)

    def update(self, host: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Adds scaling times the bags of B A, and of the biases' rows."""
        weights = _weights(*args, **kwargs)
        if self.is_dense:
            rows = self.drop(_bags(host, _like(self.lora_dense, weights), *args, **kwargs).to(output.dtype))
        else:
            inner = _bags(host, _like(self.lora_B, weights), *args, **kwargs)
            rows = self.drop(inner.to(output.dtype)) @ self.lora_A.to(output.dtype)
        shift = self.row_shift()
        if shift is not None:
            ones = torch.ones(host.num_embeddings, 1, dtype=output.dtype, device=output.device)
            rows = rows + _bags(host, _like(ones, weights), *args, **kwargs).to(output.dtype) * shift.to(output.dtype)
        return output + rows * self.strength


def _weights(input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor | None:
    return per_sample_weights


def _like(table: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the table in the dtype that torch demands: that of the per-sample weights, where there are any."""
    return table if weights is None else table.to(weights.dtype)


def _bags(
    host: Any,
    table: Tensor,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    return F.embedding_bag(
        input,
        table,
        offsets,
        None,
        2.0,
        host.scale_grad_by_freq,
        host.mode,
        host.sparse,
        per_sample_weights,
        host.include_last_offset,
        host.padding_idx,
    )
