"""Low-rank adapters for any PyTorch model: put in place, merged, taken out without a trace, moved between files."""

from . import adapters as _builtin  # noqa: F401 - importing it registers the built-in classes
from .adapter import Adapter
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
from .convert import Conversion, convert
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
from .formats import Serve
from .loading import load
from .merge import MergeReport, merge, unmerge
from .plan import Plan, plan
from .recipe import Recipe, load_recipe
from .refs import AdapterRef, adapter_parameters, adapters
from .registry import register
from .state import adapter_state, export
from .surgery import inject, uninject
from .switches import activate, disabled, scaled
from .targets import Target
from .verdicts import Report
from .verify import verify
from .version import VERSION as __version__

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
