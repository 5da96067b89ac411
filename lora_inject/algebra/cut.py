"""How much of an update is kept: a rank, or a share of its energy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import check_option
from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cut:
    """Where to cut the singular values of a site, the largest first.

    Attributes:
        rank: how many to keep at most; or
        energy: which share of the sum of their squares to keep at least, in (0, 1].
    """

    rank: int | None
    energy: float | None

    def keeps(self, values: Tensor) -> int:
        """Returns the rank to keep, at least 1.

        Args:
            values: singular values (..., n), descending, float64. The matrices of a stack share one rank, and their
                energies count together.
        """
        if self.rank is not None:
            return max(1, min(self.rank, values.shape[-1]))
        assert self.energy is not None
        return energy_rank(values, self.energy, None)


def energy_rank(values: Tensor, energy: float, total: float | None) -> int:
    """Returns the smallest rank, at least 1, whose squared values sum to the share of the total that is asked for.

    Args:
        values: singular values (..., n), descending.
        energy: the share.
        total: sum of all squares where `values` are not all there is; None takes theirs.

    Returns:
        The rank; n + 1 where these values do not reach the share.
    """
    scale = float(values.max()) if values.numel() else 0.0
    if scale == 0:
        return 1
    sums = (values / scale).square().unsqueeze(0).flatten(0, -2).sum(0).cumsum(0)
    wanted = energy * (float(sums[-1]) if total is None else total / scale**2)
    return int((sums < wanted).sum()) + 1


def one_cut(rank: int | None, energy: float | None) -> Cut:
    """Returns the cut that exactly one of both asks for.

    Raises:
        ConfigError: none or both given, or a value that cannot be.
    """
    found = maybe_cut(rank, energy)
    if found is None:
        raise ConfigError("give rank=N, or energy=E for the smallest rank that holds that share (--rank, --energy)")
    return found


def maybe_cut(rank: int | None, energy: float | None) -> Cut | None:
    """Returns the cut that is asked for, or None.

    Raises:
        ConfigError: both given, or a value that cannot be.
    """
    if rank is not None and energy is not None:
        raise ConfigError(f"rank={rank} and energy={energy}: give one of them (--rank or --energy)")
    if rank is not None:
        check_option("rank", rank)
    elif energy is None:
        return None
    elif isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1:
        raise ConfigError(f"energy={energy!r}: must be a share in (0, 1], for example 0.99")
    return Cut(rank, energy)


def effective_rank(values: Tensor) -> float:
    """Returns exp(H(p)) for p = values / their sum (Roy & Vetterli 2007, definition 1); 0 for a zero matrix.

    Args:
        values: singular values in any order, float64.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    return math.exp(float(torch.special.entr(values / total).sum()))


def stable_rank(values: Tensor) -> float:
    """Returns the squared Frobenius norm over the squared spectral norm; 0 for a zero matrix."""
    largest = float(values.max()) if values.numel() else 0.0
    return float((values / largest).square().sum()) if largest else 0.0
