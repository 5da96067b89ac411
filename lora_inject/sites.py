"""Sites: what one module gets, and the checks that say whether it can be served exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, Layout
from .config import SiteConfig, derive
from .errors import ConfigError, StateError, UnsupportedError, did_you_mean
from .host import Host, base_class, base_tensor, family_for, is_outermost, slot
from .tree import INNER, Node


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """One place that a target selected.

    Attributes:
        path: the first path of the module, or of the parameter where that is the site.
        aliases: further paths of the same object.
        module: the module object, untouched by planning.
        adapter_class: the class that will serve it.
        config: its options, overrides applied.
        extras: options of the adapter class alone.
        layout: names and shapes of the adapter's parameters.
        shape: shape of the adapted weight, () for a whole block.
        key: prefix of the module's entries in the state dict.
        dtype: dtype of the adapter's parameters.
        device: device of the adapter's parameters.
    """

    path: str
    aliases: tuple[str, ...]
    module: nn.Module
    adapter_class: type[Adapter]
    config: SiteConfig
    extras: Mapping[str, Any]
    layout: Layout
    shape: tuple[int, ...]
    key: str
    dtype: torch.dtype
    device: torch.device

    @property
    def parameters(self) -> int:
        """How many numbers the adapter holds."""
        return sum(math.prod(shape) for shape in self.layout.values())

    @property
    def prefix(self) -> str:
        """What stands before the parameters' names in a file."""
        return f"{self.path}." if self.path else ""


def make_site(
    node: Node, adapter_class: type[Adapter], config: SiteConfig, name: str, extras: Mapping[str, Any]
) -> Site:
    """Returns the site of one module after every check.

    Args:
        node: the module and its paths.
        adapter_class: the class that serves it.
        config: its options.
        name: the injection's name.
        extras: options of the adapter class alone.

    Raises:
        ConfigError: an extra option that the class does not know.
        StateError: the module has an adapter of that name.
        UnsupportedError: the module, in its present state, cannot be served exactly.
    """
    module = node.module
    for option in extras:
        if option not in adapter_class.extras:
            raise ConfigError(
                f"adapter {adapter_class.kind!r} has no option {option!r}: {did_you_mean(option, adapter_class.extras)}"
            )
    parameter = extras.get("parameter")
    names = adapter_class.touches(extras)
    _check_free(module, slot(name, parameter))
    _check_class(module, adapter_class, names)
    dtype, device = _check_tensors(module, names)
    if config.dtype is None:
        half = dtype.itemsize < 4
        config = derive(config, (("dtype", torch.float32 if half else dtype),))
    return Site(
        path=join(node.path, parameter),
        aliases=tuple(join(path, parameter) for path in node.paths[1:]),
        module=module,
        adapter_class=adapter_class,
        config=config,
        extras=extras,
        layout=adapter_class.layout(module, config, extras),
        shape=adapter_class.shape(module, extras),
        key=node.key,
        dtype=config.dtype,  # type: ignore[arg-type]
        device=device,
    )


def join(path: str, parameter: str | None) -> str:
    """Returns the path of a parameter, or of its module where none is given."""
    return path if parameter is None else f"{path}.{parameter}" if path else parameter


def _check_free(module: nn.Module, key: str) -> None:
    if isinstance(module, Host):
        if key in module.adapters:
            name = key.partition("@")[0]
            raise StateError(
                f"already carries an adapter named {name!r}: give another name=, or uninject(model, {name!r}) first"
            )
        if module.adapters.kept:
            raise StateError("adapters are merged into it: call lora_inject.unmerge(model) first")
    elif INNER in module._modules or INNER in module.__dict__ or hasattr(type(module), INNER):
        raise UnsupportedError(
            f"{type(module).__name__} has an attribute {INNER!r} of its own, where the adapters would go: exclude it, "
            "or rename that attribute"
        )


def _check_class(module: nn.Module, adapter_class: type[Adapter], names: tuple[str, ...]) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError("a TorchScript module cannot be changed: inject before torch.jit.script or trace")
    family = family_for(adapter_class, module)
    if family is None and not names:
        raise UnsupportedError(
            "its forward was replaced on the instance (by accelerate's hooks, say), past which an adapter of the whole "
            "block cannot act: remove the hook, inject, and add the hook again"
        )
    if not isinstance(module, Host):
        return
    if module.lora_family is not None and module.lora_family is not family:
        raise UnsupportedError(
            f"carries adapters of kind {module.lora_family.kind!r}, beside which {adapter_class.kind!r} cannot work: "
            "uninject those first"
        )
    if not is_outermost(module) and not set(names) <= set(module.lora_names):
        raise UnsupportedError(
            f"its class was changed to {type(module).__name__} after it got adapters: undo that first (last in, "
            "first out)"
        )


def _check_tensors(module: nn.Module, names: tuple[str, ...]) -> tuple[torch.dtype, torch.device]:
    """Returns dtype and device of the adapted weight."""
    tensor: Any = base_tensor(module, names[0]) if names else next(module.parameters(), None)
    if tensor is None and not names:
        return torch.get_default_dtype(), torch.get_default_device()
    if tensor is None:
        raise UnsupportedError(f"{base_class(module).__name__} has no parameter {names[0]!r}")
    if type(tensor) is not nn.Parameter:
        _check_special(tensor)
    if not tensor.dtype.is_floating_point:
        raise UnsupportedError(f"its weight has dtype {tensor.dtype}: only floating-point weights can be adapted")
    return tensor.dtype, _working_device(module, tensor)


def _check_special(tensor: Any) -> None:
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        raise UnsupportedError("its weight has no shape yet: run the model once on real input, then inject")
    if hasattr(tensor, "device_mesh"):
        raise UnsupportedError(
            "its weight is a DTensor (sharded already): inject first, then call fully_shard or parallelize_module"
        )


def _working_device(module: nn.Module, tensor: Any) -> torch.device:
    """Returns where the weight is while the module runs: accelerate brings an offloaded one there from elsewhere."""
    if not tensor.is_meta:
        return tensor.device  # type: ignore[no-any-return]
    hook = module.__dict__.get("_hf_hook")
    devices = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    found = [device for device in devices if device is not None]
    return torch.device(found[-1]) if found else tensor.device
