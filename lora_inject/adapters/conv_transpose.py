"""Adapters for `nn.ConvTranspose1d`, `nn.ConvTranspose2d` and `nn.ConvTranspose3d`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Layout
from ..config import SiteConfig
from ..errors import UnsupportedError
from ..factored import ALL, FactoredAdapter, added
from ..host import base_class
from ..registry import register
from ..rows import wide

_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_BASES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@register
class ConvTransposeAdapter(FactoredAdapter):
    """y = convT(x, W) + scaling * conv1x1(convT(x, B), A), with stride, padding, dilation and groups of the base.

    W (in, out / groups, *kernel) is seen as the matrix (in * kernel, out / groups): B (in, rank, *kernel) comes
    first, A (rank, out / groups, 1, ...) mixes its channels. All groups share A. Biases: `lora_B_bias` (rank),
    `lora_A_bias` (out).
    """

    kind = "conv_transpose"
    transposed = True
    portable = False

    @classmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """Every transposed convolution, and subclasses."""
        return isinstance(module, _BASES)

    @classmethod
    def knows_forward(cls, module: nn.Module) -> bool:
        """True where neither the forward nor the access to the weight is a subclass's own."""
        base: Any = base_class(module)
        plain = {"weight", "bias"} <= module._parameters.keys()
        known: Any = next(known for known in _BASES if issubclass(base, known))
        return plain and base.forward is known.forward and base._output_padding is known._output_padding

    @classmethod
    def layout(cls, module: nn.Module, config: SiteConfig, extras: Mapping[str, Any]) -> Layout:
        """Returns the shapes of the factors, the output bias for all groups.

        Raises:
            UnsupportedError: the balanced factorisation, which transposed convolutions do not have.
        """
        if config.factorization != "pointwise":
            raise UnsupportedError(
                f"factorization={config.factorization!r} is for convolutions that are not transposed: give a Target "
                'for this one with factorization="pointwise"'
            )
        shapes = super().layout(module, config, extras)
        if config.bias:
            outputs: Any = module.out_channels
            shapes["lora_A_bias"] = (outputs,)
        return shapes

    @classmethod
    def factors(cls, config: SiteConfig, weight: tuple[int, ...]) -> Layout:
        """B (in, rank, *kernel), A (rank, out / groups, 1, ...)."""
        rows, columns, *kernel = weight
        return {
            "lora_A": (config.rank, columns, *[1] * len(kernel)),
            "lora_B": (rows, config.rank, *kernel),
            "lora_B_bias": (config.rank,),
            "lora_A_bias": (columns,),
        }

    @staticmethod
    def base_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        """The transposed convolution with W and b."""
        return _transposed(host, host._parameters["weight"], host._parameters["bias"], *args, **kwargs)

    def update(self, host: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Adds scaling times the two convolutions, computed in the input's dtype."""
        x, *rest = (*args, *kwargs.values())
        x, last = self.drop(x), self.cast("lora_A_bias", x)
        if self.is_dense:
            rows = _transposed(host, self.lora_dense.to(x.dtype), last, x, *rest)
            return added(output, rows.to(output.dtype) * self.strength)
        first = self.cast("lora_B_bias", x)
        first = None if first is None else first.repeat(host.groups)
        inner = _transposed(host, self.lora_B.to(x.dtype), first, x, *rest)
        mix = self.lora_A.to(x.dtype).transpose(0, 1)
        mix = mix.repeat(host.groups, *[1] * (mix.dim() - 1))
        rows = _CONV[mix.dim() - 2](inner, mix, last, groups=host.groups)
        return added(output, rows.to(output.dtype) * self.strength)

    @classmethod
    def needs_host(cls, config: SiteConfig) -> bool:
        """True with biases, which every group gets."""
        return config.bias

    def matrix(self, rows: slice = ALL) -> Tensor:
        """Returns scaling * B A in the shape of the weight, or the dense update; of the given rows only."""
        if self.is_dense:
            return wide(self.lora_dense[rows]) * self.scaling
        a, b = wide(self.lora_A), wide(self.lora_B[rows]) * self.scaling
        product = b.movedim(1, -1).reshape(-1, a.shape[0]) @ a.reshape(a.shape[0], -1)
        return product.reshape(b.shape[0], *b.shape[2:], a.shape[1]).movedim(-1, 1)

    def bias_delta(self, host: Any) -> Tensor | None:
        """A^T b + a, in every group."""
        last: Any = self._parameters.get("lora_A_bias")
        if last is None:
            return None
        first: Any = self._parameters.get("lora_B_bias")
        if first is None:
            return wide(last)
        return (wide(self.lora_A).flatten(1).t() @ wide(first)).repeat(host.groups) + wide(last)


def _transposed(
    host: Any, weight: Tensor, bias: Tensor | None, input: Tensor, output_size: list[int] | None = None
) -> Tensor:
    axes = len(host.kernel_size)
    padding = host._output_padding(input, output_size, host.stride, host.padding, host.kernel_size, axes, host.dilation)
    return _TRANSPOSED[axes](input, weight, bias, host.stride, host.padding, padding, host.groups, host.dilation)
