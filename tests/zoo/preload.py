"""Imported once, in the process from which every worker is forked: timm, before transformers asks whether it works.

transformers asks for torchvision, too, since timm does; the models that it builds from timm need none.
"""

from __future__ import annotations

import sys

import transformers.utils
from transformers.utils import import_utils

from .packages import import_timm

import_timm()
if "timm" in sys.modules:
    _, message = import_utils.BACKENDS_MAPPING["timm"]
    import_utils.BACKENDS_MAPPING["timm"] = (lambda: True, message)
    for place in (transformers.utils, import_utils):
        setattr(place, "is_timm_available", lambda: True)  # noqa: B010
