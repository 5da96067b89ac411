"""Running a model the same way every time, and how far its outputs lie apart."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..snapshot import raw

HUGE = 1e8
"""Outputs beyond this are masks, not numbers."""


class Failure(Exception):
    """A promise that does not hold: the step, and what is wrong."""

    def __init__(self, step: str, what: str) -> None:
        super().__init__(f"{step}: {what}")
        self.step = step
        self.what = what


def check(step: str, holds: bool, what: str) -> None:
    """Raises Failure unless the promise holds."""
    if not holds:
        raise Failure(step, what)


def tensors(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Returns every tensor in an output, however it is nested; caches are objects with tensors in them."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return [value]
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type(None), nn.Module, type)):
        return []
    seen.add(id(value))
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (list, tuple)):
        items = list(value)
    else:
        items = list(getattr(value, "__dict__", {}).values())
    return [tensor for item in items for tensor in tensors(item, seen)]


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Runs the model, with the same random numbers every time, on copies of the inputs."""
    torch.manual_seed(0)
    return tensors(model(**copy.deepcopy(dict(inputs))))


def run(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Returns the outputs without gradients."""
    with torch.no_grad():
        return [tensor.clone() for tensor in forward(model, inputs)]


def run_backward(
    model: nn.Module, wanted: list[Any], inputs: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Returns the outputs, and the gradients of a fixed random projection of them."""
    with torch.enable_grad():
        outputs = forward(model, inputs)
        generator = torch.Generator().manual_seed(3)
        total: Any = 0.0
        for output in outputs:
            if output.is_floating_point() and output.requires_grad:
                weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
                total = total + (usable(output.double()) * weights).sum()
        if isinstance(total, float):
            raise Failure("base", "no output depends on the weights in a differentiable way")
        gradients = collected(total, model, wanted)
    return [output.detach() for output in outputs], gradients


def collected(total: Tensor, model: nn.Module, wanted: list[Any]) -> list[Tensor | None]:
    """Returns what `backward` leaves in `.grad`, as a training loop reads it, and clears it.

    `torch.autograd.grad` does not see what a backward pass of a model's own gives to its parameters (Reformer).
    """
    for leaf in wanted:
        leaf.grad = None
    total.backward()
    gradients = [leaf.grad for leaf in wanted]
    for leaf in (*wanted, *model.parameters()):
        leaf.grad = None
    return gradients


def usable(tensor: Tensor) -> Tensor:
    """Returns the tensor with masked-out scores (infinite, or near the largest number of a dtype) set to zero."""
    return torch.where(torch.isfinite(tensor) & (tensor.abs() < HUGE), tensor, torch.zeros_like(tensor))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Says whether two lists of outputs have the same bits."""
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and raw(a) == raw(b) for a, b in zip(one, other, strict=True)
    )


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Returns the largest difference of two elements, relative to the largest element of that output."""
    worst = 0.0
    if [a.shape for a in one] != [b.shape for b in other]:
        return float("inf")
    for a, b in zip(one, other, strict=True):
        if a.is_floating_point() and a.numel():
            a, b = usable(a.double()), usable(b.double())
            scale = float(a.abs().max()) or 1.0
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def largest(tensor: Tensor) -> float:
    """Returns the largest absolute value, zero for an empty tensor."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0
