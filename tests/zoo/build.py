"""Builds a small model of an architecture straight from its config class, with random weights and no download."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from .agreeing import AGREEING
from .catalog import Architecture, config_class, model_classes
from .exceptions import EXCEPTIONS
from .shrink import shrink

MOST_PARAMETERS = 40_000_000


class TooLarge(Exception):
    """The model has more parameters than this machine should spend time on."""


def small_config(architecture: Architecture, narrow: bool) -> Any:
    """Returns the config of a small model of this architecture.

    Args:
        architecture: which one.
        narrow: also make layers thin; else only fewer.
    """
    cls = config_class(architecture)
    exception = EXCEPTIONS.get(architecture.name)
    fields = shrink(cls(**(exception.start if exception else {})).to_dict(), narrow)
    if narrow and _uses_sections(architecture):
        split_rotary(fields)
    agreeing = AGREEING.get(architecture.name, {}) if narrow else {}
    for path, value in {**agreeing, **(exception.set if exception else {})}.items():
        *parents, name = path.split(".")
        place = fields
        for parent in parents:
            place = place[parent]
        place[name] = value
    return cls.from_dict(fields)


def _uses_sections(architecture: Architecture) -> bool:
    """Says whether the modeling code splits rotary frequencies into sections for time, height and width."""
    modules = {cls.__module__ for cls in model_classes(architecture)} & set(sys.modules)
    return any("mrope_section" in inspect.getsource(sys.modules[name]) for name in modules)


def split_rotary(fields: dict[str, Any]) -> None:
    """Gives every text part sections that fill its small heads; the code's own default fits its large ones."""
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and "num_attention_heads" in fields:
        size = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        share = rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
        half = int(size * share) // 2
        rope["mrope_section"] = [half // 4, half // 4 + half // 8, half - half // 2 - half // 8]
    for value in fields.values():
        if isinstance(value, dict):
            split_rotary(value)


def build(model_class: Any, config: Any, attention: str = "eager", train: bool = False) -> Any:
    """Returns the model, its weights drawn so that no part of it is silent; in eval mode unless asked otherwise.

    Raises:
        TooLarge: more than MOST_PARAMETERS parameters.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class._from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise TooLarge(f"{size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=attention, dtype=torch.float32).train(train)
    wake(model)
    return model


@torch.no_grad()
def wake(model: Any) -> None:
    """Draws weights that are constant at the start (zero gates, layer scales, empty projections) anew.

    A gate at zero hides everything behind it, and no adapter there could be seen to act.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(parameter + noise.to(parameter.dtype))
        elif parameter.dim() >= 2 and not torch.isfinite(parameter).all():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
