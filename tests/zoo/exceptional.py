"""What an architecture may need beyond the automation."""

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
        attention: the implementation, where its eager one has a defect.
        sharp: False where its code rounds to float32 on the way, so that nothing is gained by float64.
        train: True where its backward pass works in training mode only, in which it then runs, without dropout.
        contradiction: a piece of the error that transformers raises for every config, and what contradicts what there.
    """

    start: Mapping[str, Any] = field(default_factory=dict)
    set: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    attention: str = "eager"
    sharp: bool = True
    train: bool = False
    contradiction: tuple[str, str] = ("", "")


Exceptions = Mapping[str, Exception_]
