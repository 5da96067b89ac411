"""Adapter for `nn.Embedding`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Layout
from ..config import SiteConfig
from ..errors import UnsupportedError
from ..factored import ALL, FactoredAdapter
from ..host import base_class
from ..registry import register
from ..rows import wide


@register
class EmbeddingAdapter(FactoredAdapter):
    """y = W[i] + scaling * B[i] A: B (num_embeddings, rank), A (rank, embedding_dim).

    The padding row takes no part: neither is its row of B trained, nor its row of W ever changed. With `bias=True`
    every other row gets scaling * ((B[i] + b) A + a): `lora_B_bias` b (rank), `lora_A_bias` a (embedding_dim); an
    embedding has no bias of its own, so they are merged into its rows.
    """

    kind = "embedding"
    transposed = True
    updates: tuple[str, ...] = ("weight",)

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """Every `nn.Embedding` and subclass."""
        return isinstance(module, nn.Embedding)

    @classmethod
    def knows_forward(cls, module: nn.Module) -> bool:
        """True where neither the forward nor the access to the weight is a subclass's own."""
        own = base_class(module).forward  # type: ignore[attr-defined]
        return "weight" in module._parameters and own is nn.Embedding.forward

    @classmethod
    def layout(cls, module: nn.Module, config: SiteConfig, extras: Mapping[str, Any]) -> Layout:
        """Returns the shapes of the factors.

        Raises:
            UnsupportedError: the embedding has `max_norm`, which rewrites rows of the base in every forward.
        """
        if module.max_norm is not None:
            raise UnsupportedError(
                f"max_norm={module.max_norm} makes torch rewrite rows of the weight in every forward, so the base "
                "could not be kept: set module.max_norm = None, or exclude the embedding"
            )
        return super().layout(module, config, extras)

    @classmethod
    def factors(cls, config: SiteConfig, weight: tuple[int, ...]) -> Layout:
        """A (rank, embedding_dim), B (num_embeddings, rank)."""
        rows, columns = weight
        return {
            "lora_A": (config.rank, columns),
            "lora_B": (rows, config.rank),
            "lora_B_bias": (config.rank,),
            "lora_A_bias": (columns,),
        }

    @classmethod
    def needs_host(cls, config: SiteConfig) -> bool:
        """True with biases, which every row but the padding row gets; without, that row of B is zero."""
        return config.bias

    @staticmethod
    def base_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        """W[i]."""
        return _lookup(host, host._parameters["weight"], *args, **kwargs)

    def update(self, host: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Adds scaling * B[i] A, looked up before any cast so that no table is copied."""
        index = args[0] if args else next(iter(kwargs.values()))
        if self.is_dense:
            rows = self.drop(_lookup(host, self.lora_dense, index).to(output.dtype))
        else:
            inner = self.drop(_lookup(host, self.lora_B, index).to(output.dtype))
            rows = inner @ self.lora_A.to(output.dtype)
        shift = self.row_shift()
        if shift is not None:
            rows = rows + shift.to(output.dtype)
        padding = self._fixed_row(host)
        if padding is not None:
            rows = rows.masked_fill((index == padding).unsqueeze(-1), 0)
        return output + rows * self.strength

    def _fixed_row(self, host: Any) -> int | None:
        """Returns the row that takes no part; with a pair that a tied head trains too, every row does."""
        found: int | None = None if self.shared and not self.config.bias else host.padding_idx
        return found

    def row_shift(self) -> Tensor | None:
        """Returns what every row gets from the biases before scaling, b A + a, or None without biases."""
        shift = self._parameters.get("lora_A_bias")
        inner = self._parameters.get("lora_B_bias")
        if inner is None:
            return shift
        assert shift is not None
        return wide(inner) @ wide(self.lora_A) + wide(shift)

    def unfold(self, host: Any, matrix: Tensor, rows: slice = ALL) -> Tensor:
        """Returns the rows with the biases' part added and the padding row zero."""
        shift = self.row_shift()
        matrix = matrix if shift is None else matrix + shift * self.scaling
        padding = self._fixed_row(host)
        if padding is None or not 0 <= padding - (rows.start or 0) < matrix.shape[0]:
            return matrix
        mask = matrix.new_ones(matrix.shape[0], 1)
        mask[padding - (rows.start or 0)] = 0
        return matrix * mask


def _lookup(host: Any, table: Any, input: Tensor) -> Tensor:
    return F.embedding(input, table, host.padding_idx, None, 2.0, host.scale_grad_by_freq, host.sparse)
