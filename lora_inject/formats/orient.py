"""Between the native layout, B and A by rows and columns of the weight, and the order in which the input meets them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..adapter import Adapter
from ..adapter_file import SiteRecord
from ..config import SiteConfig
from ..errors import FormatError, UnsupportedError
from ..factored import FactoredAdapter
from ..registry import by_kind
from .bundle import Bundle
from .factors import Factors, alpha_for


def outward(bundle: Bundle, record: SiteRecord) -> Factors:
    """Returns one site of a bundle as factors in the order in which the input meets them; Delta W stays the same.

    A dense update becomes a factor beside an identity matrix, a balanced convolution a pointwise one of rank
    rank * kernel height, and biases of both factors one bias of the output: exact rewritings all.

    Raises:
        UnsupportedError: a kind whose update is no low-rank pair that other programs know.
    """
    tensors, kind = dict(bundle.entries[record.path]), by_kind(record.kind)
    if not issubclass(kind, FactoredAdapter) or not kind.portable:
        raise UnsupportedError(
            f"{bundle.path}: {record.path or '(root)'}: an adapter of kind {record.kind!r} has no counterpart in other "
            "programs' files: keep the file in lora_inject's format, or merge this site into the base"
        )
    _check(bundle, record, tensors)
    parameter = record.extras.get("parameter")
    first, second = _met(tensors, kind, parameter)
    alpha = alpha_for(record.config.scaling, first.shape[-2] if _is_stack(first, parameter) else first.shape[0])
    found = Factors(
        path=record.owner(record.path),
        a=first,
        b=second,
        bias=_output_bias(tensors, kind, first, second),
        alpha=alpha,
        dropout=record.config.dropout,
        kind=record.kind,
        parameter=parameter,
    )
    given = record.config
    if "lora_dense" not in tensors and found.rank == given.rank:
        found = replace(found, alpha=given.rank if given.alpha is None else given.alpha, rslora=given.rslora)
    return found.checked(bundle.path)


def _check(bundle: Bundle, record: SiteRecord, tensors: Mapping[str, Tensor]) -> None:
    """Refuses a site whose tensors are not those of a low-rank pair or a dense update."""
    pair = {"lora_dense"} if "lora_dense" in tensors else {"lora_A", "lora_B"}
    odd = sorted(pair - tensors.keys()) or sorted(tensors.keys() - pair - {"lora_A_bias", "lora_B_bias"})
    if odd:
        raise FormatError(
            f"{bundle.path}: {record.path or '(root)'}: {', '.join(odd)}: missing, or no tensor of a low-rank update"
        )


def _is_stack(tensor: Tensor, parameter: str | None) -> bool:
    return parameter is not None and tensor.dim() == 3


def _met(tensors: Mapping[str, Tensor], kind: type[FactoredAdapter], parameter: str | None) -> tuple[Tensor, Tensor]:
    """Returns the factor that the input meets first, and the other, as a pointwise pair."""
    if "lora_dense" in tensors:
        dense = tensors["lora_dense"]
        return _beside_identity(dense.transpose(0, 1) if kind.transposed else dense, parameter)
    a, b = tensors["lora_A"], tensors["lora_B"]
    if kind.transposed:
        return b.transpose(0, 1), a.transpose(0, 1)
    return (a, b) if parameter is not None or math.prod(b.shape[2:]) == 1 else _pointwise(a, b)


def _beside_identity(dense: Tensor, parameter: str | None) -> tuple[Tensor, Tensor]:
    """Returns the dense update as a pair, one of which is an identity matrix of the smaller side."""
    if parameter is None and dense.dim() > 2:
        eye = torch.eye(dense.shape[0], dtype=dense.dtype)
        return dense, eye.reshape(*eye.shape, *[1] * (dense.dim() - 2))
    rows, columns = dense.shape[-2:]
    eye = torch.eye(min(rows, columns), dtype=dense.dtype).expand(*dense.shape[:-2], -1, -1)
    return (eye, dense) if columns <= rows else (dense, eye)


def _pointwise(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a balanced pair, A (r, in, 1, kw) and B (out, r, kh, 1), with all kernel axes in A.

    Every pair (rank, position in B's kernel) becomes a rank of its own, whose A is non-zero at that position alone.
    """
    size = math.prod(b.shape[2:])
    places = torch.eye(size, dtype=a.dtype).reshape(1, size, 1, *b.shape[2:])
    wide_a = (a.unsqueeze(1) * places).flatten(0, 1)
    wide_b = b.flatten(2).flatten(1)
    return wide_a, wide_b.reshape(*wide_b.shape, *[1] * (a.dim() - 2))


def _output_bias(tensors: Mapping[str, Tensor], kind: type[FactoredAdapter], a: Tensor, b: Tensor) -> Tensor | None:
    """Returns what the biases of both factors add to the output before scaling: B's sum times a's bias, plus b's."""
    names = ("lora_B_bias", "lora_A_bias") if kind.transposed else ("lora_A_bias", "lora_B_bias")
    inner, outer = (tensors.get(name) for name in names)
    if outer is None or inner is None:
        return outer
    inner = inner.double().repeat_interleave(a.shape[0] // inner.shape[0])
    return (b.double().flatten(1) @ inner + outer.double()).to(outer.dtype)


def inward(factors: Factors, kind: type[Adapter]) -> tuple[SiteConfig, dict[str, Tensor]]:
    """Returns options and tensors of a site that a class serves, from factors in the order of the input.

    Raises:
        UnsupportedError: the class's update is no low-rank pair.
    """
    if not issubclass(kind, FactoredAdapter):
        raise UnsupportedError(f"{factors.site}: adapter class {kind.kind!r} does not hold a low-rank pair")
    swap = kind.transposed and factors.parameter is None
    names = ("lora_B", "lora_A") if swap else ("lora_A", "lora_B")
    pair = [tensor.transpose(0, 1) if swap else tensor for tensor in (factors.a, factors.b)]
    tensors = {name: tensor.contiguous() for name, tensor in zip(names, pair, strict=True)}
    if factors.bias is not None:
        tensors |= {f"{names[0]}_bias": factors.bias.new_zeros(factors.rank), f"{names[1]}_bias": factors.bias}
    config = SiteConfig(
        rank=factors.rank,
        alpha=factors.alpha,
        rslora=factors.rslora,
        dropout=factors.dropout,
        bias=factors.bias is not None,
        dtype=factors.a.dtype,
    )
    return config, tensors
