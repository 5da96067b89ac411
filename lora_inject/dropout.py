"""Dropout of the low-rank path's input: drawn in bytes, kept for the backward pass in bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def draw(x: Tensor, rate: float) -> Tensor:
    """Returns which elements of x stay (1) and which are dropped (0): uint8 in eight rows, one after the other.

    Up to seven further numbers at the end mean nothing. Drawn from the default generator of x's device, whose state
    gradient checkpointing puts back. An element's random number is a byte of its own, eight from one draw; the byte
    below which it is dropped is one of two neighbours, drawn for all tokens of a feature. So the rate is the asked one
    exactly, at half the cost of sixteen bits each. The covariance of two tokens that the shared bound makes is below
    4e-6.

    Args:
        x: input (tokens, features).
        rate: probability with which an element is dropped, in [0, 1).
    """
    draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    rows = draws.view(torch.uint8).view(8, -1)
    stays = _shaped(rows, x.shape)
    whole = int(256 * rate)
    raised = torch.empty(x.shape[-1], dtype=torch.uint8, device=x.device).bernoulli_(256 * rate - whole)
    if whole < 255:
        stays.ge_(raised.add_(whole))
    else:
        # A bound of 256 is above every byte, but no byte itself.
        stays.ge_(255).mul_(1 - raised)
    return rows


def pack(rows: Tensor) -> Tensor:
    """Returns the eight rows in the bits of one."""
    # What means nothing lies in higher rows than all else in its column, and a sum carries upwards only.
    return (rows << _shifts(rows)).sum(0, dtype=torch.uint8)


def mask_of(rows: Tensor, x: Tensor) -> Tensor:
    """Returns eight rows as a mask for `keep`, of x's shape."""
    return _shaped(rows, x.shape).to(_INTEGERS[x.dtype.itemsize])


def unpack(bits: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """Returns packed rows as a mask for `keep`, for numbers of that dtype and shape."""
    wide = bits.to(_INTEGERS[dtype.itemsize])
    return _shaped((wide >> _shifts(wide)).bitwise_and_(1), shape)


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=like.dtype, device=like.device).view(8, 1)


def _shaped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rows.view(-1)[: math.prod(shape)].view(shape)


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """Returns x where the mask is 1, and 0 where it is 0, whatever x is there; takes the mask's memory for it."""
    if _needs_parts(x):
        return torch.where(mask.bool(), x, 0)
    # Integers are what a CPU multiplies fastest.
    return mask.mul_(x.resolve_neg().view(mask.dtype)).view(x.dtype)


def keep_(x: Tensor, mask: Tensor) -> Tensor:
    """Returns what `keep` does, in x's memory where that can be; the mask stays."""
    if _needs_parts(x):
        return torch.where(mask.bool(), x, 0)
    x.view(mask.dtype).mul_(mask)
    return x


def _needs_parts(x: Tensor) -> bool:
    """Says whether a derivative of the backward pass is wanted, or many passes run at once."""
    return torch.is_grad_enabled() or _is_batched(x)


def _is_batched(x: Tensor) -> bool:
    """Says whether vmap runs: that of torch.func, or that of `autograd.grad(is_grads_batched=True)`."""
    functorch = torch._C._functorch
    return functorch.peek_interpreter_stack() is not None or functorch.is_legacy_batchedtensor(x)
