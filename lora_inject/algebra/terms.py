"""What goes into a sum: the sites of some adapter files, matched by path and checked against each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..adapter_file import SiteRecord
from ..checkpoint.inputs import Input, Paths, read_inputs
from ..errors import ConfigError, FormatError, LoraInjectError, MismatchError, listing
from ..formats import Source
from .form import Form, Tensors, read_form
from .lowrank import LowRank, of_dense


@dataclass(frozen=True, eq=False)
class Loaded:
    """The numbers of one site in float64, as they are stored, scaling left out.

    Attributes:
        form: how they are matrices.
        tensors: the tensors by name.
    """

    form: Form
    tensors: Tensors

    @cached_property
    def dense(self) -> Tensor | None:
        """The full update as a matrix, where that is what is stored."""
        found = self.tensors.get("lora_dense")
        return None if found is None else self.form.fold_dense(found)

    @cached_property
    def low(self) -> LowRank:
        """The update in factored form."""
        if self.dense is not None:
            return of_dense(self.dense)
        return self.form.fold(self.tensors["lora_A"], self.tensors["lora_B"])

    def matrix(self) -> Tensor:
        """The update as a full matrix, for a sum that is stored as one."""
        return self.low.product() if self.dense is None else self.dense

    def values(self) -> Tensor:
        """The singular values of the update, (..., n), before scaling."""
        return self.low.values() if self.dense is None else torch.linalg.svdvals(self.dense)

    def first_bias(self, name: str) -> Tensor:
        """The bias of the first factor, zero where there is none."""
        return self.tensors.get(name, torch.zeros(self.low.rank, dtype=torch.float64))

    def total_bias(self) -> Tensor | None:
        """All that the biases add to the output before scaling, or None where there are none."""
        first, last = (self.tensors.get(name) for name in self.form.biases or ("", ""))
        return last if last is None or first is None else self.form.total_bias(self.low, first, last)


@dataclass(frozen=True, eq=False)
class Term:
    """One site of one file, and the weight that its update gets.

    Attributes:
        source: the file.
        record: what the file says of the site.
        form: its shapes.
        weight: what the caller multiplies the update by.
    """

    source: Source
    record: SiteRecord
    form: Form
    weight: float

    @property
    def coefficient(self) -> float:
        """The factor before B A: weight times scaling."""
        return self.weight * self.record.config.scaling

    def negated(self) -> Term:
        """Returns the term with the opposite sign."""
        return replace(self, weight=-self.weight)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its tensors."""
        assert self.record.config.dtype is not None
        return self.record.config.dtype

    @property
    def is_dense(self) -> bool:
        """Whether it is stored as a full update."""
        return "lora_dense" in self.source.entries[self.record.path]

    def load(self) -> Loaded:
        """Returns its numbers.

        Raises:
            FormatError: the file cannot be read any more, or holds NaN or infinity.
        """
        keys = {name: f"{self.record.prefix}{name}" for name in self.source.entries[self.record.path]}
        tensors = self.source.read(keys.values())
        bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise FormatError(
                f"{self.source.path}: NaN or infinity in {len(bad)} tensors of site {self.record.path!r}:\n"
                f"{listing(bad)}\nNothing was written: train again from a sound state, or drop the site."
            )
        return Loaded(self.form, {name: tensors[key].double() for name, key in keys.items()})


@dataclass(frozen=True, eq=False)
class Group:
    """The terms that add up at one site, in the order of the files."""

    terms: tuple[Term, ...]

    @property
    def record(self) -> SiteRecord:
        """What the first file says of the site, and the fingerprint of its base from the first that knows it."""
        known = (term.record.base for term in self.terms if term.record.base["hash"] is not None)
        return self.terms[0].record._replace(base=next(known, self.terms[0].record.base))

    @property
    def is_dense(self) -> bool:
        """Whether a term is stored as a full update, so that the sum has to be."""
        return any(term.is_dense for term in self.terms)

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of the biases in the order in which the input meets them; () where no term has any."""
        return next((term.form.biases for term in self.terms if term.form.biases), ())


def read_terms(adapters: Paths, weights: Sequence[float] | None = None) -> list[list[Term]]:
    """Returns the sites of every file, all headers checked; no tensor is read.

    Args:
        adapters: one path or several; a string may end in ":weight".
        weights: one number per file, in place of those in the strings.

    Raises:
        ConfigError: no file, or weights that cannot be used.
        FormatError: a file that is no adapter, or sites that contradict themselves; lists them.
        UnsupportedError: a kind of adapter whose updates do not add up.
    """
    return [_terms(entry) for entry in read_inputs(adapters, weights)]


def _terms(entry: Input) -> list[Term]:
    file, found = entry.file, []
    stray = sorted(set(file.entries) - set(file.sites))
    if stray:
        raise FormatError(f"{file.path}: tensors that belong to no site of the file:\n{listing(stray)}")
    problems: list[tuple[str, LoraInjectError]] = []
    for path, record in file.sites.items():
        try:
            found.append(Term(file, record, read_form(record, file.entries.get(path, {})), entry.weight))
        except LoraInjectError as problem:
            problems.append((path or "(root)", problem))
    if problems:
        kind = FormatError if isinstance(problems[0][1], ConfigError) else type(problems[0][1])
        lines = [f"{path}: {problem}" for path, problem in problems]
        raise kind(f"{file.path}: {len(problems)} sites cannot be read:\n{listing(lines)}")
    return found


def match(files: Sequence[Sequence[Term]], check_base: bool) -> list[Group]:
    """Returns the sites of all files, those of one module together, in the order in which they appear.

    Args:
        files: the sites of every file.
        check_base: whether the files must have been trained on the same weights.

    Raises:
        MismatchError: different kinds or shapes at one site, or different base weights; lists all of them.
    """
    grouped: dict[str, list[Term]] = {}
    known: dict[str, str] = {}
    for terms in files:
        for term in terms:
            names = (term.record.path, *term.record.aliases)
            path = next((known[name] for name in names if name in known), term.record.path)
            grouped.setdefault(path, []).append(term)
            known |= dict.fromkeys(names, path)
    _check_forms(grouped)
    if check_base:
        _check_bases(grouped)
    return [Group(tuple(terms)) for terms in grouped.values()]


def _check_forms(grouped: dict[str, list[Term]]) -> None:
    lines = []
    for path, terms in grouped.items():
        seen = {_describe(term): (term.record.kind, dict(term.record.extras), term.form.outline) for term in terms}
        shapes = list(seen.values())
        if any(shape != shapes[0] for shape in shapes):
            lines.append(f"{path or '(root)'}: {'; '.join(seen)}")
        sizes = {term.form.layout[term.form.biases[-1]] for term in terms if term.form.biases}
        if len(sizes) > 1:
            lines.append(f"{path or '(root)'}: biases of different sizes: {sizes}")
    if lines:
        raise MismatchError(
            f"{len(lines)} sites differ in their kind of adapter or in their shapes, so that no sum is of one kind:\n"
            f"{listing(lines)}\nExport the adapters from the same model, or leave these sites out of one of them."
        )


def _describe(term: Term) -> str:
    form, config = term.form, term.record.config
    shapes = ", ".join(f"{name} {tuple(form.layout[name])}" for name in form.layout if not name.endswith("_bias"))
    return (
        f"{term.source.path.name} has {term.record.kind!r} for {form.weight}, {config.factorization}, "
        f"rank {config.rank}: {shapes}"
    )


def _check_bases(grouped: dict[str, list[Term]]) -> None:
    differ = [
        path or "(root)"
        for path, terms in grouped.items()
        if len({json.dumps(term.record.base) for term in terms if term.record.base["hash"] is not None}) > 1
    ]
    if differ:
        raise MismatchError(
            f"trained on different base weights: {len(differ)} sites differ in the fingerprint of their base:\n"
            f"{listing(differ)}\nCombine adapters of one base, or pass check_base=False (--any-base) if you know that "
            "these will do."
        )


def widest(terms: Sequence[Term]) -> torch.dtype:
    """Returns the narrowest dtype that holds the tensors of all terms."""
    found = terms[0].dtype
    for term in terms[1:]:
        found = torch.promote_types(found, term.dtype)
    return found
