"""`lora-inject check`: whether a program reads an adapter as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, app
from .output import show


@app.command("check")
def check(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter of any known format.")],
    reader: Annotated[
        str, typer.Option("--for", metavar="READER", help="vllm, sglang, tgi, llama.cpp, diffusers, peft or mlx.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Folder of the base: tells layers that have no adapter.")
    ] = None,
    max_rank: Annotated[int, typer.Option(min=1, help="The highest rank that vLLM is started with.")] = 16,
    as_json: Json = False,
) -> None:
    """Say what a program would refuse, drop or mis-scale in an adapter; exit code 1 if it would."""
    from ..check import check_adapter
    from ..models import build_on_meta

    built = None if model is None else build_on_meta(model)
    report = check_adapter(adapter, reader, model=built, max_rank=max_rank)
    show(report, as_json)
    if not report.ok:
        raise typer.Exit(1)
