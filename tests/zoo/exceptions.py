"""Where automation does not find a small model that builds and runs: what to set, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Exception_:
    """What an architecture needs beyond the automation.

    Attributes:
        start: arguments of the config class, before shrinking.
        set: fields to set after shrinking, by dotted path.
        classes: names of model classes to use instead of the automatic choice.
        skip: why there is nothing to build or to run; empty where there is.
    """

    start: Mapping[str, Any] = field(default_factory=dict)
    set: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    skip: str = ""


EXCEPTIONS: dict[str, Exception_] = {}
