"""All or nothing: a change of many modules either happens or is taken back, Ctrl-C included."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Undo = Callable[[Callable[[], object]], None]
"""Registers what takes the next step back; call it before the step, and let it be harmless if the step never came."""


@contextmanager
def all_or_nothing() -> Iterator[Undo]:
    """Yields a function that registers undo steps; any exception in the block runs them, last first, and goes on.

    In the main thread Ctrl-C waits until the block is over, and then takes it back, so that it can never fall
    between a step and its registration, or into the way back.
    """
    steps: list[Callable[[], object]] = []
    with _deferred_interrupt() as interrupted:
        try:
            yield steps.append
            if interrupted:
                raise KeyboardInterrupt
        except BaseException:
            for step in reversed(steps):
                step()
            raise


@contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield seen
        return

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
