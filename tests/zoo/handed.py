"""Inputs that follow from what a model is, rather than from the names of its inputs one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .given_text import Makers
from .handed_images import IMAGES
from .handed_sound import SOUND
from .handed_text import TEXT
from .inputs import Inputs

TABLE: Makers = {**IMAGES, **SOUND, **TEXT}
"""By a pattern for the names of classes."""


def handed(model: Any) -> Iterator[Inputs]:
    """Yields inputs for the models of which the table knows."""
    for pattern, make in TABLE.items():
        if re.fullmatch(pattern, type(model).__name__):
            yield make(model.config)
