"""An adapter from a full fine-tune: the difference of two checkpoints, weight by weight, at a low rank."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter_file import SiteRecord
from ..checkpoint.base import Base, read_base
from ..config import SiteConfig, check_name
from ..errors import LoraInjectError, StateError
from .cut import Cut, one_cut
from .extraction import ExtractedSite, Extraction, Left
from .form import Form, WholeForm, make_form
from .lowrank import LowRank
from .parameters import Place
from .selected import Pair, select, unreadable
from .sketch import decompose
from .weights import Delta, Scan
from .writing import check_out, given_dtype, write

Path = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class _Made:
    """One site of the new adapter."""

    record: SiteRecord
    tensors: dict[str, Tensor]
    row: ExtractedSite


@torch.no_grad()
def extract(
    base: Path,
    tuned: Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: object = None,
    exclude: object = (),
    whole: object = (),
    dtype: Any = None,
    name: str = "default",
    overwrite: bool = False,
) -> Extraction:
    """Writes an adapter that turns the base into a fine-tune of it, as nearly as its rank allows.

    Each weight is read from both checkpoints in blocks of rows; neither model is built. The difference is cut at its
    leading singular vectors: exactly where a side is small, else by randomized subspace iteration (Halko, Martinsson &
    Tropp 2011, arXiv:0909.4061). The error that is reported is what the stored factors leave of the difference.

    With a `config.json` that transformers knows, paths and kinds are those of its model, tied weights included;
    otherwise they follow from names and shapes, and the result says so.

    Args:
        base: the checkpoint before: a folder with `*.safetensors`, with or without an index, or one such file.
        tuned: the checkpoint after.
        out: the adapter file to write.
        rank: keep this rank at every site, less where the weight is smaller; or
        energy: keep the smallest rank that holds this share of the squared Frobenius norm, in (0, 1].
        targets: patterns over the paths of modules and parameters; None takes every weight that changed.
        exclude: patterns that leave parameters out.
        whole: patterns of parameters whose difference is stored whole, whatever their shape: norms and biases, say.
        dtype: dtype of the adapter; None means float32 for half-precision bases, else the base's.
        name: the adapter's name.
        overwrite: allow `out` to exist.

    Returns:
        Every site with its rank and error, and every changed tensor that is not in the adapter.

    Raises:
        ConfigError: options that cannot be used.
        FormatError: a checkpoint that cannot be read, or holds NaN or infinity.
        MismatchError: tensors that only one checkpoint has, or of different shapes; lists all of them.
        TargetError: a pattern that selects nothing.
        StateError: `out` exists, or nothing that could be stored changed.
        UnsupportedError: tensors that the model builds its weights from in a way that rows cannot describe.
    """
    cut, wanted = one_cut(rank, energy), given_dtype(dtype)
    check_name(name)
    before, after = read_base(base), read_base(tuned)
    check_out(out, overwrite, [shard.path for side in (before, after) for shard in side.shards])
    chosen = select(before, after, targets, exclude, whole)
    made: list[_Made] = []
    left: list[Left] = []
    for pair in chosen.pairs:
        found = _take(pair, cut, wanted)
        if isinstance(found, _Made):
            made.append(found)
        elif found is not None:
            left.append(found)
    unchanged = len(chosen.pairs) - len(made) - len(left)
    left += [
        Left(key, _shape(before, key), None, "belongs to no parameter")
        for key in chosen.loose
        if _differs(before, after, key)
    ]
    if not made:
        listed = (
            f"; changed but not a matrix: {', '.join(one.path for one in left[:12])} (whole=, --whole)" if left else ""
        )
        raise StateError(f"{tuned}: no matrix differs from {base}, so there is nothing to write{listed}")
    size = write(out, name, [(one.record, one.tensors) for one in made])
    return Extraction(str(out), name, size, tuple(one.row for one in made), tuple(left), unchanged, chosen.note)


def _take(pair: Pair, cut: Cut, dtype: torch.dtype | None) -> _Made | Left | None:
    """Returns the site of a changed parameter, or why it is left, or None where nothing changed."""
    path, shape = pair.parameter.paths[0], pair.before.shape
    why = unreadable(pair)
    if why:
        same = all(_differs(pair.before.base, pair.after.base, piece.key) is False for piece in pair.before.pieces)
        return None if same else Left(path, shape, None, why)
    place = pair.place
    form = WholeForm(shape, {}) if place is None else _form(place, pair)
    deltas = _deltas(pair, form)
    scans = [delta.scan() for delta in deltas]
    norm = sum(scan.energy for scan in scans) ** 0.5
    if not any(bool(scan.rows.any()) for scan in scans):
        return None
    if place is None:
        return Left(path, shape, norm, "neither a matrix nor a stack of matrices (whole=, --whole)")
    half = pair.before.dtype.itemsize < 4
    dtype = dtype or (torch.float32 if half else pair.before.dtype)
    tensors, rank, exact = _whole(deltas, form, dtype) if form.whole else _low(deltas, scans, form, cut, dtype)
    config = SiteConfig(rank=rank, dtype=dtype)
    record = _record(place, config)._replace(base=pair.before.fingerprint())
    error = _error(deltas, form, tensors)
    row = ExtractedSite(record.path, record.kind, shape, rank, norm, error, exact)
    return _Made(record, _finite(record, tensors), row)


def _record(place: Place, config: SiteConfig) -> SiteRecord:
    path, *aliases = place.paths
    return SiteRecord(path, tuple(aliases), place.kind.kind, config, place.extras, {})


def _form(place: Place, pair: Pair) -> Form:
    try:
        return make_form(place.kind, _record(place, SiteConfig(rank=1)), pair.before.shape, None)
    except LoraInjectError as error:
        raise type(error)(f"{pair.parameter.paths[0]}: {error}; or leave it out (exclude=, --exclude)") from error


def _deltas(pair: Pair, form: Form) -> list[Delta]:
    count = pair.before.shape[0] if pair.before.axes == 2 else 1
    return [Delta(pair.before, pair.after, form, number) for number in range(count)]


def _low(
    deltas: list[Delta], scans: list[Scan], form: Form, cut: Cut, dtype: torch.dtype
) -> tuple[dict[str, Tensor], int, bool]:
    low, exact = decompose(deltas, scans, cut)
    flat = low if deltas[0].before.axes == 2 else LowRank(low.b[0], low.a[0])
    a, b = form.unfold(flat)
    return {"lora_A": a.to(dtype), "lora_B": b.to(dtype)}, low.rank, exact


def _whole(deltas: list[Delta], form: Form, dtype: torch.dtype) -> tuple[dict[str, Tensor], int, bool]:
    matrix = torch.cat([delta.whole() for delta in deltas])
    return {"lora_dense": form.unfold_dense(matrix).to(dtype)}, 1, True


def _error(deltas: list[Delta], form: Form, tensors: dict[str, Tensor]) -> float:
    """Returns the distance of the stored tensors from the difference, which is read once more."""
    if form.whole:
        stored = form.fold_dense(tensors["lora_dense"].double())
        return math.sqrt(sum(delta.residual(stored, None) for delta in deltas))
    low = form.fold(tensors["lora_A"].double(), tensors["lora_B"].double())
    b, a = (low.b, low.a) if low.b.dim() == 3 else (low.b[None], low.a[None])
    return math.sqrt(sum(delta.residual(b[i], a[i]) for i, delta in enumerate(deltas)))


def _finite(record: SiteRecord, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise StateError(
            f"{record.path}: {', '.join(bad)} overflow in {record.config.dtype}; nothing was written: give a wider one"
        )
    return tensors


def _shape(base: Base, key: str) -> tuple[int, ...]:
    return base.tensors[key].entry.shape


def _differs(base: Base, tuned: Base, key: str) -> bool:
    """Says whether a tensor of both checkpoints differs in dtype, shape or bytes."""
    one, other = base.tensors.get(key), tuned.tensors.get(key)
    if one is None or other is None or (one.entry.dtype, one.size) != (other.entry.dtype, other.size):
        return True
    step, position = 2**24, 0
    with one.header.path.open("rb") as first, other.header.path.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        while position < one.size:
            count = min(step, one.size - position)
            if first.read(count) != second.read(count):
                return True
            position += count
    return False
