"""One autograd function for a linear layer with its low-rank paths: no extra output, no extra copy of the input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

Factors = Sequence[Tensor]
"""A and B of each adapter, one after the other: A (rank, in), B (out, rank) for nn.Linear."""


_PLAIN = (Tensor, torch.nn.Parameter)
_HALF = (torch.bfloat16, torch.float16)
_HALF_OR_SINGLE = (torch.float32, *_HALF)


def can_fuse(x: Any, weight: Any, bias: Any) -> bool:
    """Says whether the fused path computes what the plain one does: plain tensors, one dtype, no transform around.

    The compiler fuses the plain path by itself; functorch's transforms and forward-mode derivatives need its parts.
    """
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or torch.compiler.is_compiling():
        return False
    if x.is_meta:
        # Unknown to autocast, and there is nothing to be fast about.
        return False
    if _under_autocast(x):
        if x.dtype not in _HALF_OR_SINGLE:
            return False
    elif x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        # The base's own error is wanted.
        return False
    # No shape can be inferred from no numbers.
    return weight.numel() > 0 and torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def _under_autocast(x: Tensor) -> bool:
    # Asked first for any device, because naming the tensor's takes longer than all else here.
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: tuple[float, ...],
    factors: Factors,
    *,
    transposed: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Returns x W^T + b + sum of scale * (x A^T) B^T, accumulated in one output.

    Args:
        x: input (..., in) in the dtype of the arithmetic; A and B are cast to it.
        weight: W (out, in), or (in, out) if transposed.
        bias: b (out), or None.
        scales: one factor per adapter.
        factors: A (rank, in) and B (out, rank) per adapter; if transposed B (in, rank) and A (rank, out) in that
            order, the one that the input meets first.
        transposed: whether the layer is a transposed one, y = x W + b.
        dropout: probability with which an input element is dropped before the low-rank path; one adapter only.
    """
    if _under_autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return fused_linear(x.to(dtype), weight, bias, scales, factors, transposed=transposed, dropout=dropout)
    # Drawn from the CPU's generator, whose state gradient checkpointing puts back before it computes again.
    seed = int(torch.randint(2**62, ()).item()) if dropout else None
    if torch.is_grad_enabled():
        found: Tensor = _Fused.apply(x, weight, bias, scales, transposed, dropout, seed, *factors)[0]  # type: ignore[no-untyped-call]
        return found
    return _output(x, weight, bias, scales, transposed, dropout, seed, factors)[0]


def _output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: tuple[float, ...],
    transposed: bool,
    dropout: float,
    seed: int | None,
    factors: Factors,
) -> tuple[Tensor, Tensor]:
    """Returns the output and the rank-sized product, not scaled, (tokens, rank) or (rank) for one token."""
    weight = _cast(weight, x.dtype)
    bias = None if bias is None else _cast(bias, x.dtype)
    if transposed:
        flat = x.reshape(-1, x.shape[-1])
        output = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        output = output.view(*x.shape[:-1], -1)
    else:
        # In the input's own shape, by which torch picks the kernel: the base's bits must be the base's.
        output = F.linear(x, weight, bias)
    first, second = _stack(factors, _low_rank_dtype(x), transposed)
    if len(scales) == 1 and seed is None and x.numel() == x.shape[-1]:
        # One token is a vector, for which there are faster kernels.
        inner = torch.mv(first, _cast(x.view(-1), first.dtype))
        if output.dtype == inner.dtype:
            output.view(-1).addmv_(second, inner, alpha=scales[0])
        else:
            output.view(-1).add_(torch.mv(second, inner), alpha=scales[0])
        return output, inner
    flat = x.reshape(-1, x.shape[-1])
    met = (
        _cast(flat, first.dtype)
        if seed is None
        else _keep(flat, _mask(flat.shape, flat.device, first.dtype, dropout, seed))
    )
    inner = F.linear(met, first)
    rows = output.view(-1, output.shape[-1])
    if len(scales) == 1:
        # The one factor comes for free with the product.
        _add_product(rows, inner, second.t(), scales[0] / (1 - dropout))
    else:
        _add_product(rows, _scale(inner, scales, factors, transposed, dropout), second.t())
    return output, inner


def _add_product(output: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Adds scale * left @ right to the output in place, rounded to its dtype once more where theirs is wider."""
    if output.dtype == left.dtype:
        return output.addmm_(left, right, alpha=scale)
    return output.add_(left @ right, alpha=scale)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the tensor in the dtype; asking first is much cheaper than a call that has nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _low_rank_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of the low-rank products: the input's, unless the CPU would only emulate it."""
    return torch.float32 if x.dtype in _HALF and x.device.type == "cpu" and _is_emulated(x.dtype) else x.dtype


@lru_cache
def _is_emulated(dtype: torch.dtype) -> bool:
    """Says whether this CPU multiplies matrices of the dtype element by element, many times slower than float32."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and not supported[dtype]()


def _stack(factors: Factors, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor]:
    """Returns all first factors as (summed rank, in) and all second ones as (out, summed rank)."""
    ordered = [_cast(factor.t() if transposed else factor, dtype) for factor in factors]
    if len(ordered) == 2:
        return ordered[0], ordered[1]
    return torch.cat(ordered[0::2]), torch.cat(ordered[1::2], dim=1)


def _ranks(factors: Factors, transposed: bool) -> list[int]:
    return [factor.shape[1 if transposed else 0] for factor in factors[0::2]]


def _scale(inner: Tensor, scales: tuple[float, ...], factors: Factors, transposed: bool, dropout: float) -> Tensor:
    """Returns the rank-sized product times each adapter's scale, and what dropout takes from the mean."""
    if len(scales) == 1:
        return inner * (scales[0] / (1 - dropout))
    parts = torch.split(inner, _ranks(factors, transposed), dim=1)
    return torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)], dim=1)


def _mask(shape: torch.Size, device: torch.device, dtype: torch.dtype, dropout: float, seed: int) -> Tensor:
    """Returns 1 for elements that stay and 0 for others, drawn from the seed; shape (tokens, features).

    An element's random number is a byte of its own, eight from one draw, and a fraction that it shares with its
    feature's other tokens: together uniform in [0, 256), so that it is dropped with the asked probability exactly,
    at half the cost of sixteen bits each. The covariance of two tokens that the shared fraction makes is below 4e-6.
    Not truth values, because a product with such a mask takes several times as long on a CPU.
    """
    generator = torch.Generator(device).manual_seed(seed)
    draws = torch.empty((shape.numel() + 7) // 8, dtype=torch.int64, device=device)
    draws.random_(-(2**63), None, generator=generator)
    fractions = torch.rand(shape[-1], device=device, generator=generator)
    # Comparing float32 in place is the fastest there is.
    return draws.view(torch.uint8)[: shape.numel()].view(shape).float().ge_(256 * dropout - fractions).to(dtype)


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    """Returns x times the mask, in the memory of the mask unless that may be wanted for a second derivative."""
    return x * mask if torch.is_grad_enabled() else mask.mul_(x)


class _Fused(torch.autograd.Function):
    """Saves x, W, A and B; the rank-sized product and the dropout mask are made again on the way back.

    Where neither W nor the factor that the input meets first is trained, nothing needs x: the rank-sized product is
    saved in its place (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303). With dropout it is saved beside x, being much
    smaller and slow to make again. It is a second output then, so that a second derivative finds its way through it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scales: tuple[float, ...],
        transposed: bool,
        dropout: float,
        seed: int | None,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        wants = ctx.needs_input_grad
        narrow = not wants[1] and not any(wants[7::2])
        # A view made in here could not be changed in place outside, as models do with `hidden += residual`.
        output, inner = (t.detach() for t in _output(x, weight, bias, scales, transposed, dropout, seed, factors))
        inner = inner.view(-1, inner.shape[-1])
        saved = inner if narrow or seed is not None else None
        ctx.save_for_backward(None if narrow else x, saved, weight, *factors)
        ctx.narrow, ctx.shape, ctx.dtype, ctx.low = narrow, x.shape, x.dtype, _low_rank_dtype(x)
        ctx.options = scales, transposed, dropout, seed
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output, saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, inner, weight, *factors = ctx.saved_tensors
        scales, transposed, dropout, seed = ctx.options
        wants = ctx.needs_input_grad
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        first, second = _stack(factors, ctx.low, transposed)
        low_grad = _cast(grad, ctx.low)
        inner_grad = _scale(low_grad @ second, scales, factors, transposed, dropout)
        if inner is not None:
            inner_grad = inner_grad + grads[1]
        flat: Any = None if x is None else x.reshape(-1, x.shape[-1])
        mask = None
        if seed is not None and (wants[0] or not ctx.narrow):
            mask = _mask(torch.Size((len(grad), ctx.shape[-1])), grad.device, ctx.low, dropout, seed)
        x_grad = weight_grad = None
        if wants[0]:
            x_grad = grad @ _cast(weight.t() if transposed else weight, ctx.dtype)
            if mask is None:
                x_grad = _add_product(x_grad, inner_grad, first)
            else:
                x_grad = x_grad.addcmul_(inner_grad @ first, mask)
            x_grad = x_grad.view(ctx.shape)
        if wants[1]:
            weight_grad = (flat.t() @ grad if transposed else grad.t() @ flat).to(weight.dtype)
        bias_grad = grad.sum(0).to(ctx.bias_dtype) if wants[2] else None
        factor_grads: list[Tensor | None] = [None] * len(factors)
        if any(wants[7:]):
            first_grad = None
            if not ctx.narrow:
                met = _cast(flat, ctx.low) if mask is None else _keep(flat, mask)
                first_grad = inner_grad.t() @ met
                inner = met @ first.t() if inner is None else inner
            second_grad = low_grad.t() @ _scale(inner, scales, factors, transposed, dropout)
            factor_grads = _split(first_grad, second_grad, factors, transposed)
        return (x_grad, weight_grad, bias_grad, None, None, None, None, *factor_grads)


def _split(first: Tensor | None, second: Tensor, factors: Factors, transposed: bool) -> list[Tensor | None]:
    """Returns the gradients of the stacked factors as each adapter's own, in its dtype; None where there is none."""
    ranks = _ranks(factors, transposed)
    firsts = [None] * len(ranks) if first is None else torch.split(first, ranks)
    gradients = [gradient for pair in zip(firsts, torch.split(second, ranks, dim=1), strict=True) for gradient in pair]
    return [
        None if gradient is None else _cast(gradient.t() if transposed else gradient, factor.dtype)
        for gradient, factor in zip(gradients, factors, strict=True)
    ]
