"""A layer whose update has a known size relative to its weight."""

from __future__ import annotations

import torch
from snapshot import raw
from torch import nn

import lora_inject as li


def layer(base=torch.float32, size=64, relative=0.03, rank=8, seed=5, **options) -> nn.Module:
    """Returns a linear layer with an adapter whose update has the given norm relative to the weight's."""
    torch.manual_seed(seed)
    made = nn.Linear(size, size, bias=False)
    nn.init.normal_(made.weight, std=0.02)
    made.to(base)
    li.inject(made, "", rank=rank, **options)
    scale_to(made, relative)
    return made


@torch.no_grad()
def scale_to(made: nn.Module, relative: float) -> None:
    adapter = made.adapters["default"]
    adapter.lora_A.normal_()
    adapter.lora_B.normal_()
    norm = (adapter.lora_B.double() @ adapter.lora_A.double()).norm()
    adapter.lora_B.mul_(relative * made._parameters["weight"].double().norm() / norm)


def original(made: nn.Module) -> bytes:
    return raw(made._parameters["weight"])
