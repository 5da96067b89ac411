"""Every kind of module that an adapter class must serve, as a table: the contract runs over all of it.

A new adapter class adds its rows to `VARIANTS` and its mathematics to `reference.DELTAS`; the contract fails for a
registered class that has neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from variant import Variant, by_keyword
from variants_full import FULL
from variants_more import MORE
from variants_quantized import QUANTIZED


class PlainSubclass(nn.Linear):
    """A subclass that changes nothing."""


class OwnForwardLinear(nn.Linear):
    """A subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.nn.functional.linear(x, self.weight, self.bias)


class TupleLinear(nn.Linear):
    """A subclass that returns a tuple, as routers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = super().forward(x)
        return out, out.amax(-1)


class ScaledEmbedding(nn.Embedding):
    """An embedding with a forward of its own, as Gemma's."""

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) * 4


class OwnForwardConv(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias) * 0.5


def _randn(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


ROWS = _randn(5, 12)


def _linear(name: str, x: Callable[[], Tensor] = ROWS, cls: Any = nn.Linear, **more: Any) -> Variant:
    bias = more.pop("base_bias", True)
    return Variant("linear", name, lambda: cls(12, 7, bias=bias), x, **more)


def _conv1d(name: str, x: Callable[[], Tensor] = ROWS, **more: Any) -> Variant:
    def make() -> nn.Module:
        made = Conv1D(7, 12)
        nn.init.normal_(made.weight, std=0.3)
        nn.init.normal_(made.bias)
        return made

    return Variant("transposed_linear", name, make, x, **more)


def _embedding(name: str, *, cls: Any = nn.Embedding, shape: tuple[int, ...] = (4, 6), **more: Any) -> Variant:
    own = {key: more.pop(key) for key in ("padding_idx", "scale_grad_by_freq", "sparse") if key in more}
    return Variant("embedding", name, lambda: cls(9, 5, **own), lambda: torch.randint(0, 9, shape), **more)


def _conv(name: str, cls: Any, x: tuple[int, ...], *args: Any, channels_last: bool = False, **more: Any) -> Variant:
    own = {key: more.pop(key) for key in CONV_ARGS if key in more}

    def make() -> nn.Module:
        made = cls(*args, **own)
        return made.to(memory_format=torch.channels_last) if channels_last else made

    def input() -> Tensor:
        made = torch.randn(*x)
        return made.to(memory_format=torch.channels_last) if channels_last else made

    return Variant("conv", name, make, input, **more)


CONV_ARGS = ("stride", "padding", "padding_mode", "dilation", "groups", "bias")


def _block(name: str, **more: Any) -> Variant:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 6))

    return Variant("block", name, make, _randn(3, 8), **more)


SIZES = {"adapter": "block", "in_features": 8, "out_features": 6}

VARIANTS = [
    _linear("2d"),
    _linear("no-bias", base_bias=False),
    _linear("1d", _randn(12)),
    _linear("3d", _randn(2, 5, 12)),
    _linear("4d", _randn(2, 3, 5, 12)),
    _linear("transposed-input", lambda: torch.randn(12, 5).t()),
    _linear("swapped-input", lambda: torch.randn(5, 2, 12).transpose(0, 1)),
    _linear("strided-input", lambda: torch.randn(5, 24)[:, ::2]),
    _linear("expanded-input", lambda: torch.randn(1, 12).expand(5, 12)),
    _linear("keyword", call=by_keyword),
    _linear("subclass", cls=PlainSubclass),
    _linear("own-forward", cls=OwnForwardLinear),
    _linear("own-forward-no-bias", cls=OwnForwardLinear, base_bias=False),
    _linear("own-forward-bias", cls=OwnForwardLinear, base_bias=False, options={"bias": True}),
    _linear("tuple", cls=TupleLinear),
    _linear("biases", options={"bias": True}),
    _linear("biases-on-no-bias", base_bias=False, options={"bias": True}),
    _linear("rslora", options={"rslora": True, "alpha": 3.0}),
    _linear("large-rank", options={"rank": 20}),
    _linear("dense", options={"rank": 7, "dense": True}),
    _linear("dense-biases", options={"rank": 7, "dense": True, "bias": True}, base_bias=False),
    _linear("dense-not-reached", options={"rank": 2, "dense": True}),
    _linear("dropout", options={"dropout": 0.5}),
    _linear("own-forward-dropout", cls=OwnForwardLinear, options={"dropout": 0.5}),
    _linear("gaussian", options={"init": "gaussian"}),
    _linear("orthogonal", options={"init": "orthogonal"}),
    _conv1d("2d"),
    _conv1d("1d", _randn(12)),
    _conv1d("3d", _randn(2, 5, 12)),
    _conv1d("biases", options={"bias": True}),
    _conv1d("dense", options={"rank": 7, "dense": True}),
    _conv1d("dense-biases", options={"rank": 7, "dense": True, "bias": True}),
    _conv1d("dropout", options={"dropout": 0.5}),
    _embedding("2d"),
    _embedding("1d", shape=(6,)),
    _embedding("scalar", shape=()),
    _embedding("3d", shape=(2, 3, 4)),
    _embedding("padding", padding_idx=3, shape=(8, 8)),
    _embedding("padding-negative", padding_idx=-1, shape=(8, 8)),
    _embedding("padding-biases", padding_idx=3, shape=(8, 8), options={"bias": True}),
    _embedding("padding-dense", padding_idx=3, shape=(8, 8), options={"rank": 9, "dense": True, "bias": True}),
    _embedding("scale-grad", scale_grad_by_freq=True),
    _embedding("sparse", sparse=True),
    _embedding("sparse-padding", sparse=True, padding_idx=2, shape=(8, 8)),
    _embedding("own-forward", cls=ScaledEmbedding),
    _embedding("own-forward-padding", cls=ScaledEmbedding, padding_idx=3, shape=(8, 8), options={"bias": True}),
    _embedding("own-forward-scale-grad", cls=ScaledEmbedding, scale_grad_by_freq=True),
    _embedding("keyword", call=by_keyword),
    _embedding("biases", options={"bias": True}),
    _embedding("dropout", options={"dropout": 0.5}),
    _conv("1d", nn.Conv1d, (2, 4, 9), 4, 6, 3),
    _conv("1d-unbatched", nn.Conv1d, (4, 9), 4, 6, 3, stride=2, padding=1),
    _conv("1d-causal-whisper", nn.Conv1d, (2, 4, 9), 4, 6, 3, stride=2, padding=1, options={"bias": True}),
    _conv("1d-depthwise", nn.Conv1d, (2, 4, 9), 4, 4, 3, groups=4, padding="same"),
    _conv("1d-balanced", nn.Conv1d, (2, 4, 9), 4, 6, 3, padding=1, options={"factorization": "balanced"}),
    _conv("2d-1x1", nn.Conv2d, (2, 4, 5, 6), 4, 6, 1),
    _conv("2d-biases-no-bias", nn.Conv2d, (2, 4, 5, 6), 4, 6, 3, padding=2, bias=False, options={"bias": True}),
    _conv("2d-dense", nn.Conv2d, (2, 4, 5, 6), 4, 6, 3, padding=1, options={"rank": 99, "dense": True}),
    _conv(
        "2d-dense-biases", nn.Conv2d, (2, 4, 5, 6), 4, 6, 3, groups=2, options={"rank": 99, "dense": True, "bias": True}
    ),
    _conv("2d-own-forward", OwnForwardConv, (2, 4, 5, 6), 4, 6, 3, padding=1),
    _conv("2d-channels-last", nn.Conv2d, (2, 4, 5, 6), 4, 6, 3, padding=1, channels_last=True),
    _conv("2d-keyword", nn.Conv2d, (2, 4, 5, 6), 4, 6, 3, call=by_keyword),
    _conv("2d-dropout", nn.Conv2d, (2, 4, 5, 6), 4, 6, 3, options={"dropout": 0.5}),
    _conv("3d-1x2x3", nn.Conv3d, (2, 2, 4, 5, 6), 2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2)),
    _block("sizes", target=SIZES),
    _block("biases", target=SIZES, options={"bias": True}),
    _block("example", target={"adapter": "block", "example": torch.ones(2, 8)}),
    _block("rslora", target=SIZES, options={"rslora": True, "alpha": 2.0}),
    _block("dropout", target=SIZES, options={"dropout": 0.5}),
]

GEOMETRY: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": (2, 3), "padding": (1, 2)},
    "padding": {"padding": (2, 1)},
    "same": {"padding": "same", "dilation": (1, 2)},
    "same-even": {"padding": "same"},
    "valid": {"padding": "valid", "stride": 2},
    "dilation": {"dilation": (2, 1), "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1, "stride": 2},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"padding": (2, 1), "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": (1, 2), "padding_mode": "circular", "groups": 2},
    "reflect-same": {"padding": "same", "padding_mode": "reflect"},
    "unbatched": {"padding": 1, "unbatched": True},
}
for _name, _own in GEOMETRY.items():
    _shape = (4, 6, 7) if _own.pop("unbatched", False) else (2, 4, 6, 7)
    _kernel = (2, 3) if _name == "same-even" else (3, 3) if "mode" not in _own else (3, 5)
    for _how in ("pointwise", "balanced"):
        _more = {"options": {"factorization": _how, "bias": _name in ("padding", "reflect", "groups", "same")}}
        VARIANTS.append(_conv(f"2d-{_how}-{_name}", nn.Conv2d, _shape, 4, 8, _kernel, **_own, **_more))
for _name, _own in {"same": {"padding": "same"}, "groups": {"groups": 2, "stride": 2, "padding": 1}}.items():
    for _how in ("pointwise", "balanced"):
        _more = {"options": {"factorization": _how, "bias": True}}
        VARIANTS.append(_conv(f"3d-{_how}-{_name}", nn.Conv3d, (2, 2, 4, 5, 4), 2, 4, 3, **_own, **_more))
VARIANTS += [*MORE, *FULL, *QUANTIZED]
