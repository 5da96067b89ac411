"""One autograd function for a linear layer with its low-rank paths: no extra output, no extra copy of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .dropout import draw, kept, packed, unpacked

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
    if torch.is_grad_enabled():
        found: Tensor = _Fused.apply(x, weight, bias, scales, transposed, dropout, *factors)[0]  # type: ignore[no-untyped-call]
        return found
    return _output(x, weight, bias, scales, transposed, dropout, factors)[0]


def _output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: tuple[float, ...],
    transposed: bool,
    dropout: float,
    factors: Factors,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the output, the rank-sized product, not scaled, (tokens, rank), and the mask of the dropout, if any."""
    weight = _cast(weight, x.dtype)
    bias = None if bias is None else _cast(bias, x.dtype)
    if transposed:
        flat = x.reshape(-1, x.shape[-1])
        output = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        output = output.view(*x.shape[:-1], -1)
    else:
        # In the input's own shape, by which torch picks the kernel: the base's bits must be the base's.
        output = F.linear(x, weight, bias)
    if x.numel() == x.shape[-1] and len(scales) == 1 and not dropout:
        return output, _add_to_one(output, x, scales[0], factors, transposed), None
    first, second = _stack(factors, _low_rank_dtype(x), transposed)
    flat = x.reshape(-1, x.shape[-1])
    mask = draw(flat, dropout) if dropout else None
    inner = F.linear(_met(flat, mask, first.dtype), first)
    rows = output.view(-1, output.shape[-1])
    if len(scales) == 1:
        # The one factor comes for free with the product.
        _add_product(rows, inner, second.t(), scales[0] / (1 - dropout))
    else:
        _add_product(rows, _scale(inner, scales, factors, transposed, dropout), second.t())
    return output, inner, mask


def _add_to_one(output: Tensor, x: Tensor, scale: float, factors: Factors, transposed: bool) -> Tensor:
    """Adds the low-rank path to the output of one token and returns its rank-sized product.

    One token is a vector, for which there are faster kernels, and a smaller thing to cast than the factors.
    """
    first, second = (factor.t() for factor in factors) if transposed else factors
    if first.dtype.itemsize < x.dtype.itemsize or first.dtype != second.dtype:
        first, second = _stack(factors, x.dtype, transposed)
    inner = torch.mv(first, _cast(x.view(-1), first.dtype))
    if output.dtype == first.dtype:
        output.view(-1).addmv_(second, inner, alpha=scale)
    else:
        output.view(-1).add_(torch.mv(second, inner).to(output.dtype), alpha=scale)
    return inner.view(1, -1)


def _met(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns what the first factor meets, of an input (tokens, in)."""
    return _cast(x if mask is None else kept(x, mask), dtype)


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
    return torch.float32 if x.dtype in _HALF and x.is_cpu and _is_emulated(x.dtype) else x.dtype


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
        factor = scales[0] / (1 - dropout)
        return inner if factor == 1 else inner * factor
    parts = torch.split(inner, _ranks(factors, transposed), dim=1)
    return torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)], dim=1)


class _Fused(torch.autograd.Function):
    """Saves x, W, A and B; the rank-sized product is made again on the way back.

    With dropout the mask is saved in a bit for each element, and the rank-sized product too, being much smaller than x
    and slow to make again. Where neither W nor the factor that the input meets first is trained, nothing needs x: the
    rank-sized product is saved in its place (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303). A saved product is a second
    output, so that a second derivative finds its way through it.
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
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        wants = ctx.needs_input_grad
        narrow = not wants[1] and not any(wants[6::2])
        output, inner, mask = _output(x, weight, bias, scales, transposed, dropout, factors)
        saved = inner.detach() if narrow or mask is not None else None
        needed = mask is not None and (wants[0] or not narrow)
        ctx.save_for_backward(None if narrow else x, saved, packed(mask) if needed else None, weight, *factors)
        ctx.narrow, ctx.shape, ctx.dtype, ctx.low = narrow, x.shape, x.dtype, _low_rank_dtype(x)
        ctx.options = scales, transposed, dropout
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        # A view made in here could not be changed in place outside, as models do with `hidden += residual`.
        return output.detach(), saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, inner, bits, weight, *factors = ctx.saved_tensors
        scales, transposed, dropout = ctx.options
        wants = ctx.needs_input_grad
        outputs = weight.shape[1 if transposed else 0]
        if grads[0] is None:
            grad = weight.new_zeros((math.prod(ctx.shape[:-1]), outputs), dtype=ctx.dtype)
        else:
            grad = grads[0].reshape(-1, outputs)
        first, second = _stack(factors, ctx.low, transposed)
        low_grad = _cast(grad, ctx.low)
        inner_grad = _scale(low_grad @ second, scales, factors, transposed, dropout)
        if len(grads) > 1 and grads[1] is not None:
            inner_grad = inner_grad + _cast(grads[1], ctx.low)
        mask = None if bits is None else unpacked(bits)
        flat: Any = None if x is None else x.reshape(-1, x.shape[-1])
        factor_grads: list[Tensor | None] = [None] * len(factors)
        # The large product comes last, since it drives the gradient and the input out of the processor's caches.
        if any(wants[6:]):
            met = None if ctx.narrow else _met(flat, mask, ctx.low)
            if inner is None:
                inner = F.linear(met, first)
            inner = _scale(_cast(inner, ctx.low), scales, factors, transposed, dropout)
            second_grad = inner.t() @ low_grad
            first_grad = None if met is None else inner_grad.t() @ met
            factor_grads = _split(first_grad, second_grad, factors, transposed)
        x_grad = weight_grad = None
        if wants[0]:
            x_grad = grad @ _cast(weight.t() if transposed else weight, ctx.dtype)
            if mask is None:
                x_grad = _add_product(x_grad, inner_grad, first)
            else:
                x_grad = x_grad.add_(kept(inner_grad @ first, mask))
            x_grad = x_grad.view(ctx.shape)
        if wants[1]:
            weight_grad = (flat.t() @ grad if transposed else grad.t() @ flat).to(weight.dtype)
        bias_grad = grad.sum(0).to(ctx.bias_dtype) if wants[2] else None
        return (x_grad, weight_grad, bias_grad, None, None, None, *factor_grads)


def _split(first: Tensor | None, second: Tensor, factors: Factors, transposed: bool) -> list[Tensor | None]:
    """Returns the gradients of the stacked factors as each adapter's own, in its dtype; None where there is none.

    Args:
        first: gradient of the stacked first factors (summed rank, in), or None.
        second: gradient of the stacked second factors, transposed (summed rank, out).
        factors: A and B of each adapter.
        transposed: whether the layer is a transposed one.
    """
    gradients: list[Tensor | None] = [first, second]
    if len(factors) > 2:
        ranks = _ranks(factors, transposed)
        firsts = [None] * len(ranks) if first is None else torch.split(first, ranks)
        gradients = [one for pair in zip(firsts, torch.split(second, ranks), strict=True) for one in pair]
    turned = (transposed, not transposed) * (len(factors) // 2)
    return [
        None if gradient is None else _as_factor(gradient.t() if turn else gradient, factor.dtype)
        for gradient, turn, factor in zip(gradients, turned, factors, strict=True)
    ]


def _as_factor(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a gradient in its factor's dtype and strides, or autograd would copy it once more."""
    return gradient.to(dtype, memory_format=torch.contiguous_format)
