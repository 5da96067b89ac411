"""The rows of parameters that are trained as a whole: weights of norms, biases, stacks, tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from variant import Variant


class Gains(nn.Module):
    """A module that reads a vector of its own, which is shorter than any matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,i->ni", x, self.gain)


def _full(name: str, make: Callable[[], nn.Module], parameter: str, x: Callable[[], Any], **more: Any) -> Variant:
    return Variant("full", name, make, x, target={"adapter": "full"}, parameter=parameter, **more)


def _rows() -> Tensor:
    return torch.randn(4, 6)


def _index() -> Tensor:
    return torch.tensor([[0, 3, 1], [2, 2, 4]])


def _image() -> Tensor:
    return torch.randn(2, 4, 5, 5)


FULL = [
    _full("vector", Gains, "gain", _rows),
    _full("vector-rslora", Gains, "gain", _rows, options={"rslora": True}),
    _full("norm-weight", lambda: nn.LayerNorm(6), "weight", _rows, linear=False),
    _full("norm-bias", lambda: nn.LayerNorm(6), "bias", _rows, linear=False),
    _full("linear-weight", lambda: nn.Linear(6, 5), "weight", _rows),
    _full("linear-bias", lambda: nn.Linear(6, 5), "bias", _rows),
    _full("conv-weight", lambda: nn.Conv2d(4, 3, 3, padding=1), "weight", _image),
    _full("embedding-weight", lambda: nn.Embedding(5, 6), "weight", _index),
]
