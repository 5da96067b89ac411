"""Modules for which PEFT computes something else than the base's forward with W + Delta W, or fails."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UnsupportedError
from .factors import Factors


def check_conv(factors: Factors, module: nn.Module) -> None:
    """Refuses convolutions whose low-rank path PEFT runs over another grid than the base's.

    Raises:
        UnsupportedError: groups, dilation or a padding mode, none of which PEFT hands on to A.
    """
    odd = [
        f"{name}={value}"
        for name, value, plain in (
            ("groups", getattr(module, "groups", 1), 1),
            ("dilation", getattr(module, "dilation", (1,)), None),
            ("padding_mode", getattr(module, "padding_mode", "zeros"), "zeros"),
        )
        if (set(value) != {1} if isinstance(value, tuple) else value != plain)
    ]
    if odd:
        raise UnsupportedError(
            f"{factors.site}: a convolution with {', '.join(odd)}, which PEFT does not apply to the low-rank path: "
            "merge this site into the base, or leave it out"
        )


def check_padding(factors: Factors, module: nn.Module) -> Factors:
    """Returns the factors of an embedding without an update of its padding row, which takes no part here.

    Raises:
        UnsupportedError: the update of that row is not zero.
    """
    row = getattr(module, "padding_idx", None)
    if row is not None and row < factors.a.shape[1] and torch.count_nonzero(factors.a[:, row]):
        raise UnsupportedError(
            f"{factors.site}: the file updates row {row}, the padding row of the embedding, which never changes here: "
            f"set column {row} of its A to zero if nothing depends on that row"
        )
    return factors
