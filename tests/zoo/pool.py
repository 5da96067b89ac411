"""Runs the life cycle of one architecture after the other, each in a process of its own with limits."""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
import warnings
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .catalog import Architecture

SECONDS = 90
BYTES = 12 << 30
# What most modeling files import: loaded once in the server from which every worker is forked.
PRELOAD = [
    "tests.zoo.preload",
    "tests.zoo.pool",
    "tests.zoo.lifecycle",
    "tests.zoo.specimen",
    "transformers.masking_utils",
    "transformers.models.clip.modeling_clip",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.detr.modeling_detr",
    "transformers.models.wav2vec2.modeling_wav2vec2",
]


def examine(architecture: Architecture) -> dict[str, Any]:
    """Returns what became of one architecture: its state, what was found, or why there is nothing."""
    from .lifecycle import live
    from .running import Failure
    from .specimen import Missing, brief, find

    try:
        specimen = find(architecture)
    except Missing as missing:
        return {"state": missing.state, "why": missing.problems[0], "problems": missing.problems}
    found = {
        "model": type(specimen.model).__name__,
        "dtype": str(specimen.model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in specimen.model.parameters()),
        "inputs": sorted(specimen.inputs),
        "whole": specimen.whole,
    }
    try:
        return found | {"state": "pass"} | asdict(live(specimen.model, specimen.inputs))
    except Failure as failure:
        state = "not run" if failure.step == "base" else "fail"
        return found | {"state": state, "step": failure.step, "why": failure.what}
    except Exception as error:
        trace = traceback.format_exc()[-1500:]
        return found | {"state": "fail", "step": "error", "why": brief(error), "trace": trace}


def _work(architecture: Architecture, end: Connection) -> None:
    import torch
    import transformers

    _limit_memory()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    end.send(examine(architecture))


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


def examine_apart(architecture: Architecture, seconds: float = SECONDS) -> dict[str, Any]:
    """Does the same in another process, and stops it when it takes too long."""
    context: Any = multiprocessing.get_context()
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
    here, there = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(architecture, there))
    start = time.monotonic()
    worker.start()
    there.close()
    try:
        found = here.recv() if here.poll(seconds) else {"state": "not run", "why": f"takes more than {seconds} s here"}
    except EOFError:
        worker.join()
        found = {"state": "not run", "why": f"its process ended with code {worker.exitcode}"}
    worker.kill()
    worker.join()
    return found | {"seconds": round(time.monotonic() - start, 1)}


def run_all(architectures: list[Architecture], folder: Path, again: bool = False) -> None:
    """Examines every architecture that has no result in the folder yet, and writes one JSON file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for position, architecture in enumerate(architectures):
        file = folder / f"{architecture.name}.json"
        if file.is_file() and not again:
            continue
        found = examine_apart(architecture)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
        part.replace(file)
        line = f"{architecture.name}: {found['state']} {found.get('why', '')[:160]}"
        print(f"{position + 1}/{len(architectures)} {line}", flush=True)
