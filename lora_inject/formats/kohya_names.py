"""How kohya's files spell a module: a prefix for the component, and the path with "_" for ".", diffusers' or LDM's."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from .components import DENOISERS, TEXT_ENCODERS, clip_paths, pipeline

_DENOISER = ("lora_unet", "lora_transformer", "lora_prior_unet", "lycoris")
PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": _DENOISER,
    "transformer": ("lora_transformer", "lora_unet", "lycoris"),
    "transformer_2": ("lora_transformer_2",),
    "prior": ("lora_prior_unet", "lora_unet"),
    "text_encoder": ("lora_te1", "lora_te", "lora_prior_te"),
    "text_encoder_2": ("lora_te2", "lora_te3"),
    "text_encoder_3": ("lora_te3",),
}
"""Prefixes by component, the one to write first. T5 is `lora_te3` even where it is a pipeline's second encoder."""
KNOWN = tuple(dict.fromkeys(prefix for prefixes in PREFIXES.values() for prefix in prefixes))
_NAME = re.compile(rf"({'|'.join(sorted(KNOWN, key=len, reverse=True))})_[^.]+")

_LDM = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def prefix_of(name: str) -> str | None:
    """Returns the prefix of a module's name in a file, None where it has none that kohya's programs write."""
    found = _NAME.fullmatch(name)
    return found.group(1) if found else None


def flat(path: str) -> str:
    """Returns a path as one word."""
    return path.replace(".", "_")


class Spelling:
    """All ways in which files may spell the paths of one model.

    Attributes:
        parts: which component a path belongs to.
    """

    def __init__(self, model: nn.Module | None, paths: Iterable[str] = ()) -> None:
        """Looks at a model; without one, at the paths of an adapter, which must then begin with their component."""
        self.parts = pipeline(model, paths)
        several: dict[str | None, nn.Module] = {} if model is None else dict(model.named_children())
        alone: dict[str | None, nn.Module] = {} if model is None else {self.parts.single: model}
        self._members = several if self.parts.several else alone
        self._ldm = {name: ldm_paths(member) for name, member in self._members.items() if name not in TEXT_ENCODERS}

    def __call__(self, path: str) -> Collection[str]:
        """Returns every spelling of a path of the model."""
        component, rest = self.parts.split(path)
        paths = clip_paths(rest) if component not in DENOISERS else (rest,)
        ldm = self._ldm.get(component, {}).get(rest)
        words = [flat(one) for one in (*paths, *([ldm] if ldm else []))]
        return [f"{prefix}_{word}" for prefix in self._read(component) for word in words]

    def write(self, path: str, where: object) -> str:
        """Returns the spelling that the trainers write: LDM's for the UNet of SDXL, else diffusers'.

        Raises:
            UnsupportedError: nothing tells which component the path is in.
        """
        component, rest = self.parts.component(path, where)
        ldm = self._ldm.get(component, {})
        if any("label_emb" in theirs for theirs in ldm.values()):
            rest = ldm.get(rest, rest)
        if component in TEXT_ENCODERS:
            rest = clip_paths(rest)[0]
        return f"{self._first(component)}_{flat(rest)}"

    def _read(self, component: str | None) -> Collection[str]:
        """Returns the prefixes of a component; one model alone may be any of its kind."""
        if self.parts.several:
            return PREFIXES.get(component or "", ())
        kinds = (DENOISERS, TEXT_ENCODERS)
        kind = next((names for names in kinds if component in names), PREFIXES)
        return dict.fromkeys(prefix for name in kind for prefix in PREFIXES[name])

    def _first(self, component: str) -> str:
        if "T5" in type(self._members.get(component)).__name__:
            return "lora_te3"
        several = "text_encoder_2" in self._members
        return "lora_te" if component == "text_encoder" and not several else PREFIXES[component][0]


def ldm_paths(unet: nn.Module) -> dict[str, str]:
    """Returns the paths in the first Stable Diffusion code, by those of diffusers' UNet; empty for other models.

    There the blocks are one list per direction: each residual block with the attention behind it, each change of
    resolution as an entry of its own on the way down and behind the last block of its level on the way up.
    """
    children = dict(unet.named_children())
    if not {"down_blocks", "mid_block", "up_blocks"} <= children.keys():
        return {}
    blocks = _LDM | _down(children["down_blocks"]) | _up(children["up_blocks"])
    paths = [path for path, _ in unet.named_modules() if path]
    found = {path: _ldm_path(path, blocks) for path in paths}
    return {path: theirs for path, theirs in found.items() if theirs is not None}


def _ldm_path(path: str, blocks: Mapping[str, str]) -> str | None:
    depth = {"down_blocks": 4, "up_blocks": 4, "mid_block": 3}.get(path.partition(".")[0], 2)
    segments = path.split(".")
    block, rest = ".".join(segments[:depth]), ".".join(segments[depth:])
    if block not in blocks:
        return None
    if ".resnets." in block:
        rest = _RESNET.get(rest, rest)
    elif ".downsamplers." in block:
        rest = rest.replace("conv", "op")
    return f"{blocks[block]}.{rest}".rstrip(".")


def _down(levels: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    at = 1
    for number, level in enumerate(levels.children()):
        for layer in range(_count(level, "resnets")):
            found[f"down_blocks.{number}.resnets.{layer}"] = f"input_blocks.{at}.0"
            found[f"down_blocks.{number}.attentions.{layer}"] = f"input_blocks.{at}.1"
            at += 1
        if _count(level, "downsamplers"):
            found[f"down_blocks.{number}.downsamplers.0"] = f"input_blocks.{at}.0"
            at += 1
    return found


def _up(levels: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    at = 0
    for number, level in enumerate(levels.children()):
        for layer in range(_count(level, "resnets")):
            found[f"up_blocks.{number}.resnets.{layer}"] = f"output_blocks.{at}.0"
            found[f"up_blocks.{number}.attentions.{layer}"] = f"output_blocks.{at}.1"
            at += 1
        place = 2 if _count(level, "attentions") else 1
        found[f"up_blocks.{number}.upsamplers.0"] = f"output_blocks.{at - 1}.{place}"
    return found


def _count(level: nn.Module, name: str) -> int:
    return sum(1 for _ in dict(level.named_children()).get(name, nn.Module()).children())
