"""The life of adapters in one model: injected everywhere, trained, merged, exported, loaded, and gone without a trace.

What the adapted model must compute is not taken from lora_inject: a copy of the base gets W + delta written into its
parameters by hand, and its outputs, and its gradients carried over to A and B by the chain rule, are the reference.
How far two right answers may differ is measured, too, by running that copy with its weights changed in the last bit.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_inject as li

from ..snapshot import assert_same, raw, snapshot, values
from .adapting import Life, adapter_tensors, inject_all, perturb
from .byhand import Reference, by_hand, carry, jiggle
from .running import Failure, check, distance, largest, run, run_backward, same

ROOM = 1000
"""How many times the effect of a last-bit change in every weight two right answers may lie apart."""


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
    check_base(model, inputs)
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


def check_base(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Checks that the model, before it has adapters, has gradients to compare with."""
    try:
        _, gradients = run_backward(model, [p for p in model.parameters() if p.is_floating_point()], inputs)
    except (RuntimeError, AssertionError) as error:
        raise Failure("base", f"it has no backward pass in eval mode: {error}") from error
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)
    check("base", finite, "its gradients are not finite, without any adapter")


def check_frozen(model: nn.Module) -> None:
    """Checks that adapters train and nothing else does."""
    training = {id(parameter) for parameter in adapter_tensors(model)}
    wrong = [name for name, p in model.named_parameters() if p.requires_grad != (id(p) in training)]
    check("freeze", not wrong, f"wrong requires_grad: {wrong[:3]}")


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
    shaken = copy.deepcopy(reference)
    shaken_leaves = list(shaken.leaves.values())
    jiggle(shaken)
    expected, expected_gradients = run_backward(reference.model, leaves, inputs)
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
    merged = {row.path for row in report}
    check("merge", merged == weights(model, "default"), "the report does not list the weights of all adapters")
    check_written(model, base, reference, merged)
    li.unmerge(model)
    try:
        assert_same(injected, model)
    except AssertionError as error:
        raise Failure("unmerge", str(error).split("\n")[0]) from None
    check("unmerge", same(adapted, run(model, inputs)), "outputs differ from those before the merge")


def weights(model: nn.Module, name: str) -> set[str]:
    """Returns the paths of the parameters that the adapters of this name update."""
    refs = [ref for ref in li.adapters(model) if ref.name == name]
    return {f"{ref.host_path}.{key}".lstrip(".") for ref in refs for key in ref.adapter.delta_names(ref.module)}


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
