"""The command `lora-inject`. A new command is one file here that joins `app`, and its name in the import below."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from . import (  # noqa: F401 - importing a command adds it to the application
    add,
    check,
    convert,
    extract,
    inspect,
    merge,
    norms,
    plan,
    recipes,
    resize,
    similarity,
    subtract,
    verify,
)
from .app import PROGRAM, app
from .output import rank

# Typer carried its own copy of click from some version on, which has another class of this name.
_UsageError: Any = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: the arguments without the program's name; None means those of the process.

    Returns:
        0 when done, 1 where `verify` or `check` found something, 2 after an error, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        # Names in files of strangers may hold what no terminal can show.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    try:
        code = typer.main.get_command(app).main(arguments, prog_name=PROGRAM, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"{PROGRAM}: error: {_line(error)}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _line(error: Exception) -> str:
    """Returns an error as one line."""
    from ..errors import LoraInjectError

    where = f"rank {rank()}: " if rank() else ""
    if isinstance(error, _UsageError):
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return where + one_line(error.format_message()) + hint
    if isinstance(error, (LoraInjectError, OSError)):
        return where + one_line(str(error) or type(error).__name__)
    return f"{where}{type(error).__name__}: {one_line(str(error))} (unexpected: --debug shows where; please report it)"


def one_line(message: str) -> str:
    """Returns a message of several lines as one: indented lines are the items of a list."""
    text, listed = "", False
    for line in message.splitlines():
        item, words = line.startswith(" "), line.strip()
        if not words:
            continue
        if item and listed:
            text += "; "
        elif listed and not text.endswith("."):
            text += ". "
        elif text:
            text += " "
        text, listed = text + words, item
    return text
