"""Projections that one program keeps apart and another as one: rewritten where the rows of both are known for sure.

A fused projection whose rows are those of its parts, one after the other, has an update that is low-rank where theirs
are: A holds all of theirs, B has theirs as blocks on its diagonal. The other way round, a part's update is A with the
part's rows of B. Fused projections with another order of rows, interleaved by head, are refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import FormatError, MismatchError, UnsupportedError
from ..rows import wide
from .factors import Factors, alpha_for
from .fusions import Fusion, StandIn, rows_of, under, whole_of


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
        notes.append(f"{under(owner, fusion.whole)}: fused from {', '.join(_last(one.path) for one in parts)}")
    return found, notes


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def split(one: Factors, stand_in: StandIn) -> list[Factors]:
    """Returns the parts of a fused projection's update: its A with their rows of its B.

    Raises:
        MismatchError: it has not as many rows as they have together.
    """
    fusion = stand_in.fusion
    rows = [rows_of(stand_in.module._modules[part]) for part in fusion.parts]
    if one.b.dim() != 2 or sum(rows) != one.b.shape[0]:
        raise MismatchError(
            f"{one.path}: B {tuple(one.b.shape)} in the file; {', '.join(fusion.parts)} of the model have "
            f"{' + '.join(map(str, rows))} rows: the rows of one are not those of the other"
        )
    biases = [None] * len(rows) if one.bias is None else [bias.clone() for bias in torch.split(one.bias, rows)]
    # Copies, because a file of safetensors does not take two tensors in the same memory.
    return [
        replace(one, path=under(stand_in.owner, part), a=one.a.clone(), b=b.clone(), bias=bias)
        for part, b, bias in zip(fusion.parts, torch.split(one.b, rows), biases, strict=True)
    ]


def fuse(parts: Sequence[Factors], owner: str, fusion: Fusion, known: Mapping[str, StandIn]) -> Factors:
    """Returns the update of a fused projection from those of its parts; parts without one get zero rows.

    The scalings become one: that of the first part, with the ratio to the others multiplied into their B in float64
    and rounded once; a ratio that is a power of two changes no digit. Parts that share A keep its rank.

    Raises:
        FormatError: one part twice.
        MismatchError: the rows do not fit, or the parts are not for one input.
        UnsupportedError: a bias for a parameter that has none of its own.
    """
    _check_parts(parts)
    module = known[parts[0].path].module
    given = {_last(one.path): _scaled(one, parts[0].scaling) for one in parts}
    biased = any(one.bias is not None for one in parts)
    if fusion.parameter and biased:
        raise UnsupportedError(f"{under(owner, fusion.whole)}: a bias beside the update of a single parameter")
    rows = _rows(fusion, module, given, owner)
    blocks = [(given.get(name), rows[name]) for name in fusion.parts]
    ordered = [one for one, _ in blocks if one is not None]
    dtype = _common(one.b.dtype for one in ordered)
    if len(ordered) == len(blocks) and all(_same(one, ordered[0]) for one in ordered):
        a, b = ordered[0].a, torch.cat([one.b.to(dtype) for one in ordered])
    else:
        wide_a = _common(one.a.dtype for one in ordered)
        a, b = torch.cat([one.a.to(wide_a) for one in ordered]), _diagonal(blocks, dtype)
    return Factors(
        path=owner if fusion.parameter else under(owner, fusion.whole),
        a=a,
        b=b,
        bias=torch.cat([_bias(one, count, dtype) for one, count in blocks]) if biased else None,
        alpha=alpha_for(parts[0].scaling, a.shape[0]),
        dropout=max(one.dropout for one in parts),
        parameter=fusion.whole if fusion.parameter else None,
    ).checked(owner)


def _check_parts(parts: Sequence[Factors]) -> None:
    """Refuses parts that are no matrices for one input, and one part twice."""
    paths = [one.path for one in parts]
    if len(set(paths)) != len(paths):
        raise FormatError(f"{max(paths, key=paths.count)} stands twice")
    shapes = {(one.a.dim(), one.b.dim(), one.a.shape[1]) for one in parts}
    if len(shapes) > 1 or next(iter(shapes))[:2] != (2, 2):
        told = ", ".join(f"{one.path}: A {tuple(one.a.shape)}, B {tuple(one.b.shape)}" for one in parts)
        raise MismatchError(f"the parts of a fused projection must be matrices for one and the same input: {told}")


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


def _diagonal(blocks: Sequence[tuple[Factors | None, int]], dtype: torch.dtype) -> Tensor:
    """Returns (summed rows, summed rank) with the B of every part beside its own rows of A, zeros elsewhere."""
    rank = sum(one.rank for one, _ in blocks if one is not None)
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
    total = rows_of(whole_of(module, fusion))
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
            f"{under(owner, fusion.whole)}: {total} rows in the model, which the parts in the file do not make up: "
            f"{said} (each of {', '.join(fusion.parts)} has its place)"
        )
    return found
