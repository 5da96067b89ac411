"""Adapters into everything that can be adapted, with an update of the size of a usual weight, and what is found."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import lora_inject as li

RANK = 2


@dataclass
class Life:
    """What a life cycle found.

    Attributes:
        sites: how many adapters there were.
        refused: sites that lora_inject refuses to adapt, and why.
        silent: sites whose weight, by the reference, has no influence on the outputs for this input.
        computed: sites whose weight is computed from others (weight_norm), whose merge is not tried here.
        untied: parameters that got memory of their own while merged.
        merge_error: largest difference between merged and unmerged outputs, relative to the largest output element.
        effect: how much all adapters together change the outputs, on the same scale.
        noise: what a change of the last bit of every weight makes of the outputs, on the same scale.
    """

    sites: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    merge_error: float = 0.0
    effect: float = 0.0
    noise: float = 0.0


def inject_all(model: nn.Module, life: Life) -> None:
    """Adapts all that can be: "computed" where the weight is computed from others, "default" elsewhere."""
    life.refused = refused(model)
    plan = li.plan(model, "*", rank=RANK, exclude=[literal(path) for path in life.refused])
    life.computed = [site.path for site in plan if is_computed(site)]
    left_out = [literal(path) for path in (*life.refused, *life.computed)]
    life.sites = len(li.inject(model, "*", rank=RANK, exclude=left_out, seed=1))
    if life.computed:
        targets = [literal(path) for path in life.computed]
        life.sites += len(li.inject(model, targets, rank=RANK, name="computed", seed=1))


def is_computed(site: Any) -> bool:
    """Says whether the weight of a site is computed from others (weight_norm): a merge goes through their inverse."""
    weights = site.adapter_class.touches(site.extras)[:1]
    return not set(weights) <= set(site.module._parameters)


def literal(path: str) -> str:
    """Returns a pattern that matches this path alone."""
    return f"re:{re.escape(path)}"


def refused(model: nn.Module) -> dict[str, str]:
    """Returns the sites that are refused, and why; an empty dict where the whole model is accepted."""
    try:
        li.plan(model, "*", rank=RANK)
    except li.UnsupportedError:
        pass
    else:
        return {}
    found = {}
    for path in [name for name, _ in (*model.named_modules(), *model.named_parameters())]:
        try:
            li.plan(model, literal(path), rank=RANK)
        except li.TargetError:
            continue
        except li.UnsupportedError as error:
            if "none can be adapted" not in str(error):
                found[path] = str(error).partition(": ")[2]
    return found


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Gives A and B fixed random numbers, so that every update is of the size of a usual weight."""
    generator = torch.Generator().manual_seed(2)
    for ref in li.adapters(model):
        for name, parameter in ref.adapter.named_parameters():
            columns = max(1, parameter.shape[-1]) if name == "lora_A" else RANK
            strength = (1.0 if name == "lora_A" else 0.1) / columns**0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * strength)


def adapter_tensors(model: nn.Module) -> list[nn.Parameter]:
    """Returns A and B of every adapter, in order."""
    return [parameter for ref in li.adapters(model) for parameter in ref.adapter.parameters()]
