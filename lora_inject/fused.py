"""One autograd function for a linear layer with its low-rank paths: no extra output, no extra copy of the input."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .dropout import draw, keep, keep_, mask_of, pack, unpack
from .stacking import Factors, cast, stacked, unstacked

_PLAIN = (Tensor, torch.nn.Parameter)
_HALF = (torch.bfloat16, torch.float16)
_HALF_OR_SINGLE = (torch.float32, *_HALF)


def can_fuse(x: Any, weight: Any, bias: Any) -> bool:
    """Says whether the fused path computes what the plain one does: plain tensors, one dtype, no transform around.

    The compiler fuses the plain path by itself; functorch's transforms and forward-mode derivatives need its parts, and
    so do dispatch modes: selective checkpointing keeps products, which must not be added to afterwards.
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
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return False
    # No shape can be inferred from no numbers.
    return weight.numel() > 0 and forward_ad._current_level < 0


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
        x: input (..., in) in the dtype of the arithmetic; A and B are cast to it, or one token to theirs where that is
            wider.
        weight: W (out, in), or (in, out) if transposed.
        bias: b (out), or None.
        scales: one factor per adapter.
        factors: A and B per adapter, the one that the input meets first.
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
    """Returns the output, the rank-sized product, not scaled, (tokens, rank), and what `draw` gave, if anything."""
    weight = cast(weight, x.dtype)
    bias = None if bias is None else cast(bias, x.dtype)
    if transposed:
        flat = x.reshape(-1, x.shape[-1])
        output = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        output = output.view(*x.shape[:-1], weight.shape[1])
    else:
        # In the input's own shape, by which torch picks the kernel: the base's bits must be the base's.
        output = F.linear(x, weight, bias)
    if x.numel() == x.shape[-1] and len(scales) == 1 and not dropout:
        return output, _add_to_one(output, x, scales[0], factors, transposed), None
    first, second, scale = stacked(factors, scales, _low_rank_dtype(x), transposed)
    flat = x.reshape(-1, x.shape[-1])
    drawn = draw(flat, dropout) if dropout else None
    met = flat if drawn is None else keep(flat, mask_of(drawn, flat))
    inner = F.linear(cast(met, first.dtype), first)
    _add_product(output.view(-1, output.shape[-1]), inner, second.t(), scale / (1 - dropout))
    return output, inner, drawn


def _add_to_one(output: Tensor, x: Tensor, scale: float, factors: Factors, transposed: bool) -> Tensor:
    """Adds the low-rank path to the output of one token and returns its rank-sized product.

    One token is a vector, for which there are faster kernels, and is a smaller thing to cast than the factors.
    """
    dtype = factors[0].dtype if factors[0].dtype.itemsize > x.dtype.itemsize else x.dtype
    first, second, _ = stacked(factors, (scale,), dtype, transposed)
    inner = torch.mv(first, cast(x.view(-1), dtype))
    if output.dtype == dtype:
        output.view(-1).addmv_(second, inner, alpha=scale)
    else:
        output.view(-1).add_(torch.mv(second, inner), alpha=scale)
    return inner.view(1, -1)


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Returns scale * left @ right."""
    # With beta=0 the first argument is ignored.
    return left @ right if scale == 1 else torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _add_product(output: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Adds scale * left @ right to the output in place, rounded to its dtype once more where theirs is wider."""
    if output.dtype == left.dtype:
        return output.addmm_(left, right, alpha=scale)
    return output.add_(left @ right, alpha=scale)


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
        output, inner, drawn = _output(x, weight, bias, scales, transposed, dropout, factors)
        saved = inner.detach() if narrow or dropout else None
        bits = pack(drawn) if drawn is not None and (wants[0] or not narrow) else None
        ctx.save_for_backward(None if narrow else x, saved, bits, weight, *factors)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.options = scales, transposed, dropout, _low_rank_dtype(x)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        # A view made in here could not be changed in place outside, as models do with `hidden += residual`.
        return output.detach(), saved

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, saved_grad: Tensor | None) -> Any:
        x, inner, bits, weight, *factors = ctx.saved_tensors
        scales, transposed, dropout, low = ctx.options
        wants = ctx.needs_input_grad
        if grad is None:
            # A second derivative may come through the saved product alone.
            grad = weight.new_zeros((*ctx.shape[:-1], weight.shape[1 if transposed else 0]), dtype=ctx.dtype)
        grad = grad.reshape(-1, grad.shape[-1])
        first, second, scale = stacked(factors, scales, low, transposed)
        scale /= 1 - dropout
        low_grad = cast(grad, low)
        inner_grad = _product(low_grad, second, scale)
        if saved_grad is not None:
            inner_grad = inner_grad + cast(saved_grad, low)
        flat = x_grad = weight_grad = bias_grad = None
        factor_grads: list[Tensor | None] = [None] * len(factors)
        if x is not None:
            flat = x.reshape(-1, x.shape[-1])
        mask = None if bits is None else unpack(bits, ctx.dtype, (len(grad), ctx.shape[-1]))
        # The large product comes last, since it drives the gradient and the input out of the processor's caches.
        if wants[0]:
            x_grad = cast(inner_grad @ first, ctx.dtype)
            x_grad = x_grad if mask is None else keep_(x_grad, mask)
        if any(wants[6:]):
            first_grad = None
            if flat is not None:
                met = cast(flat if mask is None else keep(flat, mask), low)
                first_grad = inner_grad.t() @ met
                inner = F.linear(met, first) if inner is None else inner
            second_grad = _product(low_grad.t(), cast(inner, low), scale)
            factor_grads = unstacked(first_grad, second_grad, factors, scales, transposed)
        if x_grad is not None:
            # The large product adds itself to the small one, so that no pass over their sum is needed.
            x_grad = x_grad.addmm_(grad, cast(weight.t() if transposed else weight, ctx.dtype)).view(ctx.shape)
        if wants[1]:
            assert flat is not None
            weight_grad = (flat.t() @ grad if transposed else grad.t() @ flat).to(weight.dtype)
        if wants[2]:
            bias_grad = grad.sum(0).to(ctx.bias_dtype)
        return (x_grad, weight_grad, bias_grad, None, None, None, *factor_grads)
