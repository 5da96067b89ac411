"""Projections that one program keeps apart and another as one: rewritten where the rows of both are known for sure.

A fused projection whose rows are those of its parts, one after the other, has an update that is low-rank where theirs
are: A holds all of theirs, B has theirs as blocks on its diagonal. The other way round, a part's update is A with the
part's rows of B. Fused projections with another order of rows, interleaved by head, are refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adapter import wide
from ..errors import MismatchError, UnsupportedError, listing
from ..factored import FactoredAdapter
from ..host import base_class
from ..registry import adapter_for
from ..tree import Node
from .factors import Factors, alpha_for

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Fusion:
    """One projection and its parts.

    Attributes:
        whole: name of the projection, or of the parameter.
        parts: names of its parts, in the order of their rows.
        owners: classes of the module that holds the projection, in which its rows are those of the parts, one part
            after the other; read from the code of transformers 5.23 and torch.
        equal: whether all parts have equally many rows; else the second and the third have.
        parameter: whether the whole is a parameter of its owner, not a module.
    """

    whole: str
    parts: tuple[str, ...]
    owners: frozenset[str]
    equal: bool = True
    parameter: bool = False


FUSIONS = (
    Fusion("qkv_proj", QKV, frozenset({"Phi3Attention", "Phi4MultimodalAttention"}), equal=False),
    Fusion(
        "gate_up_proj",
        ("gate_proj", "up_proj"),
        frozenset({"Phi3MLP", "Phi4MultimodalMLP", "GlmMLP", "Glm4MLP", "Glm4vTextMLP", "DiaMLP"}),
    ),
    Fusion("c_attn", QKV, frozenset({"GPT2Attention", "DecisionTransformerGPT2Attention", "ImageGPTAttention"})),
    Fusion("Wqkv", QKV, frozenset({"ModernBertAttention", "MptAttention"})),
    Fusion("in_proj_weight", QKV, frozenset({"MultiheadAttention"}), parameter=True),
)
"""What is rewritten. A file's fused projection is split for a model that has the parts by the same table."""

UNKNOWN = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "gate_up_proj")
"""Names of fused projections whose rows, in owners that the table does not list, may be in any order."""


@dataclass(frozen=True)
class StandIn:
    """A path that the model lacks, because it has the parts, or the whole, in its place.

    Attributes:
        fusion: which projection.
        owner: path of the module that holds it.
        module: that module.
        part: name of the part that the path means; None for the whole.
    """

    fusion: Fusion
    owner: str
    module: nn.Module
    part: str | None


def stand_ins(nodes: Mapping[str, Node]) -> dict[str, StandIn]:
    """Returns the paths that files may have beside the model's own."""
    found: dict[str, StandIn] = {}
    for path, node in nodes.items():
        module = node.module
        names = {known.__name__ for known in base_class(module).__mro__}
        for fusion in FUSIONS:
            if not fusion.parameter and set(fusion.parts) <= set(module._modules):
                found[_under(path, fusion.whole)] = StandIn(fusion, path, module, None)
            elif fusion.owners & names and _whole(module, fusion) is not None:
                found |= {_under(path, part): StandIn(fusion, path, module, part) for part in fusion.parts}
    return {path: stand_in for path, stand_in in found.items() if path not in nodes}


def _whole(module: nn.Module, fusion: Fusion) -> Tensor | nn.Module | None:
    return (module._parameters if fusion.parameter else module._modules).get(fusion.whole)


def _under(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")


def refitted(factors: Iterable[Factors], known: Mapping[str, StandIn]) -> tuple[list[Factors], list[str]]:
    """Returns the factors with those of stand-ins rewritten for what the model has, and notes that say so.

    Raises:
        MismatchError: the rows do not fit.
        UnsupportedError: a bias for a parameter that has none of its own.
    """
    found: list[Factors] = []
    notes: list[str] = []
    joined: dict[tuple[str, Fusion], list[Factors]] = defaultdict(list)
    for one in factors:
        stand_in = None if one.parameter is not None else known.get(one.path)
        if stand_in is None:
            found.append(one)
        elif stand_in.part is None:
            found += split(one, stand_in)
            notes.append(f"{one.path}: split into {', '.join(stand_in.fusion.parts)}")
        else:
            joined[stand_in.owner, stand_in.fusion].append(one)
    for (owner, fusion), parts in joined.items():
        found.append(fuse(parts, owner, fusion, known))
        notes.append(f"{_under(owner, fusion.whole)}: fused from {', '.join(_last(one.path) for one in parts)}")
    return found, notes


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def split(one: Factors, stand_in: StandIn) -> list[Factors]:
    """Returns the parts of a fused projection's update: its A with their rows of its B.

    Raises:
        MismatchError: it has not as many rows as they have together.
    """
    fusion = stand_in.fusion
    rows = [_rows_of(stand_in.module._modules[part]) for part in fusion.parts]
    if one.b.dim() != 2 or sum(rows) != one.b.shape[0]:
        raise MismatchError(
            f"{one.path}: B {tuple(one.b.shape)} in the file; {', '.join(fusion.parts)} of the model have "
            f"{' + '.join(map(str, rows))} rows: the rows of one are not those of the other"
        )
    biases = [None] * len(rows) if one.bias is None else [bias.clone() for bias in torch.split(one.bias, rows)]
    # Copies, because a file of safetensors does not take two tensors in the same memory.
    return [
        replace(one, path=_under(stand_in.owner, part), a=one.a.clone(), b=b.clone(), bias=bias)
        for part, b, bias in zip(fusion.parts, torch.split(one.b, rows), biases, strict=True)
    ]


def fuse(parts: Sequence[Factors], owner: str, fusion: Fusion, known: Mapping[str, StandIn]) -> Factors:
    """Returns the update of a fused projection from those of its parts; parts without one get zero rows.

    The scalings become one: that of the first part, with the ratio to the others multiplied into their B in float64
    and rounded once; a ratio that is a power of two changes no digit. Parts that share A keep its rank.

    Raises:
        MismatchError: the rows do not fit.
        UnsupportedError: a bias for a parameter that has none of its own.
    """
    module = known[parts[0].path].module
    given = {_last(one.path): one for one in parts}
    if fusion.parameter and any(one.bias is not None for one in parts):
        raise UnsupportedError(f"{_under(owner, fusion.whole)}: a bias beside the update of a single parameter")
    rows = _rows(fusion, module, given, owner)
    scaled = {name: _scaled(one, parts[0].scaling) for name, one in given.items()}
    shared = len(scaled) == len(rows) and all(_same(one, parts[0]) for one in scaled.values())
    blocks = [(name, scaled.get(name), rows[name]) for name in fusion.parts]
    dtype = _common(one.b.dtype for one in scaled.values())
    if shared:
        a, b = parts[0].a, torch.cat([scaled[name].b.to(dtype) for name in fusion.parts])
    else:
        ordered = [one for _, one, _ in blocks if one is not None]
        a = torch.cat([one.a.to(_common(one.a.dtype for one in ordered)) for one in ordered])
        b = _diagonal([(one, count) for _, one, count in blocks], a.shape[0], dtype)
    biased = any(one.bias is not None for one in parts)
    bias = torch.cat([_bias(one, count, dtype) for _, one, count in blocks]) if biased else None
    path, parameter = (owner, fusion.whole) if fusion.parameter else (_under(owner, fusion.whole), None)
    return Factors(
        path=path,
        a=a,
        b=b,
        bias=bias,
        alpha=alpha_for(parts[0].scaling, a.shape[0]),
        dropout=max(one.dropout for one in parts),
        parameter=parameter,
    ).checked(path)


def _same(one: Factors, other: Factors) -> bool:
    return one.a.dtype == other.a.dtype and torch.equal(one.a, other.a)


def _common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    common = None
    for dtype in dtypes:
        common = dtype if common is None else torch.promote_types(common, dtype)
    assert common is not None
    return common


def _bias(one: Factors | None, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(rows, dtype=dtype) if one is None or one.bias is None else one.bias.to(dtype)


def _diagonal(blocks: Sequence[tuple[Factors | None, int]], rank: int, dtype: torch.dtype) -> Tensor:
    """Returns (summed rows, rank) with the B of every part beside its own rows of A, zeros elsewhere."""
    b = torch.zeros(sum(rows for _, rows in blocks), rank, dtype=dtype)
    row = column = 0
    for one, rows in blocks:
        if one is not None:
            b[row : row + rows, column : column + one.rank] = one.b
            column += one.rank
        row += rows
    return b


def _scaled(one: Factors, scaling: float) -> Factors:
    """Returns the same update with another scaling."""
    if one.scaling == scaling:
        return one
    ratio = one.scaling / scaling
    b, bias = ((wide(t).double() * ratio).to(t.dtype) if t is not None else None for t in (one.b, one.bias))
    assert b is not None
    return replace(one, b=b, bias=bias, alpha=alpha_for(scaling, one.rank), rslora=False)


def _rows(fusion: Fusion, module: nn.Module, given: Mapping[str, Factors], owner: str) -> dict[str, int]:
    """Returns how many rows each part has, from those of the whole and of the parts that the file has."""
    total = _rows_of(_whole(module, fusion))
    sizes = {name: one.b.shape[0] for name, one in given.items()}
    if fusion.equal:
        rows = [total // len(fusion.parts)] * len(fusion.parts)
    else:
        first, *others = fusion.parts
        other = next((sizes[name] for name in others if name in sizes), None)
        other = (total - sizes[first]) // len(others) if other is None else other
        rows = [total - other * len(others)] + [other] * len(others)
    found = dict(zip(fusion.parts, rows, strict=True))
    if sum(rows) != total or min(rows) < 1 or any(found[name] != size for name, size in sizes.items()):
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise MismatchError(
            f"{_under(owner, fusion.whole)}: {total} rows in the model, which the parts in the file do not make up: "
            f"{said} (each of {', '.join(fusion.parts)} has its place)"
        )
    return found


def _rows_of(whole: Tensor | nn.Module | None) -> int:
    """Returns how many rows a parameter has, or how many outputs a linear layer; 0 for what is neither."""
    if isinstance(whole, Tensor):
        return int(whole.shape[0])
    kind = None if whole is None else adapter_for(whole)
    if whole is None or kind is None or not issubclass(kind, FactoredAdapter):
        return 0
    return int(kind.shape(whole, {})[1 if kind.transposed else 0])


def check_rows(paths: Iterable[str], nodes: Mapping[str, Node], where: object) -> None:
    """Refuses projections that only one of file and model has fused, in an order of rows that the table lacks.

    Raises:
        MismatchError: there are some.
    """
    parts = {name for fusion in FUSIONS for name in fusion.parts}
    problems = []
    for path in paths:
        owner, _, name = path.rpartition(".")
        if path in nodes or owner not in nodes:
            continue
        here = nodes[owner].module._modules
        there = [other for other in (UNKNOWN if name in parts else QKV if name in UNKNOWN else ()) if other in here]
        if there:
            problems.append(f"{path}: the model has {', '.join(there)}")
    if problems:
        raise MismatchError(
            f"{where}: one of file and model has projections in one piece, the other in parts, and nothing says how "
            f"the rows of these lie (some are interleaved by head):\n{listing(problems)}\n"
            "Convert the base too, or the adapter with the program that converted the base."
        )
