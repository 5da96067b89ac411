"""Are all adapters alive? Finds those that have no effect or get no gradient, and proves that merging is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .commit import deferred_interrupt
from .errors import StateError, UnsupportedError
from .host import OutputHost
from .merge import merge, unmerge
from .refs import AdapterRef, adapters
from .verdicts import Report, Verdict


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Runs the model on an input and reports for each adapter whether it is reached, acts, and gets a gradient.

    The adapters are perturbed by fixed random numbers and restored bit for bit, so that fresh ones (B = 0) count too.
    The model runs in eval mode, once with gradients, once per adapter without it, and once merged; weights, buffers,
    gradients, `training` flags and the random state are afterwards what they were. Adapters that are switched off
    take no part.

    Args:
        model: a model with adapters, nothing merged.
        *args: positional inputs of the model.
        **kwargs: its keyword inputs.

    Returns:
        A report that is true if all is well, and prints as a table with advice.

    Raises:
        StateError: no adapter is switched on, one is merged, or the outputs hold no floating-point tensor.
    """
    refs = list(adapters(model))
    if any(ref.adapter.merged for ref in refs):
        raise StateError("adapters are merged into the weights: call lora_inject.unmerge(model) before verify")
    refs = [ref for ref in refs if ref.adapter.live]
    if not refs:
        raise StateError("the model carries no adapter that is switched on: inject or activate one first")
    with _probing(model, refs):
        reached, gradients = _train_run(model, refs, args, kwargs)
        outputs = _run(model, args, kwargs)
        largest = max((float(out.abs().max()) for out in outputs if out.numel()), default=0.0) or 1.0
        effects = [_without(model, ref.adapter, outputs, args, kwargs) / largest for ref in refs]
        error = _merge_error(model, refs, outputs, args, kwargs)
    verdicts = [
        Verdict(ref.path, ref.name, id(ref.adapter) in reached, effect, gradient)
        for ref, effect, gradient in zip(refs, effects, gradients, strict=True)
    ]
    return Report(tuple(verdicts), None if error is None else error / largest, _bound(refs))


@contextmanager
def _probing(model: nn.Module, refs: list[AdapterRef]) -> Iterator[None]:
    """Perturbs the adapters and sets the model to eval; everything is put back on the way out."""
    parameters = [p for ref in refs for p in ref.adapter.parameters()]
    tensors = [*parameters, *model.buffers()]
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    flags = [(module, module.training) for module in model.modules()]
    trains = [(p, p.requires_grad) for p in parameters]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for ref in refs:
                _perturb(ref.adapter)
            for module, _ in flags:
                module.training = False
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
    finally:
        with deferred_interrupt(), torch.no_grad():
            for module, training in flags:
                module.training = training
            for parameter, training in trains:
                parameter.requires_grad_(training)
            for tensor, before in saved:
                tensor.copy_(before)


@torch.no_grad()
def _perturb(adapter: Adapter) -> None:
    """Adds noise that makes an update of about a tenth of a usual weight, so that half precision shows it too."""
    for name, parameter in adapter.named_parameters():
        size = parameter.shape[-1] if name.endswith("lora_A") else adapter.config.rank
        strength = 1.0 if name.endswith("lora_A") else 0.3 / adapter.scaling
        noise = torch.randn(parameter.shape, dtype=torch.float32) * (strength / max(1, size) ** 0.5)
        parameter.add_(noise.to(parameter))


def _tensors(value: Any) -> list[Tensor]:
    """Returns the floating-point tensors in an output, however it is nested."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [tensor for item in vars(value).values() for tensor in _tensors(item)] if hasattr(value, "__dict__") else []


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    outputs = _tensors(model(*args, **kwargs))
    if not outputs:
        raise StateError(
            "the model's output holds no floating-point tensor, so no effect can be seen: give other inputs"
        )
    return outputs


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [out.double() for out in _call(model, args, kwargs)]


def _train_run(
    model: nn.Module, refs: list[AdapterRef], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[set[int], list[float]]:
    """Returns the ids of the adapters that were used, and the norm of each one's gradient."""
    reached: set[int] = set()
    with _watched(refs, reached), torch.enable_grad():
        outputs = [out for out in _call(model, args, kwargs) if out.requires_grad]
        if not outputs:
            return reached, [0.0] * len(refs)
        total = torch.stack([(out.double() * torch.rand_like(out).double()).sum() for out in outputs]).sum()
        owned = [list(ref.adapter.parameters()) for ref in refs]
        flat = torch.autograd.grad(total, [p for group in owned for p in group], allow_unused=True)
    found = iter(flat)
    norms = []
    for group in owned:
        parts = [next(found) for _ in group]
        norms.append(sum(float(g.double().norm()) ** 2 for g in parts if g is not None) ** 0.5)
    return reached, norms


@contextmanager
def _watched(refs: list[AdapterRef], reached: set[int]) -> Iterator[None]:
    """Notes which adapters are asked for their update, by the host's forward or by a reader of its weight."""

    def noted(adapter: Adapter) -> Any:
        method = adapter.reading

        def reading(host: Any, name: str) -> Tensor | None:
            update = method(host, name)
            # A reader of the bias alone, which most adapters leave as it is, has not used the adapter.
            if update is not None:
                reached.add(id(adapter))
            return update

        return reading

    def called(adapter: Adapter) -> Any:
        return lambda *call: reached.add(id(adapter))

    hooks = []
    for ref in refs:
        ref.adapter.__dict__["reading"] = noted(ref.adapter)
        if isinstance(ref.module, OutputHost):
            hooks.append(ref.module.register_forward_hook(called(ref.adapter)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for ref in refs:
            del ref.adapter.__dict__["reading"]


def _without(
    model: nn.Module, adapter: Adapter, outputs: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> float:
    """Returns the largest change of an output element when one adapter is off."""
    adapter.muted += 1
    try:
        return _distance(outputs, _run(model, args, kwargs))
    finally:
        adapter.muted -= 1


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    # An output of another shape (a generated sequence, a detected box) is as different as can be.
    if [out.shape for out in one] != [out.shape for out in other]:
        return float("inf")
    return max(
        (float((a - b).abs().nan_to_num().max()) for a, b in zip(one, other, strict=True) if a.numel()), default=0.0
    )


def _merge_error(
    model: nn.Module, refs: list[AdapterRef], outputs: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> float | None:
    names = {ref.name for ref in refs}
    names -= {ref.name for ref in refs if not ref.adapter.mergeable}
    if not names:
        return None
    # Ctrl-C waits for this one run: the unmerge, told to stop, would take itself back and leave the model merged.
    with deferred_interrupt():
        try:
            merge(model, *names)
        except UnsupportedError:
            # A weight that is computed from others, or offloaded, is right as it is and never merged.
            return None
        try:
            return _distance(outputs, _run(model, args, kwargs))
        finally:
            unmerge(model)


def _bound(refs: list[AdapterRef]) -> float:
    """Returns how far rounding may carry outputs apart: a few units in the last place per site, added up at random."""
    dtypes = {
        p.dtype for ref in refs for p in ref.module._parameters.values() if p is not None and p.is_floating_point()
    }
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return float(max(8 * eps * len(refs) ** 0.5, 1e-4))
