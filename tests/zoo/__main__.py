"""Runs the zoo and writes its table: `python scripts/dev.py zoo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .catalog import architectures
from .packages import fetch
from .pool import run_all
from .table import write_table

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="dev.py zoo",
        description="Take adapters through every architecture, and write docs/zoo.md. "
        "A run that was cut short goes on where it was; after a change to the code, use --again.",
    )
    parser.add_argument("names", nargs="*", help="only these architectures; the table is left as it is")
    parser.add_argument("--again", action="store_true", help="also those that have a result already")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "zoo", help="folder of the results")
    options = parser.parse_args()
    everything = architectures()
    unknown = set(options.names) - {architecture.name for architecture in everything}
    if unknown:
        parser.error(f"no such architecture in the installed transformers: {', '.join(sorted(unknown))}")
    chosen = [a for a in everything if not options.names or a.name in options.names]
    fetch()
    run_all(chosen, options.results, options.again)
    if not options.names:
        write_table(everything, options.results, ROOT / "docs" / "zoo.md")


if __name__ == "__main__":
    main()
