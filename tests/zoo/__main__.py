"""Runs the zoo: `python -m tests.zoo`, or `python scripts/dev.py zoo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .catalog import architectures
from .pool import run_all

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py zoo", description="Take adapters through every architecture.")
    parser.add_argument("names", nargs="*", help="only these architectures")
    parser.add_argument("--again", action="store_true", help="also those that have a result already")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "zoo", help="folder of the results")
    options = parser.parse_args()
    chosen = [a for a in architectures() if not options.names or a.name in options.names]
    run_all(chosen, options.results, options.again)


if __name__ == "__main__":
    main()
