"""The names of tensors in diffusers' files, of all ages, and what each of them holds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import nn

from .components import COMPONENTS, DENOISERS, TEXT_ENCODERS, clip_paths, pipeline

A, B, BIAS, ALPHA = "a", "b", "bias", "alpha"
ROW_A, ROW_B = "embedding a", "embedding b"

_ENDS = {
    re.compile(r"(lora_A|lora\.down|lora_linear_layer\.down)\.weight"): A,
    re.compile(r"(lora_B|lora\.up|lora_linear_layer\.up)\.weight"): B,
    re.compile(r"(lora_B|lora\.up|lora_linear_layer\.up)\.bias"): BIAS,
    re.compile(r"alpha"): ALPHA,
    re.compile(r"lora_embedding_A"): ROW_A,
    re.compile(r"lora_embedding_B"): ROW_B,
}
_KEY = re.compile(r"(.+?)\.((?:lora_A|lora_B|lora_embedding_[AB]|lora|lora_linear_layer|alpha)(?:\.\w+)*)")
_OLD = re.compile(r"(.+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
"""Of diffusers before 0.18: the attention's processor held the pairs of all four projections."""


def parse(key: str) -> tuple[str, str] | None:
    """Returns the path of a module as the file spells it, and what the tensor holds; None for other tensors."""
    bare = key.replace(".processor.", ".")
    old = _OLD.fullmatch(bare)
    if old is not None:
        return _projection(old[1], old[2]), A if old[3] == "down" else B
    found = _KEY.fullmatch(bare)
    if found is None:
        return None
    held = next((holds for end, holds in _ENDS.items() if end.fullmatch(found[2])), None)
    return None if held is None else (found[1], held)


def _projection(attention: str, name: str) -> str:
    """Returns the module that an old name means: text encoders have other names than denoisers."""
    if attention.startswith("text_encoder"):
        return f"{attention}.{name}_proj"
    return f"{attention}.to_{name}" + (".0" if name == "out" else "")


def keys(component: str, path: str) -> dict[str, str]:
    """Returns the keys of a pair, by what they hold, as diffusers' pipelines write them."""
    if component in TEXT_ENCODERS:
        # Only by this spelling do the pipelines know a text encoder without adapters in its attention.
        stem = f"{component}.{path}.lora_linear_layer"
        return {A: f"{stem}.down.weight", B: f"{stem}.up.weight", BIAS: f"{stem}.up.bias"}
    stem = f"{component}.{path}"
    return {A: f"{stem}.lora_A.weight", B: f"{stem}.lora_B.weight", BIAS: f"{stem}.lora_B.bias"}


def component_of(path: str) -> str:
    """Returns the component that a path in a file begins with, "" where it begins with none."""
    first = path.partition(".")[0]
    return first if first in COMPONENTS else ""


class Spelling:
    """All ways in which files may spell the paths of one model: with its component in front, and alone without."""

    def __init__(self, model: nn.Module | None, paths: Iterable[str] = ()) -> None:
        self.parts = pipeline(model, paths)

    def __call__(self, path: str) -> Collection[str]:
        """Returns every spelling of a path of the model."""
        component, rest = self.parts.split(path)
        paths = (rest,) if component in DENOISERS else clip_paths(rest)
        if self.parts.several:
            return [f"{component}.{one}" for one in paths]
        kind = next((names for names in (DENOISERS, TEXT_ENCODERS) if component in names), COMPONENTS)
        return [*paths, *(f"{name}.{one}" for name in kind for one in paths)]

    def write(self, path: str, where: object) -> tuple[str, str]:
        """Returns the component, and the path in it.

        Raises:
            UnsupportedError: nothing tells which component the path is in.
        """
        component, rest = self.parts.component(path, where)
        return component, clip_paths(rest)[0] if component in TEXT_ENCODERS else rest
