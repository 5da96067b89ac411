"""Adapters for `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, in two factorisations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Layout
from ..config import SiteConfig
from ..factored import ALL, FactoredAdapter, added
from ..host import base_class
from ..registry import register
from ..rows import wide

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_BASES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@register
class ConvAdapter(FactoredAdapter):
    """y = conv(x, W) + scaling * conv(conv(x, A), B), with the stride, padding, dilation and groups of the base.

    The first `split` kernel axes belong to B, the others to A; in matrix form W is (out * k_B, in / groups * k_A).
    pointwise: split = 0, A (rank, in / groups, *kernel), B (out, rank, 1, ...), as LoCon and PEFT store it (Yeh et
    al. 2023, arXiv:2309.14859, section 3). balanced: half of the axes each, so in 2d A (rank, in / groups, 1, k_w)
    and B (out, rank, k_h, 1). In one dimension both are the same. All groups share A, as their rows of W share
    its columns. Biases: `lora_A_bias` (rank), `lora_B_bias` (out).
    """

    kind = "conv"

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """Every convolution that is not transposed, and subclasses."""
        return isinstance(module, _BASES)

    @classmethod
    def knows_forward(cls, module: nn.Module) -> bool:
        """True where neither the forward nor the access to the weight is a subclass's own."""
        base: Any = base_class(module)
        plain = {"weight", "bias"} <= module._parameters.keys()
        known = next(known for known in _BASES if issubclass(base, known))
        return plain and base.forward is known.forward and base._conv_forward is known._conv_forward

    @classmethod
    def factors(cls, config: SiteConfig, weight: tuple[int, ...]) -> Layout:
        """Returns the shapes of A and B as convolution weights."""
        rows, columns, *kernel = weight
        split = len(kernel) // 2 if config.factorization == "balanced" else 0
        ones = [1] * len(kernel)
        return {
            "lora_A": (config.rank, columns, *ones[:split], *kernel[split:]),
            "lora_B": (rows, config.rank, *kernel[:split], *ones[split:]),
            "lora_A_bias": (config.rank,),
            "lora_B_bias": (rows,),
        }

    @classmethod
    def needs_host(cls, config: SiteConfig) -> bool:
        """False: the groups matter to the forward, not to the weight."""
        return False

    @staticmethod
    def base_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        """The convolution with W and b."""
        return _convolve(host, *args, **kwargs)

    def update(self, host: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Adds scaling times the two convolutions, computed in the input's dtype."""
        x = self.drop(args[0] if args else next(iter(kwargs.values())))
        if self.is_dense:
            rows = host._conv_forward(x, self.lora_dense.to(x.dtype), self.cast("lora_B_bias", x))
        else:
            rows = self._second(host, self._first(host, x))
        return added(output, rows.to(output.dtype) * self.strength)

    def _split(self, axes: int) -> int:
        return axes // 2 if self.config.factorization == "balanced" else 0

    def _first(self, host: Any, x: Tensor) -> Tensor:
        """Convolves with A over A's axes. All padding happens here, so that A's bias reaches the padded rim too."""
        axes = len(host.kernel_size)
        split, groups = self._split(axes), host.groups
        padding = host.padding
        if isinstance(padding, str) or host.padding_mode != "zeros":
            mode = "constant" if host.padding_mode == "zeros" else host.padding_mode
            x, padding = F.pad(x, host._reversed_padding_repeated_twice, mode=mode), 0
        weight = self.lora_A.to(x.dtype).repeat(groups, *[1] * (axes + 1))
        bias = self.cast("lora_A_bias", x)
        bias = None if bias is None else bias.repeat(groups)
        stride = (*[1] * split, *host.stride[split:])
        dilation = (*[1] * split, *host.dilation[split:])
        return _CONV[axes](x, weight, bias, stride, padding, dilation, groups)

    def _second(self, host: Any, inner: Tensor) -> Tensor:
        """Convolves with B over B's axes, within the groups of the base."""
        axes = len(host.kernel_size)
        rest = [1] * (axes - self._split(axes))
        stride = (*host.stride[: axes - len(rest)], *rest)
        dilation = (*host.dilation[: axes - len(rest)], *rest)
        weight, bias = self.lora_B.to(inner.dtype), self.cast("lora_B_bias", inner)
        return _CONV[axes](inner, weight, bias, stride, 0, dilation, host.groups)

    def matrix(self, rows: slice = ALL) -> Tensor:
        """Returns scaling * B A in the shape of the weight, summed over the rank."""
        if self.is_dense:
            return wide(self.lora_dense[rows]) * self.scaling
        a, b = wide(self.lora_A), wide(self.lora_B[rows]) * self.scaling
        axes = a.dim() - 2
        split = self._split(axes)
        product = b.movedim(1, -1).reshape(-1, a.shape[0]) @ a.reshape(a.shape[0], -1)
        out, columns = b.shape[0], a.shape[1]
        return product.reshape(out, *b.shape[2 : 2 + split], columns, *a.shape[2 + split :])

    def unfold(self, host: Any, matrix: Tensor, rows: slice = ALL) -> Tensor:
        """Moves the input channels in front of the kernel axes."""
        return matrix if self.is_dense else matrix.movedim(1 + self._split(matrix.dim() - 2), 1)

    def bias_delta(self, host: Any) -> Tensor | None:
        """B a + b, summed over B's kernel axes."""
        if not self.config.bias:
            return None
        second: Any = self._parameters["lora_B_bias"]
        if self.is_dense:
            return wide(second)
        first: Any = self._parameters["lora_A_bias"]
        return wide(self.lora_B).flatten(2).sum(2) @ wide(first) + wide(second)


def _convolve(host: Any, input: Tensor) -> Tensor:
    found: Tensor = host._conv_forward(input, host._parameters["weight"], host._parameters["bias"])
    return found
