"""Sums, differences and cuts of adapter files, from file to file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..checkpoint.inputs import Paths
from ..config import check_name
from .combination import Combination
from .cut import Cut, maybe_cut, one_cut
from .sums import add_up
from .terms import Term, match, read_terms
from .writing import check_out, given_dtype, write

Path = str | os.PathLike[str]


def add(
    adapters: Paths,
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: Any = None,
    name: str | None = None,
    check_base: bool = True,
    overwrite: bool = False,
) -> Combination:
    """Writes the weighted sum of adapter files: ΔW = w1 ΔW1 + w2 ΔW2 + ... at every site, biases included.

    Factors are stacked, so the rank is the sum of the ranks and B A is never formed; a sum that one of the files
    stores as a full update (`lora_dense`) is stored as one. Sites that only some files have are kept. Apart from one
    rounding to the stored dtype the sum is exact, unless `rank` or `energy` cut it: then it is the nearest one of its
    rank (Eckart & Young 1936).

    Args:
        adapters: one path or several; a string may end in ":weight", as in "style.safetensors:0.7".
        out: the file to write.
        weights: one finite number per file, negative ones too, in place of those in the strings.
        rank: keep at most this rank at every site.
        energy: keep the smallest rank whose squared singular values hold this share of their sum, in (0, 1].
        dtype: dtype of the result (a torch dtype or its name); None is the widest of the inputs, site by site.
        name: the adapter's name in the new file; None takes that of the first file.
        check_base: False accepts adapters whose bases have different fingerprints.
        overwrite: allow `out` to exist, and to be one of the inputs.

    Returns:
        What became of every site, with its error.

    Raises:
        ConfigError: options that cannot be used.
        FormatError: a file that cannot be read, contradicts itself, or holds NaN or infinity.
        MismatchError: different kinds, shapes or bases at one site; lists all of them.
        UnsupportedError: a kind of adapter whose updates do not add up.
        StateError: `out` exists, or a sum that is not finite in the stored dtype.
    """
    files = read_terms(adapters, weights)
    cut = maybe_cut(rank, energy)
    return _combine(files, out, cut=cut, dtype=dtype, name=name, check_base=check_base, overwrite=overwrite)


def subtract(a: Path, b: Path, out: Path, **options: Any) -> Combination:
    """Writes the difference of two adapter files: ΔW = ΔW_a - ΔW_b at every site, biases included.

    Args:
        a: the file to subtract from.
        b: the file that is subtracted; a string may end in ":weight".
        out: the file to write.
        **options: rank, energy, dtype, name, check_base and overwrite, as `add` takes them.

    Raises:
        LoraInjectError: as `add` does.
    """
    first, second = read_terms([a, b])
    cut = maybe_cut(options.pop("rank", None), options.pop("energy", None))
    return _combine([first, [term.negated() for term in second]], out, cut=cut, **options)


def resize(
    adapter: Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: Any = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Combination:
    """Writes an adapter with lower ranks: at every site the nearest update of that rank (Eckart & Young 1936).

    A site whose rank is no higher stays bit for bit as it is. All that the biases add to the output is kept: it moves
    into the bias of the last factor. Updates that are stored whole (kind `full`) stay as they are.

    Args:
        adapter: a file written by `export`.
        out: the file to write.
        rank: keep at most this rank at every site; or
        energy: keep the smallest rank whose squared singular values hold this share of their sum, in (0, 1]. The
            matrices of a stack, as packed experts are, share one rank.
        dtype: dtype of the result; None keeps that of the file.
        name: the adapter's name in the new file; None keeps it.
        overwrite: allow `out` to exist, and to be the input.

    Returns:
        What became of every site, with its error.

    Raises:
        LoraInjectError: as `add` does.
    """
    cut = one_cut(rank, energy)
    return _combine(
        read_terms(os.fspath(adapter)), out, cut=cut, dtype=dtype, name=name, check_base=False, overwrite=overwrite
    )


def _combine(
    files: Sequence[Sequence[Term]],
    out: Path,
    *,
    cut: Cut | None,
    dtype: Any = None,
    name: str | None = None,
    check_base: bool = True,
    overwrite: bool = False,
) -> Combination:
    wanted = given_dtype(dtype)
    name = files[0][0].source.name if name is None else check_name(name)
    check_out(out, overwrite, [terms[0].source.path for terms in files])
    groups = match(files, check_base)
    sums = [add_up(group, cut, wanted) for group in groups]
    size = write(out, name, [(record, tensors) for record, tensors, _ in sums])
    return Combination(out=str(out), name=name, size=size, sites=tuple(site for _, _, site in sums))
