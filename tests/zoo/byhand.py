"""What an adapted model must compute, without lora_inject: W + delta written into the parameters of a copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_inject as li
from lora_inject.host import base_tensor


class Plus(nn.Module):
    """Adds a delta to a weight that is computed anew before every use."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(delta)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


@dataclass
class Reference:
    """A copy of the base with W + delta in its parameters, and those parameters by site."""

    model: nn.Module
    leaves: dict[tuple[str, str], Tensor]


@torch.no_grad()
def by_hand(base: nn.Module, adapted: nn.Module) -> Reference:
    """Returns a copy of the base into which the delta of every adapter is written, shared weights apart."""
    made = copy.deepcopy(base)
    leaves: dict[tuple[str, str], Tensor] = {}
    for ref in li.adapters(adapted):
        module = made.get_submodule(ref.host_path)
        for name, delta in ref.adapter.delta(ref.module).items():
            leaves[ref.path, name] = add(module, name, delta.detach())
    return Reference(made, leaves)


def add(module: nn.Module, name: str, delta: Tensor) -> Tensor:
    """Adds a delta to a parameter, and returns the leaf whose gradient is that of the sum."""
    weight = module._parameters.get(name)
    if weight is not None:
        setattr(module, name, nn.Parameter(weight + delta.to(weight.dtype)))
        return module._parameters[name]  # type: ignore[return-value]
    if parametrize.is_parametrized(module, name):
        plus = Plus(delta.to(getattr(module, name).dtype))
        parametrize.register_parametrization(module, name, plus)
        return plus.delta
    leaf = delta.to(base_tensor(module, name).dtype).requires_grad_()
    module.register_forward_pre_hook(lambda m, _: setattr(m, name, getattr(m, name) + leaf))
    return leaf


@torch.no_grad()
def jiggle(reference: Reference) -> nn.Module:
    """Returns the model of the reference with every weight changed in its last bit."""
    generator = torch.Generator().manual_seed(4)
    for parameter in reference.model.parameters():
        if parameter.is_floating_point():
            eps = torch.finfo(parameter.dtype).eps
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + eps * sign.to(parameter.dtype))
    return reference.model


def carry(
    model: nn.Module, leaves: Mapping[tuple[str, str], Tensor], gradients: list[Tensor | None]
) -> dict[tuple[str, str], list[Tensor]]:
    """Returns the gradients of A and B of every adapter that follow from those of the sums W + delta."""
    by_leaf = dict(zip(leaves, gradients, strict=True))
    found = {}
    for ref in li.adapters(model):
        factors = list(ref.adapter.parameters())
        with torch.enable_grad():
            parts = [
                (delta.double() * grad.double()).sum()
                for name, delta in ref.adapter.delta(ref.module).items()
                if (grad := by_leaf[ref.path, name]) is not None
            ]
            total = sum(parts) if parts else None
            made = torch.autograd.grad(total, factors, allow_unused=True) if parts else [None] * len(factors)
        pairs = zip(factors, made, strict=True)
        found[ref.path, ref.name] = [torch.zeros_like(p) if g is None else g for p, g in pairs]
    return found
