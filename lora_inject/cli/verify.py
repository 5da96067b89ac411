"""`lora-inject verify`: whether every adapter of a file has an effect in its model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import Json, app
from .output import rank, show

if TYPE_CHECKING:
    from torch import Tensor


@app.command("verify")
def verify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, or hub id, of a transformers model with its weights.")
    ],
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="The adapter file.")],
    inputs: Annotated[
        Path | None,
        typer.Option(help="Run on the tensors of this .safetensors file, by argument name, not on made-up ones."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Load the model in this dtype (float32, ...) instead of its own.")
    ] = None,
    no_check_base: Annotated[
        bool, typer.Option("--no-check-base", help="Accept base weights other than the adapter was trained on.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the model and list adapters that have no effect or get no gradient; exit code 1 if there is one."""
    import lora_inject as li

    from ..config import DTYPES
    from ..model_inputs import check_inputs, example_inputs
    from ..models import load_pretrained

    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    given = None if inputs is None else _read_inputs(inputs)
    _quiet_transformers()
    loaded = load_pretrained(model, None if dtype is None else DTYPES[dtype])
    if given is not None:
        check_inputs(loaded, given)
    tensors = example_inputs(loaded) if given is None else given
    li.load(loaded, adapter, check_base=not no_check_base)
    report = li.verify(loaded, **tensors)
    show(report, as_json)
    if not report.ok:
        raise typer.Exit(1)


def _read_inputs(path: Path) -> dict[str, Tensor]:
    from ..safefile import read_header, read_tensors

    header = read_header(path)
    return read_tensors(header, header.tensors)


def _quiet_transformers() -> None:
    """Switches off the bars of transformers where nobody watches them, in logs and under torchrun."""
    if rank() or not sys.stderr.isatty():
        try:
            from transformers.utils import logging
        except ImportError:
            return
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
