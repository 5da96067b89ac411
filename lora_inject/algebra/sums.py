"""The sum of the updates of one site: exact in factored form, cut where asked for, and rounded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter_file import SiteRecord
from ..config import SiteConfig
from ..errors import StateError
from .cut import Cut
from .lowrank import LowRank, difference, stack
from .terms import Group, Loaded, widest


@dataclass(frozen=True, slots=True)
class SumSite:
    """What became of one site.

    Attributes:
        path: path of the site.
        adapter: kind of the adapter class.
        shape: shape of the adapted weight.
        before: sum of the ranks of the terms; of a full update, the rank that its options give.
        rank: rank as it is stored.
        norm: Frobenius norm of the exact sum, scaling included and biases left out.
        error: Frobenius norm of the exact sum minus what is stored: what the cut and the rounding took.
    """

    path: str
    adapter: str
    shape: tuple[int, ...]
    before: int
    rank: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """The error over the norm; 0 for a zero update."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True, eq=False)
class _Sum:
    """The sum in float64, before it is rounded.

    Attributes:
        config: the options it is stored with.
        exact: what it should be, before scaling.
        kept: what is stored of it, a full matrix where the site is dense; before scaling.
        biases: the biases to store.
    """

    config: SiteConfig
    exact: LowRank
    kept: LowRank | Tensor
    biases: Mapping[str, Tensor]


def add_up(group: Group, cut: Cut | None, dtype: torch.dtype | None) -> tuple[SiteRecord, dict[str, Tensor], SumSite]:
    """Returns the sum at one site: its record, its tensors, and what was lost.

    Args:
        group: the terms.
        cut: the rank or energy to keep; None keeps all.
        dtype: dtype of the result; None is the widest of the terms.

    Raises:
        StateError: the sum is not finite in that dtype.
        FormatError: a file holds NaN or infinity.
    """
    found = _sum(group, cut)
    config = replace(found.config, dtype=dtype or widest(group.terms))
    tensors = _round(group, found, config)
    site = SumSite(
        path=group.record.path,
        adapter=group.record.kind,
        shape=group.terms[0].form.weight,
        before=_ranks(group),
        rank=config.rank,
        norm=found.exact.norm() * config.scaling,
        error=_error(group, found, tensors) * config.scaling,
    )
    return group.record._replace(config=config), tensors, site


def _ranks(group: Group) -> int:
    """Returns the rank of the sum: that of the stacked factors, or the one that made a full update a full one."""
    ranks = [term.record.config.rank for term in group.terms if term.is_dense or not group.is_dense]
    return max(ranks) if group.is_dense else sum(ranks)


def _sum(group: Group, cut: Cut | None) -> _Sum:
    """Adds up with one scale in front, the largest coefficient: its term's numbers then stay as they are."""
    loaded = [term.load() for term in group.terms]
    coefficients = [term.coefficient for term in group.terms]
    scale = max(map(abs, coefficients)) or 1.0
    factors = [coefficient / scale for coefficient in coefficients]
    exact = stack([part.low.scaled(factor) for part, factor in zip(loaded, factors, strict=True)])
    if cut is not None and not group.terms[0].form.whole:
        found = _cut(group, loaded, exact.scaled(scale), coefficients, cut)
        if found is not None:
            return found
    if not group.is_dense:
        config = replace(_config(group, scale), dense=False)
        return _Sum(config, exact, exact, _stacked_biases(group, loaded, factors))
    matrix = _weighted([part.matrix() for part in loaded], factors)
    return _Sum(_config(group, scale), exact, matrix, _last_bias(group, loaded, factors))


def _config(group: Group, scale: float) -> SiteConfig:
    """Returns the options that give the scale; of a single term the way that it is written down stays."""
    config, weight = group.record.config, abs(group.terms[0].weight)
    if len(group.terms) == 1 and weight:
        alpha = config.alpha if weight == 1 else (config.rank if config.alpha is None else config.alpha) * weight
        return replace(config, alpha=alpha)
    rank, dense = _ranks(group), group.is_dense or config.dense
    alpha = None if scale == 1 else scale * rank
    return replace(config, rank=rank, alpha=alpha, rslora=False, dense=dense, bias=bool(group.biases))


def _cut(
    group: Group, loaded: Sequence[Loaded], exact: LowRank, coefficients: Sequence[float], cut: Cut
) -> _Sum | None:
    """Returns the best sum of the rank that the cut keeps, or None where that is all there is."""
    svd = exact.svd()
    rank = cut.keeps(svd.s)
    whole = min(exact.b.shape[-2], exact.a.shape[-1]) if group.is_dense else exact.rank
    if rank >= whole or rank > svd.s.shape[-1]:
        return None
    config = replace(group.record.config, rank=rank, alpha=None, rslora=False, dense=False, bias=bool(group.biases))
    biases = _last_bias(group, loaded, coefficients)
    if biases:
        biases = {group.biases[0]: torch.zeros(rank, dtype=torch.float64)} | biases
    return _Sum(config, exact, exact.cut(svd, rank), biases)


def _weighted(parts: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    return torch.stack([part * factor for part, factor in zip(parts, factors, strict=True)]).sum(0)


def _stacked_biases(group: Group, loaded: Sequence[Loaded], factors: Sequence[float]) -> dict[str, Tensor]:
    """Returns the biases of stacked factors; B carries the weights of the terms, and so does the bias behind it."""
    if not group.biases:
        return {}
    first, last = group.biases
    inner = [part.first_bias(first) for part in loaded]
    if first == "lora_B_bias":
        inner = [bias * factor for bias, factor in zip(inner, factors, strict=True)]
    given = [(part.tensors[last], factor) for part, factor in zip(loaded, factors, strict=True) if last in part.tensors]
    return {first: torch.cat(inner), last: _weighted(*zip(*given, strict=True))}


def _last_bias(group: Group, loaded: Sequence[Loaded], factors: Sequence[float]) -> dict[str, Tensor]:
    """Returns the one bias that adds to the output, in which those of the first factors are contained."""
    totals = [(part.total_bias(), factor) for part, factor in zip(loaded, factors, strict=True)]
    given = [(total, factor) for total, factor in totals if total is not None]
    return {group.biases[-1]: _weighted(*zip(*given, strict=True))} if given else {}


def _round(group: Group, found: _Sum, config: SiteConfig) -> dict[str, Tensor]:
    """Returns the tensors to store, rounded once."""
    form = group.terms[0].form
    if isinstance(found.kept, LowRank):
        a, b = form.unfold(found.kept)
        exact = {"lora_A": a, "lora_B": b}
    else:
        exact = {"lora_dense": form.unfold_dense(found.kept)}
    tensors = {name: tensor.to(config.dtype) for name, tensor in (exact | dict(found.biases)).items()}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise StateError(
            f"{group.record.path or '(root)'}: {', '.join(bad)} of the sum are not finite in {config.dtype}: nothing "
            "was written. Give a wider dtype, or smaller weights"
        )
    return tensors


def _error(group: Group, found: _Sum, tensors: Mapping[str, Tensor]) -> float:
    """Returns the distance of what is stored from what it should be, before scaling."""
    form = group.terms[0].form
    if isinstance(found.kept, Tensor):
        return float((form.fold_dense(tensors["lora_dense"].double()) - found.kept).norm())
    stored = form.fold(tensors["lora_A"].double(), tensors["lora_B"].double())
    same = torch.equal(stored.a, found.exact.a) and torch.equal(stored.b, found.exact.b)
    return 0.0 if same else difference(found.exact, stored).norm()
