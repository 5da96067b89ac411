"""A row of the contract: a kind of module, its input, and the options of its adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lora_inject as li

Inputs = tuple[Any, ...]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plainly(site: nn.Module, *x: Any) -> Any:
    """Calls the module by position."""
    return site(*x)


def by_keyword(site: nn.Module, x: Tensor) -> Any:
    """Calls the module by the name of its input."""
    return site(input=x)


@dataclass(frozen=True)
class Variant:
    """One row: how to make the module and its input, how to call it, and the options of its adapter."""

    kind: str
    name: str
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor | Inputs]
    options: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] = plainly
    """A function of the module and its inputs, defined at the top of a file so that it pickles."""
    at: str = "site"
    """Path of the module that gets the adapter, where that is not the one that is made."""
    parameter: str | None = None
    """Name of the parameter that is the site, where it is no module."""
    linear: bool = True
    """Whether absolute inputs and weights give bounds of the outputs' terms: no softmax, no tanh."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    """The dtypes of inputs that the module itself takes."""
    pickles: bool = True
    """Whether Python can pickle the module itself."""

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.name}"

    @property
    def path(self) -> str:
        return self.at if self.parameter is None else f"{self.at}.{self.parameter}"

    def model(self, dtype: torch.dtype) -> Holder:
        """Returns the same frozen model at every call: freezing alone can change which kernel torch takes."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return Holder(self.make().to(dtype), self.call).requires_grad_(False)

    def thawed(self, dtype: torch.dtype) -> Holder:
        """Returns the model with everything trained that can be."""
        return self.model(dtype).requires_grad_(True)

    def plain(self, dtype: torch.dtype) -> Holder:
        """Returns a frozen model that stands for the same numbers, and whose weights can be computed with."""
        return self.model(dtype)

    def merge(self, model: nn.Module) -> li.MergeReport:
        """Merges all adapters."""
        return li.merge(model)

    def blur(self, base: nn.Module, x: Inputs, size: Tensor) -> Tensor | float:
        """Returns how far the module's own output may be from the exact one beyond the roundings of the dtype.

        Args:
            base: the plain model, in float64.
            x: its inputs, in float64.
            size: the sum of the absolute values of the output's terms.
        """
        return 0.0

    def x(self, dtype: torch.dtype) -> Inputs:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            made = self.input()
        return tuple(map_floats(lambda t: t.to(dtype), made if isinstance(made, tuple) else (made,)))

    def inject(self, model: nn.Module, name: str = "default", **options: Any) -> li.Plan:
        given = {"rank": 3, "alpha": 4.0, "seed": 0} | self.options | options
        dtype = next(model.parameters()).dtype
        own = {key: v.to(dtype) if isinstance(v, Tensor) else v for key, v in self.target.items()}
        return li.inject(model, li.Target(self.path, **own), name=name, **given)


def map_floats(fn: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Returns the inputs with every floating-point tensor mapped, however they are nested."""
    if isinstance(x, Tensor):
        return fn(x) if x.is_floating_point() else x
    return tuple(map_floats(fn, item) for item in x) if isinstance(x, tuple) else x


class Holder(nn.Module):
    """A model with one site."""

    def __init__(self, site: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.site = site
        self.call = call

    def forward(self, *x: Any) -> Any:
        return self.call(self.site, *x)
