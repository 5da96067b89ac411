"""timm for the zoo alone: many vision towers of transformers come from it.

It asks for torchvision, whose published Linux wheels are built for CUDA and do not load beside a CPU build of torch.
So timm comes without what it asks for, into a folder of the zoo's own, and what it imports of torchvision, for
pictures and data sets rather than for models, is stood in for while it is imported where there is no torchvision.
"""

from __future__ import annotations

import enum
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

from torch import nn

TIMM = "timm==1.0.31"
FOLDER = Path(__file__).parents[2] / "build" / "zoo-packages"
NAMES = "ops ops.misc transforms transforms.functional datasets models models.feature_extraction"


def fetch() -> None:
    """Installs timm into the folder of the zoo, unless it is there, and lets new processes find it."""
    if importlib.util.find_spec("timm") is None and not (FOLDER / "timm").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(FOLDER), TIMM]
        if subprocess.run(command, check=False).returncode:
            print(f"{TIMM} could not be installed; the architectures that need it will say so")
    paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


class Modes(enum.Enum):
    """How pictures are resized, by torchvision's names."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _StandIn(types.ModuleType):
    """A module in which every name is some class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Modes if name == "InterpolationMode" else type(name, (nn.Module,), {})


def import_timm() -> None:
    """Imports timm, if it is there, with a stand-in for torchvision that is gone afterwards."""
    if importlib.util.find_spec("timm") is None:
        return
    standing_in = importlib.util.find_spec("torchvision") is None
    names = ["torchvision", *(f"torchvision.{name}" for name in NAMES.split())] if standing_in else []
    sys.modules.update({name: _StandIn(name) for name in names})
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, sys.modules[name])
    try:
        importlib.import_module("timm")
    finally:
        for name in names:
            del sys.modules[name]
