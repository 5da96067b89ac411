"""What a command prints: a result as text or JSON on standard output, progress on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

Progress = Callable[[int, int, str], None]
"""Takes the bytes that are done, the bytes in all, and the file at work."""


class Result(Protocol):
    """What a command shows: a value that prints as a table and has a form that JSON can hold."""

    def to_dict(self) -> dict[str, Any]: ...


def rank() -> int:
    """Returns this process's number under torchrun, 0 without."""
    number = os.environ.get("RANK", "")
    return int(number) if number.isdecimal() else 0


def show(result: Result, as_json: bool) -> None:
    """Prints a result: one JSON document, or text. Under torchrun only rank 0 prints."""
    if rank():
        return
    if as_json:
        print(json.dumps(_plain(result.to_dict()), indent=2, allow_nan=False))
    elif sys.stdout.isatty():
        _print_styled(str(result))
    else:
        print(result)
    # A reader that went away (`| head`) is noticed here, where it ends the command quietly.
    sys.stdout.flush()


def _print_styled(text: str) -> None:
    """Prints text on a terminal with the headers of its tables, which stand over lines of dashes, in bold."""
    from rich.console import Console

    console, lines = Console(), text.splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        style = "bold" if "-" in below and not below.strip("- ") else None
        # Tables are wider than many terminals: the terminal's own wrapping keeps them copyable.
        console.print(line, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _plain(value: Any) -> Any:
    """Returns the value with null in place of NaN and infinity, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def bytes_bar(what: str) -> Iterator[Progress | None]:
    """Yields a function that moves a bar with bytes per second and the time left; None where nobody would see it."""
    if rank() or not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def move(done: int, total: int, file: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{what} {file}")

        yield move
