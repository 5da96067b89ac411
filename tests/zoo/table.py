"""The table of the zoo: every architecture of the installed transformers, pass or the reason why not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .build import MOST_PARAMETERS
from .catalog import Architecture

Result = Mapping[str, Any]
MEANINGS = {
    "pass": "every promise below holds",
    "fail": "a promise of lora_inject does not hold",
    "not run": "it builds, but the zoo has no inputs on which it runs, or its own results cannot be compared",
    "not built": "the zoo has no small model of it here",
}
TRIED = {
    "detectron2": "of which pip finds no release",
    "natten": "whose releases for this torch lack the functions that the model calls",
    "torchaudio": "whose Linux wheels load beside a CUDA build of torch only",
}
"""What came of installing a package that model code asks for."""
HEAD = """\
# The zoo

Every architecture of the installed transformers, made small from its config class with random weights.
Adapters go into everything that can be adapted, and live the whole life that lora_inject promises:

| step | what is checked |
| --- | --- |
| identity | freshly injected, the outputs have the same bits as before |
| alive | outputs equal those of a copy with W + ΔW written into its parameters by hand |
| gradient | A and B get the gradients that follow from that copy by the chain rule, nothing else any |
| disabled | switched off, the outputs are the base's bits |
| merge | merged parameters hold W + ΔW, all others their own bits; the outputs are those from before |
| unmerge | every bit is back |
| load | exported and loaded into a fresh copy, the outputs have the same bits |
| uninject | objects, keys, bytes, flags, hooks and outputs are as before |

How far two right answers may lie apart is measured, by changing the last bit of every weight; most run in float64.
A model whose class has no forward (Bark), or one for a part alone (ESMFold2), runs what users call of it. Reformer,
whose backward pass works in training mode only, is in that mode, without dropout; all others are in eval mode.
`python scripts/dev.py zoo` runs it again and writes this page.
"""
NOTES = """\
*sites* is the number of adapters. Of those, *silent* ones sit at weights that, as the copy by hand shows, have
no influence on the outputs here; they are checked to get no gradient.
The *merge error* is the largest difference between merged and unmerged outputs, relative to the largest element.
*Computed* weights come out of others (weight_norm, parametrize). They are adapted under a second name and go through
every step but the merge, which lora_inject refuses there: nothing could be written that the next call would not
compute anew. *Untied* parameters were shared and had memory of their own while merged.
Where a part has no model class that takes its config alone, or needs what only the whole gives it, a model *around it*
lives the life: a whole that is seen to build modules from the part's config, and to call them when it runs.
"""


def write_table(architectures: Sequence[Architecture], results: Path, page: Path) -> None:
    """Writes the page from the results in a folder, one JSON file per architecture."""
    rows = {a.name: json.loads((results / f"{a.name}.json").read_text(encoding="utf-8")) for a in architectures}
    page.write_text(render(rows), encoding="utf-8")


def render(rows: Mapping[str, Result]) -> str:
    """Returns the page: totals, versions, a table of what passes, and the reasons for the rest."""
    passed = {name: row for name, row in rows.items() if row["state"] == "pass"}
    rest = {name: row for name, row in rows.items() if row["state"] != "pass"}
    parts = [HEAD, _totals(rows, passed), NOTES, "## Pass\n", _passed(passed), "## The rest\n", _rest(rest)]
    return "\n".join(parts)


def _totals(rows: Mapping[str, Result], passed: Mapping[str, Result]) -> str:
    counts = Counter(row["state"] for row in rows.values())
    lines = [
        f"transformers {version('transformers')}, torch {version('torch').partition('+')[0]}, CPU: "
        f"{len(rows)} architectures, {sum(row['sites'] for row in passed.values())} adapters in those that pass.\n",
        "| result | architectures | meaning |",
        "| --- | ---: | --- |",
        *(f"| {state} | {counts[state]} | {meaning} |" for state, meaning in MEANINGS.items()),
    ]
    return "\n".join(lines) + "\n"


def _passed(rows: Mapping[str, Result]) -> str:
    lines = [
        "| architecture | model | parameters | sites | of which | merge error |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    for name, row in rows.items():
        counts = {key: len(row[key]) for key in ("silent", "computed", "untied", "refused")}
        notes = ", ".join(f"{count} {key}" for key, count in counts.items() if count)
        error = f"{row['merge_error']:.0e} ({row['dtype']})"
        model = f"{row['model']} around it" if row.get("whole") else row["model"]
        lines.append(f"| {name} | {model} | {row['parameters']} | {row['sites']} | {notes} | {error} |")
    return "\n".join(lines) + "\n"


def _rest(rows: Mapping[str, Result]) -> str:
    lines = ["| architecture | result | reason |", "| --- | --- | --- |"]
    lines += [f"| {name} | {row['state']} | {_cell(reason(row))} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def reason(row: Result) -> str:
    """Returns why an architecture does not pass, in words where the error says too little or too much."""
    why = str(row["why"])
    package = re.search(r"requires the (\w+) library|No module named '(\w+)'", why)
    if package is not None:
        name = package[1] or package[2]
        return f"needs the package {name}, {TRIED.get(name, 'which is not among those of the zoo')}"
    if "No module named 'transformers.models." in why:
        return "transformers has a config and no modeling file for it"
    if row["state"] == "fail":
        return f"{row['step']}: {why}"
    too_large = re.search(r"(\w+): TooLarge: (\d+) M", why)
    if too_large is not None:
        limit = MOST_PARAMETERS // 10**6
        return f"{too_large[1]} has {too_large[2]} M parameters even when shrunk; the limit is {limit} M"
    return why


def _cell(text: str) -> str:
    """Returns text for a cell of a Markdown table."""
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", " ".join(text.split()))
