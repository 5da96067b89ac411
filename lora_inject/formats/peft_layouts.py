"""How PEFT stores the pair of each kind of module: one class per way, all with the same two questions."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .factors import Factors, alpha_for
from .peft_experts import order, pack, to_peft
from .peft_keys import BASE, BIAS, EMBEDDING, PAIR
from .peft_limits import check_conv
from .peft_patterns import last

OUTPUT_FACTOR = 2
"""How often PEFT adds the update of an attention's output projection."""
EXPERT_NAMES = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""Last segments that PEFT takes for those of experts."""
Modules = Mapping[str, nn.Module] | None
"""The model's modules by path, or None without a model."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Piece:
    """What PEFT makes one low-rank layer of.

    Attributes:
        owner: path of the module that it wraps.
        key: the path by which the config's patterns know it.
        factors: the pair whose rank and scale hold for it.
        tensors: its tensors by their names behind the prefix.
        bias: name that the bias of B has, None where PEFT knows none.
        parameter: whether it wraps one parameter instead of the module.
        inner: where the modules lie that it wraps, by their path.
    """

    owner: str
    key: str
    factors: Factors
    tensors: Mapping[str, Tensor]
    bias: str | None = None
    parameter: bool = False
    inner: Mapping[str, str]


class Layout(abc.ABC):
    """One way to store a pair."""

    kinds: ClassVar[tuple[str, ...]]
    """The kinds of adapters that it stores."""

    @abc.abstractmethod
    def take(self, left: dict[str, Factors], modules: Modules) -> list[Piece]:
        """Takes the sites that it stores out of `left`, by their path, and returns their pieces.

        Raises:
            UnsupportedError: a site that PEFT would compute otherwise, or that needs the model.
        """

    def _own(self, left: dict[str, Factors]) -> list[Factors]:
        return [left.pop(site) for site, factors in list(left.items()) if factors.kind in self.kinds]


class Matrix(Layout):
    """Linear layers, transposed or not, and convolutions: `lora_A.weight`, `lora_B.weight`, `lora_B.bias`."""

    kinds = ("linear", "transposed_linear", "conv")

    def take(self, left: dict[str, Factors], modules: Modules) -> list[Piece]:
        return [self._piece(factors, modules) for factors in self._own(left)]

    def _piece(self, factors: Factors, modules: Modules) -> Piece:
        path = factors.path
        if factors.kind == "conv":
            check_conv(factors, needed(modules, factors))
        return Piece(
            owner=path,
            key=path,
            factors=factors,
            tensors=named(path, PAIR, factors),
            bias=f"{path}.{BIAS}",
            inner={path: f"{path}{BASE}"},
        )


class Renamed(Layout):
    """Linear layers whose names PEFT takes for those of experts, stored as the parameters that they are.

    In models with packed experts, PEFT (as of `VERSION`, with transformers 5) reads `down_proj` and its like among the
    targets as the experts of older checkpoints, and drops the pairs of shared and dense layers of that name. A target
    that is the parameter `<path>.weight` has the same tensors by the same names, and is left alone.
    """

    kinds = ("linear",)

    def take(self, left: dict[str, Factors], modules: Modules) -> list[Piece]:
        if not any("gate_up_proj" in module._parameters for module in (modules or {}).values()):
            return []
        sites = [site for site, one in left.items() if one.kind in self.kinds and last(site) in EXPERT_NAMES]
        return [self._piece(left.pop(site)) for site in sites]

    def _piece(self, factors: Factors) -> Piece:
        path = factors.path
        tensors, inner = named(path, PAIR, factors), {path: f"{path}{BASE}"}
        key = f"{path}.weight"
        return Piece(owner=path, key=key, factors=factors, tensors=tensors, parameter=True, inner=inner)


class Embedding(Layout):
    """Embeddings: `lora_embedding_A` (rank, vocabulary), `lora_embedding_B` (dimension, rank)."""

    kinds = ("embedding",)

    def take(self, left: dict[str, Factors], modules: Modules) -> list[Piece]:
        return [self._piece(factors, modules) for factors in self._own(left)]

    def _piece(self, factors: Factors, modules: Modules) -> Piece:
        path = factors.path
        row = getattr(modules.get(path), "padding_idx", None) if modules else None
        if row is not None:
            a = factors.a.clone()
            a[:, row] = 0
            factors = replace(factors, a=a)
        tensors = named(path, EMBEDDING, factors)
        return Piece(owner=path, key=path, factors=factors, tensors=tensors, inner={path: f"{path}{BASE}"})


class Attention(Layout):
    """`nn.MultiheadAttention`: always both its packed input and its output projection, of one rank and one scale.

    PEFT, as of `VERSION`, adds the update of the output projection twice: when it merges the attention for a forward,
    and again when the projection merges itself. What counts is the function, so the pair is stored at half its size.
    """

    kinds = ("attention",)

    def take(self, left: dict[str, Factors], modules: Modules) -> list[Piece]:
        paths = [one.path for one in left.values() if one.kind in self.kinds and one.parameter == "in_proj_weight"]
        paths += [path for path in _lone_outputs(left, modules) if path not in paths]
        return [self._piece(path, left) for path in paths]

    def _piece(self, path: str, left: dict[str, Factors]) -> Piece:
        packed, output = left.pop(f"{path}.in_proj_weight", None), left.pop(f"{path}.out_proj", None)
        one = packed or output
        assert one is not None
        size = output.b.shape[0] if output is not None else one.a.shape[-1]
        packed = packed or _zero(one, 3 * size, size)
        output = output or _zero(one, size, size)
        packed, output = _of_one_rank(packed, rescaled(output, packed.scaling * OUTPUT_FACTOR))
        inside = f"{path}{BASE}.out_proj"
        if output.bias is not None:
            raise UnsupportedError(f"{path}.out_proj: PEFT drops the bias of an attention's low-rank pair: merge it")
        return Piece(
            owner=path,
            key=path,
            factors=packed,
            tensors=named(path, PAIR, packed) | named(inside, PAIR, output),
            inner={path: f"{path}{BASE}", f"{path}.out_proj": f"{inside}{BASE}"},
        )


class Parameters(Layout):
    """Single parameters, packed experts above all: a wrapper for each, the module's last parameter outermost."""

    kinds = ("parameter",)

    def take(self, left: dict[str, Factors], modules: Modules) -> list[Piece]:
        owners: dict[str, list[Factors]] = {}
        for factors in self._own(left):
            owners.setdefault(factors.path, []).append(factors)
        return [piece for owner, group in owners.items() for piece in self._pieces(owner, group, modules)]

    def _pieces(self, owner: str, group: list[Factors], modules: Modules) -> list[Piece]:
        module = needed(modules, group[0])
        by_name = {str(factors.parameter): to_peft(factors, module) for factors in group}
        inner = {owner: owner + BASE * len(group)}
        return [
            Piece(
                owner=owner,
                key=by_name[name].site,
                factors=by_name[name],
                tensors=dict(zip((f"{owner}{BASE * depth}.{slot}" for slot in PAIR), pack(by_name[name]), strict=True)),
                parameter=True,
                inner=inner,
            )
            for depth, name in enumerate(order(module, by_name))
        ]


PLAIN: tuple[Layout, ...] = (Attention(), Matrix(), Embedding(), Parameters())
"""The ways of all programs that read PEFT's files, in this order: an attention takes its output projection along."""
LAYOUTS: tuple[Layout, ...] = (Renamed(), *PLAIN)
"""The ways of PEFT itself."""


def named(path: str, slots: tuple[str, ...], factors: Factors) -> dict[str, Tensor]:
    """Returns A and B by their names."""
    return {f"{path}.{slot}": tensor for slot, tensor in zip(slots, (factors.a, factors.b), strict=True)}


def needed(modules: Modules, factors: Factors) -> nn.Module:
    """Returns the module of a site whose layout only the model tells.

    Raises:
        UnsupportedError: there is no model, or it lacks the module.
    """
    module = modules.get(factors.path) if modules else None
    if module is None:
        raise UnsupportedError(
            f"{factors.site}: how PEFT stores this {factors.kind} depends on the module: name the model (--model DIR)"
        )
    return module


def _of_one_rank(one: Factors, other: Factors) -> tuple[Factors, Factors]:
    rank = max(one.rank, other.rank)
    return padded(one, rank), padded(other, rank)


def padded(factors: Factors, rank: int) -> Factors:
    """Returns the same update with zero rows in A and zero columns in B up to a rank."""
    more = rank - factors.rank
    if more == 0:
        return factors
    axis = 1 if factors.stacked else 0
    a = torch.cat([factors.a, _zeros_like(factors.a, axis, more)], axis)
    b = torch.cat([factors.b, _zeros_like(factors.b, axis + 1, more)], axis + 1)
    return replace(factors, a=a, b=b, alpha=alpha_for(factors.scaling, rank, factors.rslora))


def rescaled(factors: Factors, scaling: float) -> Factors:
    """Returns the same update with another scaling; what is missing goes into B.

    B keeps its dtype where that loses nothing (powers of two), and is float32 or wider else.
    """
    ratio = factors.scaling / scaling
    b = _times(factors.b, ratio)
    bias = None if factors.bias is None else _times(factors.bias, ratio)
    return replace(factors, b=b, bias=bias, alpha=alpha_for(scaling, factors.rank, factors.rslora))


def _times(tensor: Tensor, factor: float) -> Tensor:
    exact = tensor.double() * factor
    same = exact.to(tensor.dtype)
    return same if torch.equal(same.double(), exact) else exact.to(torch.promote_types(tensor.dtype, torch.float32))


def _zeros_like(tensor: Tensor, axis: int, count: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = count
    return tensor.new_zeros(shape)


def _zero(like: Factors, rows: int, columns: int) -> Factors:
    return replace(like, a=like.a.new_zeros(like.rank, columns), b=like.b.new_zeros(rows, like.rank), bias=None)


def _lone_outputs(left: Mapping[str, Factors], modules: Modules) -> list[str]:
    """Returns attentions whose output projection alone has a pair."""
    owners = [site.removesuffix(".out_proj") for site in left if site.endswith(".out_proj")]
    return [owner for owner in owners if isinstance((modules or {}).get(owner), nn.MultiheadAttention)]
