"""Where automation does not find a small model that builds and runs: what to set, or why there is none."""

from __future__ import annotations

from .exceptional import Exceptions
from .exceptions_images import IMAGES
from .exceptions_sound import SOUND
from .exceptions_text import TEXT
from .exceptions_wholes import WHOLES

EXCEPTIONS: Exceptions = {**IMAGES, **SOUND, **TEXT, **WHOLES}
"""By name of the architecture."""
