"""The rows of linear layers with a quantized weight, which no cast reaches: each is made anew for a dtype."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from variant import Holder, Inputs, Variant

import lora_inject as li

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup, PerTensor

WIDTH, OUT = 64, 32


@dataclass(frozen=True)
class Quantized(Variant):
    """A linear layer that a library quantizes; the reference is a plain one with W as the library applies it."""

    quantize: Callable[[nn.Module, torch.dtype], nn.Module] = lambda layer, dtype: layer
    """Returns the quantized layer, of a plain one in the dtype of the activations."""
    step: float = 0.0
    """How far rounding to the format may move a weight, as a share of the largest one in its row."""
    scales: int | None = 1
    """The axis along which weights share a scale; None for one scale."""
    reads: float = 0.0
    """How far the library rounds inputs before it multiplies, as a share of the largest one of a token."""
    keeps: float = 0.0
    """How far it rounds products beyond what the dtype of the activations does, as a share of their absolute sum."""

    def model(self, dtype: torch.dtype) -> Holder:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layer = self.quantize(self.make().to(dtype), dtype)
        made = Holder(layer, self.call).eval().requires_grad_(False)
        with torch.no_grad():
            # bitsandbytes lays out its numbers anew in the first forward.
            made(*self.x(dtype))
        return made.train()

    def thawed(self, dtype: torch.dtype) -> Holder:
        made = self.model(dtype)
        for parameter in made.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return made

    def plain(self, dtype: torch.dtype) -> Holder:
        return self.plain_of(self.model(dtype), dtype)

    def plain_of(self, model: nn.Module, dtype: torch.dtype) -> Holder:
        """Returns the plain float64 layer that a quantized one stands for."""
        site, made = model.get_submodule(self.at), nn.Linear(WIDTH, OUT).double().requires_grad_(False)
        made.weight.data = library_weight(site, dtype)
        made.bias = None if site.bias is None else nn.Parameter(site.bias.detach().double(), requires_grad=False)
        return Holder(made, self.call)

    def merge(self, model: nn.Module) -> li.MergeReport:
        return li.merge(model, requantize=True)

    def blur(self, base: nn.Module, x: Inputs, size: Tensor) -> Tensor | float:
        largest = x[0].abs().amax(-1, keepdim=True)
        return self.reads * largest * base.get_submodule(self.at).weight.abs().sum(1) + self.keeps * size


@torch.no_grad()
def library_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Returns W in float64: what the layer's own forward makes of the unit vectors, its bias left out."""
    twin = copy.deepcopy(layer).eval()
    twin._parameters["bias"] = None
    found: Tensor = twin(torch.eye(WIDTH, dtype=dtype))
    return found.double().T.contiguous()


def _torchao(config: Any, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    quantize_(layer, config)
    return layer


def _bare(config: Any, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Without the `extra_repr` that `quantize_` leaves on the layer, which Python cannot pickle."""
    quantize_(layer, config)
    del layer.extra_repr
    return layer


def _bitsandbytes(kind: type, options: dict[str, Any], layer: Any, dtype: torch.dtype) -> nn.Module:
    computes = torch.float32 if dtype == torch.float64 else dtype
    more = {"compute_dtype": computes} if kind is bitsandbytes.nn.Linear4bit else {}
    made = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, **options, **more)
    made.load_state_dict({key: value.float() for key, value in layer.state_dict().items()})
    made = made.to("cpu")
    # On some processors the first forward in eval() packs a 4-bit weight for a kernel in bfloat16, which rounds the
    # scales and gives the input no gradient: see test_quantized.py.
    made.support_avx512bf16_for_cpu = False
    if made.bias is not None:
        made.bias.data = made.bias.data.to(dtype)
    return made  # type: ignore[no-any-return]


def _row(name: str, quantize: Any, dtypes: tuple[torch.dtype, ...], **more: Any) -> Quantized:
    shape, bias = more.pop("shape", (5, WIDTH)), more.pop("base_bias", True)
    make = partial(nn.Linear, WIDTH, OUT, bias=bias)
    return Quantized(
        "quantized_linear", name, make, lambda: torch.randn(*shape), quantize=quantize, dtypes=dtypes, **more
    )


# torchao's kernels refuse float64.
AO = (torch.float32, torch.bfloat16, torch.float16)
BNB = (*AO, torch.float64)
ROWS, WHOLE = Int8WeightOnlyConfig(), Int8WeightOnlyConfig(granularity=PerTensor())
FOUR = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
EIGHT = partial(_bitsandbytes, bitsandbytes.nn.Linear8bitLt, {"has_fp16_weights": False})
NF4 = partial(_bitsandbytes, bitsandbytes.nn.Linear4bit, {"quant_type": "nf4"})
FP4 = partial(_bitsandbytes, bitsandbytes.nn.Linear4bit, {"quant_type": "fp4", "compress_statistics": False})
BYTE = {"step": 1 / 250, "pickles": False}
NIBBLE = {"step": 1 / 14.5, "pickles": False}
# 4-bit weights have no float64: inputs of it are cast and the output is cast back.
FOUR_BITS = {"keeps": 2**-21}
INT8 = {"step": 1 / 160, "reads": 1 / 250, "keeps": 2**-9}
"""bitsandbytes multiplies 8-bit integers, and rounds to float16 whatever the input is."""

QUANTIZED = [
    _row("int8", partial(_bare, ROWS), AO, step=1 / 250),
    _row("int8-quantize", partial(_torchao, ROWS), AO, **BYTE),
    _row("int8-tensor", partial(_torchao, WHOLE), AO, scales=None, **BYTE),
    _row("int8-no-bias-biases", partial(_torchao, ROWS), AO, base_bias=False, options={"bias": True}, **BYTE),
    _row("int8-dense", partial(_torchao, ROWS), AO, options={"rank": 32, "dense": True}, **BYTE),
    _row("int8-dropout", partial(_torchao, ROWS), AO, options={"dropout": 0.5}, **BYTE),
    _row("int8-3d", partial(_torchao, ROWS), AO, shape=(2, 3, WIDTH), **BYTE),
    _row("int4", partial(_torchao, FOUR), AO, **NIBBLE),
    _row("int4-biases", partial(_torchao, FOUR), AO, options={"bias": True}, **NIBBLE),
    _row("bitsandbytes-int8", EIGHT, BNB, **INT8),
    _row("bitsandbytes-int8-biases", EIGHT, BNB, options={"bias": True}, **INT8),
    _row("bitsandbytes-nf4", NF4, BNB, step=0.165, **FOUR_BITS),
    _row("bitsandbytes-nf4-rslora", NF4, BNB, step=0.165, **FOUR_BITS, options={"rslora": True, "bias": True}),
    _row("bitsandbytes-fp4", FP4, BNB, step=0.18, **FOUR_BITS),
]
