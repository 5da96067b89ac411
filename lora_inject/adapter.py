"""The contract that every adapter class fulfils."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .bulk import init_module
from .config import SiteConfig
from .offload import adapter_hook
from .rows import Rows

Layout = dict[str, tuple[int, ...]]
"""Names and shapes of an adapter's parameters."""


class Adapter(nn.Module, abc.ABC):
    """The small module that sits in a host and updates its weights, or its output.

    A subclass says which modules it serves (`can_adapt`), which parameters it needs (`layout`) and what update they
    make (`delta`). That is enough for weight space: the host's own forward then reads W + delta. A class that also
    knows the host's forward (`knows_forward`, `base_forward`, `update`) works in output space, which is cheaper.
    """

    kind: ClassVar[str]
    """Short name, used in files, tables and recipes."""
    updates: tuple[str, ...] = ()
    """The host's parameters that `delta` may update, the weight first."""
    parameter: str | None = None
    """The one parameter that the adapter serves, where its site is a parameter instead of a module."""
    extras: ClassVar[tuple[str, ...]] = ()
    """Options of this class alone that a Target may carry."""
    on_request: ClassVar[bool] = False
    """Serve a site only where a Target asks for this class by `adapter=`."""
    mergeable: ClassVar[bool] = True
    """Whether the update can be written into the host's parameters."""
    stacks: ClassVar[bool] = False
    """Whether updates add up by stacking `lora_A` and `lora_B` along the rank, and dense ones by their sum."""

    stored_as: ClassVar[str | None] = None
    """The kind under which files name it, where that is another class's, whose parameters it has."""
    readable: ClassVar[bool] = True
    """Whether who reads an adapted parameter gets W + delta; otherwise only the host's forward applies the update."""

    row_axes: int = 1
    """How many leading axes of the weight count as its rows when it is merged block by block (lora_inject.blocks)."""

    config: SiteConfig
    scaling: float
    enabled = True
    """Switched on and off by `activate`."""
    muted = 0
    """How many open `disabled` contexts cover this adapter."""
    merged = False
    """Whether the host's parameters hold the update now."""
    shared = False
    """Whether its parameters are those of another adapter too, since both update one tied weight."""
    absent: tuple[tuple[str, str], ...] = ()
    """Modules that share its parameters where it was trained, and that this model lacks: paths, and kinds if known."""
    factor = 1.0
    """Product of the open `scaled` contexts."""
    scalings = 0
    """How many open `scaled` contexts cover this adapter."""

    _hf_hook = adapter_hook

    def __init__(
        self,
        config: SiteConfig,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        extras: Mapping[str, Any],
    ) -> None:
        init_module(self, config=config, scaling=config.scaling)
        if "parameter" in extras:
            self.parameter, self.updates = extras["parameter"], self.touches(extras)
        for name, shape in layout.items():
            trained = config.train_a or name != "lora_A"
            self._parameters[name] = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), trained)

    def describe(self) -> dict[str, Any]:
        """Returns the extra options, as a file must hold them, that `layout` needs to make this adapter again."""
        return {}

    @property
    def live(self) -> bool:
        """Whether the update acts beside the host's parameters now."""
        return self.enabled and not self.muted and not self.merged

    @classmethod
    @abc.abstractmethod
    def can_adapt(cls, module: nn.Module) -> bool:
        """Says whether this class serves the module; must not change anything."""

    @classmethod
    def can_adapt_parameter(cls, module: nn.Module, name: str) -> bool:
        """Says whether this class serves that one parameter of a module; must not change anything."""
        return False

    @classmethod
    @abc.abstractmethod
    def layout(cls, module: nn.Module, config: SiteConfig, extras: Mapping[str, Any]) -> Layout:
        """Returns names and shapes of the parameters for this module.

        Raises:
            UnsupportedError: the module or an option cannot be served exactly; says why and what to do.
        """

    @classmethod
    @abc.abstractmethod
    def shape(cls, module: nn.Module, extras: Mapping[str, Any]) -> tuple[int, ...]:
        """Returns the shape of the weight that is adapted."""

    @classmethod
    def weight_dtype(cls, tensor: Tensor) -> torch.dtype:
        """Returns the dtype of the numbers that a stored weight stands for."""
        return tensor.dtype

    @classmethod
    def touches(cls, extras: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns what `updates` of an adapter with these extra options will be."""
        return cls.updates

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[str, ...] | None:
        """Returns the parameters that get an adapter each when the module is selected; None serves it as a whole."""
        return None

    @classmethod
    def also(cls, module: nn.Module) -> tuple[str, ...]:
        """Returns names of children that are selected along with the module."""
        return ()

    @classmethod
    def members(cls, base: type) -> dict[str, Any]:
        """Returns further members that hosts of this base need, whichever adapters they carry; none for other bases.

        They keep right what a base derives from its parameters or children: a list of its weights, a walk.
        """
        return {}

    @classmethod
    def settle(cls, module: nn.Module) -> None:
        """Brings what a base with `members` keeps beside its parameters up to date, once the last adapter is gone."""

    @classmethod
    def knows_forward(cls, module: nn.Module) -> bool:
        """Says whether `base_forward` computes exactly what the module's own forward does."""
        return False

    @staticmethod
    def base_forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the host's output without adapters, from the untouched entries of `host._parameters`."""
        raise NotImplementedError

    @classmethod
    def host_forward(cls, host: Any, live: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the host's output with the update of every live adapter added, one after the other."""
        output = cls.base_forward(host, *args, **kwargs)
        for adapter in live:
            output = adapter.update(host, output, *args, **kwargs)
        return output

    def update(self, host: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the output with this adapter's low-rank path added; args are those of the host's forward."""
        raise NotImplementedError

    @abc.abstractmethod
    def delta(self, host: Any) -> dict[str, Tensor]:
        """Returns the update of each of the host's parameters, in its shape, scale included, float32 or wider."""

    def delta_names(self, host: Any) -> tuple[str, ...]:
        """Returns the keys of `delta`."""
        return tuple(self.delta(host))

    def delta_rows(self, host: Any, name: str) -> Callable[[slice], Tensor]:
        """Returns what gives the rows of one update; as is, they are taken from `delta`, held as a whole.

        A `Rows` may add them to a weight in a way of its own.
        """
        update = self.delta(host)[name]
        flat = update.flatten(0, self.row_axes - 1)
        return lambda rows: flat[rows]

    def axes_of(self, name: str) -> int:
        """Returns how many leading axes of one of the host's parameters count as rows for this adapter alone."""
        return self.row_axes if name == self.updates[0] else 1

    def rows_by(self, host: Any, name: str, axes: int) -> Rows:
        """Returns `delta_rows` with that many leading axes as rows, on which all adapters of a parameter must agree."""
        if axes == self.axes_of(name):
            found = self.delta_rows(host, name)
            return found if isinstance(found, Rows) else Rows(found)
        flat = self.delta(host)[name].flatten(0, axes - 1)
        return Rows(lambda rows: flat[rows])

    def bound(self, name: str) -> float:
        """Returns what no element of one parameter's update exceeds in size; infinity where that is not known."""
        return math.inf

    @classmethod
    def needs_host(cls, config: SiteConfig) -> bool:
        """Says whether `layout` and `delta` read more of the host than the shapes of its parameters."""
        return True

    def reading(self, host: Any, name: str) -> Tensor | None:
        """Returns the update that a reader of one parameter gets, or None; may differ from `delta` by dropout."""
        return self.delta(host).get(name)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draws the parameters anew so that the update is zero: `lora_A` by `config.init`, all others zero.

        Drawn in float32 on the CPU, so that a seed gives the same numbers on every device and in every dtype.

        Args:
            generator: source of the numbers; None is torch's global CPU generator.
        """
        for name, parameter in self._parameters.items():
            if parameter is None or parameter.is_meta:
                continue
            # Instead of no_grad around it, which takes longer than drawing few numbers.
            values = parameter.detach()
            if name == "lora_A":
                _draw(values, self.config.init, generator)
            else:
                values.zero_()


def parameters_of(adapter: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Returns names and parameters, as `named_parameters` does, which is slow where sites are many."""
    if adapter._modules:
        return adapter.named_parameters()
    return [(name, parameter) for name, parameter in adapter._parameters.items() if parameter is not None]


def _draw(values: Tensor, init: str, generator: torch.Generator | None) -> None:
    """Fills A, seen as (rank, columns), leading expert axes apart.

    kaiming: U(-b, b) with b = 1 / sqrt(columns), that is He et al. 2015 (arXiv:1502.01852) with a = sqrt(5), as
    `nn.Linear` does; gaussian: N(0, 1 / rank^2); orthogonal: orthonormal rows or columns (Saxe et al. 2014,
    arXiv:1312.6120).
    """
    direct = values.dtype == torch.float32 and values.is_cpu and values.is_contiguous()
    drawn = values if direct else torch.empty(values.shape, dtype=torch.float32)
    if init == "kaiming":
        bound = 1 / math.sqrt(max(1, math.prod(values.shape[1:])))
        drawn.uniform_(-bound, bound, generator=generator)
    elif init == "gaussian":
        drawn.normal_(0, 1 / values.shape[0], generator=generator)
    else:
        nn.init.orthogonal_(drawn.view(values.shape[0], -1), generator=generator)
    if not direct:
        values.copy_(drawn)
