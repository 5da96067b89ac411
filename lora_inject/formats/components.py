"""Pipelines of several models, as diffusion programs adapt them: the denoiser and its text encoders by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from ..errors import MismatchError, UnsupportedError, listing

DENOISERS = ("unet", "transformer", "transformer_2", "prior")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)
"""The names that the pipelines of diffusers give to models with adapters."""
_CLIP = re.compile(r"(encoder\.layers|final_layer_norm)(\.|$)")


@dataclass(frozen=True)
class Pipeline:
    """Which component every path of a model belongs to.

    Attributes:
        single: what a model that is one component is called, None where its class does not tell.
        several: whether the model is a container whose children are the components.
    """

    single: str | None
    several: bool

    def split(self, path: str) -> tuple[str | None, str]:
        """Returns the component of a path, and the path in it."""
        if not self.several:
            return self.single, path
        component, _, rest = path.partition(".")
        return component, rest

    def component(self, path: str, where: object) -> tuple[str, str]:
        """Returns the component of a path, and the path in it, for writing.

        Raises:
            UnsupportedError: nothing tells which component it is.
        """
        component, rest = self.split(path)
        if component not in COMPONENTS:
            raise UnsupportedError(
                f"{where}: {path}: nothing tells whether this is a denoiser or a text encoder: put the model into a "
                f'container that names it, nn.ModuleDict({{"unet": model}}), say (known: {", ".join(COMPONENTS)})'
            )
        return component, rest


def pipeline(model: nn.Module | None, paths: Iterable[str] = ()) -> Pipeline:
    """Returns how a model divides into components; without a model, how the paths of an adapter do."""
    names = (
        {path.partition(".")[0] for path in paths} if model is None else {name for name, _ in model.named_children()}
    )
    return Pipeline(None if model is None else _called(model), bool(names) and names <= set(COMPONENTS))


def _called(model: nn.Module) -> str | None:
    for known in type(model).__mro__:
        if "UNet" in known.__name__:
            return "unet"
        if known.__module__.startswith("diffusers.models.transformers"):
            return "transformer"
        if known.__module__.startswith("transformers.models"):
            return "text_encoder"
    return None


def clip_paths(path: str) -> tuple[str, ...]:
    """Returns a text encoder's path with and without the level that transformers 5 took from CLIP, files' way first."""
    bare = path.removeprefix("text_model.")
    return (f"text_model.{bare}", bare) if _CLIP.match(bare) else (path,)


def check_one(where: object, fitting: Collection[str]) -> None:
    """Refuses a file for several components that all fit one model.

    Raises:
        MismatchError: the file has more than one component whose paths are the model's.
    """
    if len(fitting) > 1:
        raise MismatchError(
            f"{where}: the file is for several components, and more than one fits this model:\n"
            f"{listing(sorted(fitting))}\nPut the model into a container that says which it is, "
            'nn.ModuleDict({"text_encoder": model}), say, and load with strict=False for a part of the file alone.'
        )
