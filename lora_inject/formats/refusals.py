"""What a format of language models cannot hold, found before anything is written and said in one error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UnsupportedError, listing
from .bundle import Bundle
from .factors import Factors
from .orient import outward

MATRICES = ("linear", "transposed_linear", "embedding")


def matrices_of(bundle: Bundle, program: str) -> list[Factors]:
    """Returns every site as a pair of matrices, or of stacks of matrices, in the order of the input.

    Args:
        bundle: the adapter.
        program: the program whose format cannot hold more, for messages.

    Raises:
        UnsupportedError: sites of another kind, biases, or parameters trained as a whole; names all of them.
    """
    factors = [outward(bundle, record) for record in bundle.sites.values()]
    wrong = [f"{path}: a parameter trained as a whole" for path in bundle.full]
    wrong += [f"{one.site}: {problem}" for one in factors if (problem := _problem(one))]
    refuse(bundle.path, program, wrong)
    return [one.checked(bundle.path) for one in factors]


def refuse(where: Path, program: str, lines: Sequence[str]) -> None:
    """Raises an error with these lines, where there are any.

    Raises:
        UnsupportedError: there are.
    """
    if lines:
        raise UnsupportedError(
            f"{where}: {program}'s format cannot hold what {len(lines)} sites do:\n{listing(lines)}\n"
            "Leave them out, merge them into the base, or keep the adapter in lora_inject's or PEFT's format."
        )


def _problem(one: Factors) -> str:
    if one.bias is not None:
        return "a bias beside B"
    if one.parameter is None and one.kind not in MATRICES:
        return f"an adapter of kind {one.kind!r}"
    if one.parameter is not None and not one.stacked:
        return "a parameter without a module of its own"
    return ""
