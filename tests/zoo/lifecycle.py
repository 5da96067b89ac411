"""The life of adapters in one model: injected everywhere, trained, merged, exported, loaded, and gone without a trace.

What the adapted model must compute is not taken from lora_inject: a copy of the base gets W + delta written into its
parameters by hand, and its outputs, and its gradients carried over to A and B by the chain rule, are the reference.
How far two right answers may differ is measured, too, by running that copy with its weights changed in the last bit.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_inject as li
from lora_inject.host import base_tensor

from ..snapshot import assert_same, raw, snapshot, values

RANK = 2
ROOM = 1000
"""How many times the effect of a last-bit change in every weight two right answers may lie apart."""


HUGE = 1e8
"""Outputs beyond this are masks, not numbers."""


class Failure(Exception):
    """A promise that does not hold: the step, and what is wrong."""

    def __init__(self, step: str, what: str) -> None:
        super().__init__(f"{step}: {what}")
        self.step = step
        self.what = what


@dataclass
class Life:
    """What a life cycle found.

    Attributes:
        sites: how many adapters there were.
        refused: sites that lora_inject refuses to adapt, and why.
        silent: sites whose weight, by the reference, has no influence on the outputs for this input.
        computed: sites whose weight is computed from others (weight_norm), which cannot be merged.
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


def live(base: nn.Module, inputs: Mapping[str, Any]) -> Life:
    """Takes adapters through their life in a copy of the base.

    Args:
        base: a model in eval mode; stays as it is.
        inputs: keyword inputs with which it runs, in its dtype.

    Raises:
        Failure: a promise does not hold.
    """
    life = Life()
    base = copy.deepcopy(base).requires_grad_(False)
    plain = run(base, inputs)
    if not same(plain, run(base, inputs)):
        raise Failure("base", "two runs of the base differ in bits, so nothing can be compared")
    model = copy.deepcopy(base).requires_grad_(True)
    run(model, inputs)
    before = snapshot(model)
    inject_all(model, life)
    check("identity", same(plain, run(model, inputs)), "outputs of the freshly injected model differ from the base's")
    perturb(model)
    adapted, gradients = run_backward(model, adapter_tensors(model), inputs)
    check_frozen(model)
    reference = by_hand(base, model)
    check_against_reference(life, model, reference, plain, adapted, gradients, inputs)
    check_switch(model, plain, inputs)
    adapted = run(model, inputs)
    check_merge(life, model, reference, base, adapted, inputs)
    check_file(model, base, adapted, inputs)
    li.uninject(model)
    try:
        assert_same(before, model)
    except AssertionError as error:
        raise Failure("uninject", str(error).split("\n")[0]) from None
    check("uninject", same(plain, run(model.requires_grad_(False), inputs)), "outputs differ from the base's")
    return life


def check(step: str, holds: bool, what: str) -> None:
    """Raises Failure unless the promise holds."""
    if not holds:
        raise Failure(step, what)


def inject_all(model: nn.Module, life: Life) -> None:
    """Adapts everything that can be adapted: "default" where a merge can be written, "computed" elsewhere."""
    life.refused = refused(model)
    plan = li.plan(model, "*", rank=RANK, exclude=[literal(path) for path in life.refused])
    life.computed = [
        site.path for site in plan if not set(site.adapter_class.touches(site.extras)[:1]) <= set(site.module._parameters)
    ]
    left_out = [literal(path) for path in (*life.refused, *life.computed)]
    life.sites = len(li.inject(model, "*", rank=RANK, exclude=left_out, seed=1))
    if life.computed:
        life.sites += len(li.inject(model, [literal(path) for path in life.computed], rank=RANK, name="computed", seed=1))


def literal(path: str) -> str:
    """Returns a pattern that matches this path alone."""
    import re

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


def tensors(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Returns every tensor in an output, however it is nested; caches are objects with tensors in them."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return [value]
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type(None), nn.Module, type)):
        return []
    seen.add(id(value))
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (list, tuple)):
        items = list(value)
    else:
        items = list(getattr(value, "__dict__", {}).values())
    return [tensor for item in items for tensor in tensors(item, seen)]


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Runs the model, with the same random numbers every time, on copies of the inputs."""
    torch.manual_seed(0)
    return tensors(model(**copy.deepcopy(dict(inputs))))


def run(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Returns the outputs without gradients."""
    with torch.no_grad():
        return [tensor.clone() for tensor in forward(model, inputs)]


def run_backward(
    model: nn.Module, wanted: list[Any], inputs: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Returns the outputs, and the gradients of a fixed random projection of them."""
    with torch.enable_grad():
        outputs = forward(model, inputs)
        generator = torch.Generator().manual_seed(3)
        total: Any = 0.0
        for output in outputs:
            if output.is_floating_point() and output.requires_grad:
                weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
                total = total + (usable(output.double()) * weights).sum()
        if isinstance(total, float):
            raise Failure("base", "no output depends on the weights in a differentiable way")
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return [output.detach() for output in outputs], list(gradients)


def usable(tensor: Tensor) -> Tensor:
    """Returns the tensor with masked-out scores (infinite, or near the largest number of a dtype) set to zero."""
    return torch.where(torch.isfinite(tensor) & (tensor.abs() < HUGE), tensor, torch.zeros_like(tensor))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Says whether two lists of outputs have the same bits."""
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and raw(a) == raw(b) for a, b in zip(one, other, strict=True)
    )


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Returns the largest difference of two elements, relative to the largest element of that output."""
    worst = 0.0
    if [a.shape for a in one] != [b.shape for b in other]:
        return float("inf")
    for a, b in zip(one, other, strict=True):
        if a.is_floating_point() and a.numel():
            a, b = usable(a.double()), usable(b.double())
            scale = float(a.abs().max()) or 1.0
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def largest(tensor: Tensor) -> float:
    """Returns the largest absolute value, zero for an empty tensor."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def check_frozen(model: nn.Module) -> None:
    """Checks that adapters train and nothing else does."""
    training = {id(parameter) for parameter in adapter_tensors(model)}
    wrong = [name for name, p in model.named_parameters() if p.requires_grad != (id(p) in training)]
    check("freeze", not wrong, f"wrong requires_grad: {wrong[:3]}")


class Plus(nn.Module):
    """Adds a delta to a weight that is computed anew before every use."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(delta)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


@dataclass
class Reference:
    """A copy of the base with W + delta in its parameters, and those parameters by site."""

    model: nn.Module
    leaves: dict[tuple[str, str], Tensor]


@torch.no_grad()
def by_hand(base: nn.Module, adapted: nn.Module) -> Reference:
    """Returns a copy of the base into which the delta of every adapter is written, shared weights apart."""
    made = copy.deepcopy(base)
    leaves: dict[tuple[str, str], Tensor] = {}
    for ref in li.adapters(adapted):
        module = made.get_submodule(ref.host_path)
        for name, delta in ref.adapter.delta(ref.module).items():
            leaves[ref.path, name] = add(module, name, delta.detach())
    return Reference(made, leaves)


def add(module: nn.Module, name: str, delta: Tensor) -> Tensor:
    """Adds a delta to a parameter, and returns the leaf whose gradient is that of the sum."""
    weight = module._parameters.get(name)
    if weight is not None:
        setattr(module, name, nn.Parameter(weight + delta.to(weight.dtype)))
        return module._parameters[name]  # type: ignore[return-value]
    if parametrize.is_parametrized(module, name):
        plus = Plus(delta.to(getattr(module, name).dtype))
        parametrize.register_parametrization(module, name, plus)
        return plus.delta
    leaf = delta.to(base_tensor(module, name).dtype).requires_grad_()
    module.register_forward_pre_hook(lambda m, _: setattr(m, name, getattr(m, name) + leaf))
    return leaf


@torch.no_grad()
def jiggle(reference: Reference) -> nn.Module:
    """Returns the model of the reference with every weight changed in its last bit."""
    generator = torch.Generator().manual_seed(4)
    for parameter in reference.model.parameters():
        if parameter.is_floating_point():
            eps = torch.finfo(parameter.dtype).eps
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + eps * sign.to(parameter.dtype))
    return reference.model


def check_against_reference(
    life: Life,
    model: nn.Module,
    reference: Reference,
    plain: list[Tensor],
    adapted: list[Tensor],
    gradients: list[Tensor | None],
    inputs: Mapping[str, Any],
) -> None:
    """Checks outputs and the gradient of every adapter against the model with W + delta written by hand."""
    leaves = list(reference.leaves.values())
    for leaf in leaves:
        leaf.requires_grad_(True)
    expected, expected_gradients = run_backward(reference.model, leaves, inputs)
    shaken = copy.deepcopy(reference)
    shaken_leaves = list(shaken.leaves.values())
    jiggle(shaken)
    noisy, noisy_gradients = run_backward(shaken.model, shaken_leaves, inputs)
    eps = max(torch.finfo(t.dtype).eps for t in expected if t.is_floating_point())
    life.noise = max(distance(expected, noisy), eps)
    life.effect = distance(expected, plain)
    check("alive", life.effect > ROOM * life.noise, f"all adapters together change the outputs by {life.effect:.2g}")
    error = distance(expected, adapted)
    check(
        "alive",
        error <= ROOM * life.noise,
        f"outputs are off W + delta by {error:.2g}; the adapters change them by {life.effect:.2g}, "
        f"rounding by {life.noise:.2g}",
    )
    want = carry(model, reference.leaves, expected_gradients)
    noise = carry(model, reference.leaves, noisy_gradients)
    position = 0
    wrong = []
    for ref in li.adapters(model):
        count = len(list(ref.adapter.parameters()))
        got = gradients[position : position + count]
        position += count
        if not any(bool((g != 0).any()) for g in want[ref.path, ref.name]):
            life.silent.append(ref.path)
        wrong += [
            f"{ref.path}: {found}"
            for found in compare(got, want[ref.path, ref.name], noise[ref.path, ref.name], eps)
            if found
        ]
    check("gradient", not wrong, f"{len(wrong)} adapters get another gradient than W + delta gives: {wrong[:4]}")


def carry(
    model: nn.Module, leaves: Mapping[tuple[str, str], Tensor], gradients: list[Tensor | None]
) -> dict[tuple[str, str], list[Tensor]]:
    """Returns the gradients of A and B of every adapter that follow from those of the sums W + delta."""
    by_leaf = dict(zip(leaves, gradients, strict=True))
    found = {}
    for ref in li.adapters(model):
        factors = list(ref.adapter.parameters())
        with torch.enable_grad():
            parts = [
                (delta.double() * grad.double()).sum()
                for name, delta in ref.adapter.delta(ref.module).items()
                if (grad := by_leaf[ref.path, name]) is not None
            ]
            total = sum(parts) if parts else None
            made = torch.autograd.grad(total, factors, allow_unused=True) if parts else [None] * len(factors)
        found[ref.path, ref.name] = [torch.zeros_like(p) if g is None else g for p, g in zip(factors, made, strict=True)]
    return found


def compare(got: list[Tensor | None], want: list[Tensor], noisy: list[Tensor], eps: float) -> list[str]:
    """Returns what is wrong with each gradient of an adapter, or an empty string."""
    found = []
    for have, right, shaken in zip(got, want, noisy, strict=True):
        have = torch.zeros_like(right) if have is None else have
        size = largest(right)
        room = ROOM * max(largest(right - shaken), eps * size, 1e-30)
        error = largest(have - right)
        found.append("" if error <= room else f"off by {error:.2g} of {size:.2g}, rounding explains {room:.2g}")
    return found


def check_switch(model: nn.Module, plain: list[Tensor], inputs: Mapping[str, Any]) -> None:
    """Checks that switched-off adapters leave the base's outputs."""
    with li.disabled(model):
        check("disabled", same(plain, run(model, inputs)), "outputs of disabled adapters differ from the base's")


def check_merge(
    life: Life,
    model: nn.Module,
    reference: Reference,
    base: nn.Module,
    adapted: list[Tensor],
    inputs: Mapping[str, Any],
) -> None:
    """Merges, compares outputs and every parameter, and unmerges to the bit."""
    injected = snapshot(model)
    report = li.merge(model, "default")
    life.untied = list(report.untied)
    life.merge_error = distance(adapted, run(model, inputs))
    check(
        "merge",
        life.merge_error <= ROOM * life.noise,
        f"merged outputs are off by {life.merge_error:.2g}; rounding by {life.noise:.2g}",
    )
    check_written(model, base, reference, {row.path for row in report})
    li.unmerge(model)
    try:
        assert_same(injected, model)
    except AssertionError as error:
        raise Failure("unmerge", str(error).split("\n")[0]) from None
    check("unmerge", same(adapted, run(model, inputs)), "outputs differ from those before the merge")


def check_written(model: nn.Module, base: nn.Module, reference: Reference, merged: set[str]) -> None:
    """Checks that merged parameters hold W + delta and all others their own bits."""
    original, by_hand_ = (dict(m.named_parameters(remove_duplicate=False)) for m in (base, reference.model))
    aliases = {id(p): name for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in original:
            continue
        if name in merged or aliases[id(parameter)] in merged:
            room = 4 * torch.finfo(parameter.dtype).eps * max(1.0, largest(parameter))
            off = largest(parameter - by_hand_[name])
            check("merge", off <= room, f"{name} is off W + delta by {off:.2g}")
        else:
            check("merge", raw(parameter) == raw(original[name]), f"{name} changed, and no adapter sits there")


def check_file(model: nn.Module, base: nn.Module, adapted: list[Tensor], inputs: Mapping[str, Any]) -> None:
    """Exports every adapter, loads it into a fresh copy, and compares outputs to the bit."""
    fresh = copy.deepcopy(base)
    names = dict.fromkeys(ref.name for ref in li.adapters(model))
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            li.load(fresh, li.export(model, Path(folder) / f"{name}.safetensors", name))
    check("load", same(adapted, run(fresh, inputs)), "outputs after export and load differ")
    check("load", list(values(fresh)) == list(values(model)), "state dict keys differ after export and load")
