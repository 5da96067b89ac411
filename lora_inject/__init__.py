"""Low-rank adapters for any PyTorch model: put in place, merged, taken out without a trace, moved between files."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import adapters as _builtin  # noqa: F401 - importing it registers the built-in classes
from .adapter import Adapter
from .errors import (
    ConfigError,
    FormatError,
    LoraInjectError,
    MismatchError,
    RecipeError,
    RoundingWarning,
    StateError,
    TargetError,
    UnsupportedError,
)
from .merge import MergeReport, merge, unmerge
from .plan import Plan, plan
from .recipe import Recipe, load_recipe
from .refs import AdapterRef, adapter_parameters, adapters
from .registry import register
from .surgery import inject, uninject
from .switches import activate, disabled, scaled
from .targets import Target
from .verdicts import Report
from .verify import verify
from .version import VERSION as __version__

if _TYPE_CHECKING:
    from .algebra import (
        Combination,
        Extraction,
        Norms,
        Similarity,
        add,
        extract,
        norms,
        resize,
        similarity,
        subtract,
    )
    from .check import CheckReport, check_adapter
    from .checkpoint import CheckpointReport, merge_checkpoint
    from .conversion import Conversion, convert
    from .formats import Serve
    from .loading import load
    from .state import adapter_state, export

__all__ = [
    "Adapter",
    "AdapterRef",
    "CheckReport",
    "CheckpointReport",
    "Combination",
    "ConfigError",
    "Conversion",
    "Extraction",
    "FormatError",
    "LoraInjectError",
    "MergeReport",
    "MismatchError",
    "Norms",
    "Plan",
    "Recipe",
    "RecipeError",
    "Report",
    "RoundingWarning",
    "Serve",
    "Similarity",
    "StateError",
    "Target",
    "TargetError",
    "UnsupportedError",
    "__version__",
    "activate",
    "adapter_parameters",
    "adapter_state",
    "adapters",
    "add",
    "check_adapter",
    "convert",
    "disabled",
    "export",
    "extract",
    "inject",
    "load",
    "load_recipe",
    "merge",
    "merge_checkpoint",
    "norms",
    "plan",
    "register",
    "resize",
    "scaled",
    "similarity",
    "subtract",
    "uninject",
    "unmerge",
    "verify",
]

_LATER = {
    "algebra": "Combination Extraction Norms Similarity add extract norms resize similarity subtract",
    "check": "CheckReport check_adapter",
    "checkpoint": "CheckpointReport merge_checkpoint",
    "conversion": "Conversion convert",
    "formats": "Serve",
    "loading": "load",
    "state": "adapter_state export",
}
_MODULES = {name: module for module, names in _LATER.items() for name in names.split()}
"""What works on files is imported when it is first asked for: more than half of the package, and a quarter second."""


def __getattr__(name: str) -> _Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
