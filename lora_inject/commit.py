"""All or nothing: a change of many modules either happens or is taken back, Ctrl-C included."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Undo = Callable[[Callable[[], object]], None]
"""Registers what takes the next step back; call it before the step, and let it be harmless if the step never came."""


@contextmanager
def all_or_nothing() -> Iterator[Undo]:
    """Yields a function that registers undo steps; any exception in the block runs them, last first, and goes on.

    In the main thread Ctrl-C waits until the block is over and goes to the program's own handler then; if that raises,
    as Python's does, the block is taken back. So it can never fall between a step and its registration, or into the
    way back.
    """
    steps: list[Callable[[], object]] = []
    with deferred_interrupt() as deliver:
        try:
            yield steps.append
            deliver()
        except BaseException:
            _take_back(steps)
            raise


def _take_back(steps: list[Callable[[], object]]) -> None:
    """Runs every step, last first: one that fails must not keep those before it from running."""
    failures = []
    for step in reversed(steps):
        try:
            step()
        except Exception as failed:
            failures.append(f"{type(failed).__name__}: {failed}")
    if failures:
        listed = "; ".join(failures)
        warnings.warn(
            f"{len(failures)} of {len(steps)} steps could not be taken back ({listed}): load the model anew",
            RuntimeWarning,
            stacklevel=2,
        )


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Makes Ctrl-C wait until the block is over: what must be done whole, as a way back, is done and not taken back.

    Yields a function that hands an interrupt that came meanwhile to the handler that was there before.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    seen: list[FrameType | None] = []

    def deliver() -> None:
        if seen:
            before(signal.SIGINT, seen.pop(0))

    signal.signal(signal.SIGINT, lambda number, frame: seen.append(frame))
    try:
        yield deliver
    finally:
        signal.signal(signal.SIGINT, before)
        # One that came after the last look is too late to undo anything, but must not be lost.
        deliver()
