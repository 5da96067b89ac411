"""Dropout of the low-rank path's input: drawn in bytes, kept for the backward pass in bits."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def draw(x: Tensor, rate: float) -> Tensor:
    """Returns a mask for `kept`: 1 for elements of x that stay, 0 for those that are dropped, uint8 in eight rows.

    Drawn from the default generator of x's device, whose state gradient checkpointing puts back. An element's random
    number is a byte of its own, eight from one draw; the byte below which it is dropped is one of two neighbours, drawn
    for all tokens of a feature. So the rate is the asked one exactly, at half the cost of sixteen bits each. The
    covariance of two tokens that the shared bound makes is below 4e-6.

    Args:
        x: input (tokens, features).
        rate: probability with which an element is dropped, in [0, 1).
    """
    draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    mask = draws.view(torch.uint8)
    whole = int(256 * rate)
    raised = torch.empty(x.shape[-1], dtype=torch.uint8, device=x.device).bernoulli_(256 * rate - whole)
    keep = _shaped(mask, x)
    if whole < 255:
        keep.ge_(raised.add_(whole))
    else:
        # A bound of 256 is above every byte, but no byte itself.
        keep.ge_(255).mul_(1 - raised)
    return mask.view(8, -1)


def packed(mask: Tensor) -> Tensor:
    """Returns a mask with its eight rows in the bits of one."""
    return (mask << _shifts(mask)).sum(0, dtype=torch.uint8)


def unpacked(bits: Tensor) -> Tensor:
    """Returns the mask that was packed."""
    return (bits >> _shifts(bits)).bitwise_and_(1)


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device).view(8, 1)


def kept(x: Tensor, mask: Tensor) -> Tensor:
    """Returns x where the mask is 1, and 0 where it is 0."""
    keep = _shaped(mask.view(-1), x)
    if torch.is_grad_enabled():
        # A derivative of the backward pass is wanted.
        return x * keep.to(x.dtype)
    # Integers are what a CPU multiplies fastest.
    integers = _INTEGERS[x.dtype.itemsize]
    return keep.to(integers).mul_(x.view(integers)).view(x.dtype)


def _shaped(mask: Tensor, x: Tensor) -> Tensor:
    return mask[: x.numel()].view(x.shape)
