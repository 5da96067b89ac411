"""Models with one kind of layer each, their inputs, and what PEFT and lora_inject are asked to adapt in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_inject as li


class Around(nn.Module):
    """One layer under the name "block.layer", as PEFT cannot wrap the model itself, and a norm with a head."""

    def __init__(self, layer: nn.Module, width: int, call: Callable[[nn.Module, Any], torch.Tensor]):
        super().__init__()
        self.block = nn.Module()
        self.block.layer = layer
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)
        self.call = call

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.call(self.block.layer, x))))


class Experts(nn.Module):
    """Packed experts in transformers' two layouts; every token meets all of them."""

    def __init__(self, count: int, width: int, inner: int, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        up, down = (count, width, inner), (count, inner, width)
        self.gate_up_proj = nn.Parameter(torch.randn(up if transposed else (count, inner, width)))
        self.down_proj = nn.Parameter(torch.randn(down if transposed else (count, width, inner)))

    def forward(self, x):
        up, down = (self.gate_up_proj, self.down_proj)
        if not self.is_transposed:
            up, down = up.mT, down.mT
        return torch.einsum("bei,eio->bo", torch.tanh(torch.einsum("bi,eio->beo", x, up)), down)


def called(layer, x):
    return layer(x)


def attended(layer, x):
    return layer(x, x, x, need_weights=False)[0]


def pooled(layer, x):
    return layer(x).flatten(2).mean(2)


@dataclass
class Case:
    """How to build a model, what to give it, and what both libraries adapt."""

    build: Callable[[], nn.Module]
    give: Callable[[], torch.Tensor]
    targets: list[Any] = field(default_factory=lambda: ["block.layer"])
    options: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["layer"]})


def rows() -> torch.Tensor:
    return torch.randn(4, 6)


def linear(bias: bool = True) -> nn.Module:
    return Around(nn.Linear(6, 5, bias=bias), 5, called)


def experts(transposed: bool, inner: int = 5, count: int = 3) -> Callable[[], nn.Module]:
    return lambda: Around(Experts(count, 6, inner, transposed), 6, called)


EXPERTS = {
    "targets": ["block.layer.*"],
    "peft": {"target_modules": [], "target_parameters": ["layer.gate_up_proj", "layer.down_proj"]},
}
HEAD = li.Target("head.*", adapter="full")
CASES = {
    "linear": Case(linear, rows),
    "linear-rslora": Case(
        linear, rows, options={"rslora": True}, peft={"target_modules": ["layer"], "use_rslora": True}
    ),
    "linear-bias": Case(linear, rows, options={"bias": True}, peft={"target_modules": ["layer"], "lora_bias": True}),
    "linear-dense": Case(linear, rows, options={"rank": 5, "dense": True}),
    "conv1d": Case(
        lambda: Around(Conv1D(5, 6), 5, called), rows, peft={"target_modules": ["layer"], "fan_in_fan_out": True}
    ),
    "conv-1": Case(lambda: Around(nn.Conv1d(2, 5, 3, padding=1), 5, pooled), lambda: torch.randn(2, 2, 7)),
    "conv-2": Case(lambda: Around(nn.Conv2d(2, 5, (3, 2), stride=2), 5, pooled), lambda: torch.randn(2, 2, 7, 6)),
    "conv-2-balanced": Case(
        lambda: Around(nn.Conv2d(2, 5, (3, 2), padding=1), 5, pooled),
        lambda: torch.randn(2, 2, 7, 6),
        options={"factorization": "balanced"},
    ),
    "conv-2-bias": Case(
        lambda: Around(nn.Conv2d(2, 5, 3), 5, pooled),
        lambda: torch.randn(2, 2, 7, 6),
        options={"bias": True},
        peft={"target_modules": ["layer"], "lora_bias": True},
    ),
    "conv-3": Case(lambda: Around(nn.Conv3d(2, 5, 2), 5, pooled), lambda: torch.randn(2, 2, 4, 3, 3)),
    "embedding": Case(lambda: Around(nn.Embedding(9, 5), 5, called), lambda: torch.arange(9)),
    "embedding-padding": Case(lambda: Around(nn.Embedding(9, 5, padding_idx=2), 5, called), lambda: torch.arange(9)),
    "attention": Case(
        lambda: Around(nn.MultiheadAttention(6, 2, batch_first=True), 6, attended), lambda: torch.randn(2, 4, 6)
    ),
    "experts": Case(experts(False), rows, **EXPERTS),
    "experts-square": Case(experts(False, inner=6), rows, **EXPERTS),
    "experts-transposed": Case(experts(True), rows, **EXPERTS),
    "experts-transposed-square": Case(experts(True, inner=6), rows, **EXPERTS),
    "experts-single": Case(experts(False, count=1), rows, **EXPERTS),
    "head": Case(linear, rows, ["block.layer", HEAD], peft={"target_modules": ["layer"], "modules_to_save": ["head"]}),
    "biases": Case(
        linear,
        rows,
        ["block.layer", li.Target("re:.*[.]bias", adapter="full")],
        peft={"target_modules": ["layer"], "bias": "all"},
    ),
    "own-bias": Case(
        linear,
        rows,
        ["block.layer", li.Target("block.layer.bias", adapter="full")],
        peft={"target_modules": ["layer"], "bias": "lora_only"},
    ),
}
