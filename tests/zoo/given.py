"""Inputs of models that cannot be guessed from the names of their arguments and the sizes in their config."""

from __future__ import annotations

from .given_images import IMAGES
from .given_senses import SENSES
from .given_sound import SOUND
from .given_text import TEXT, Makers
from .given_wholes import WHOLES

GIVEN: Makers = {**IMAGES, **SENSES, **SOUND, **TEXT, **WHOLES}
"""By name of the architecture: makes all inputs from the config of the model."""
