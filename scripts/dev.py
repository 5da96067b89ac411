"""Make the repository's own environment in .venv, then run one of its jobs there.

Call it with any Python that is new enough, from any directory: `python scripts/dev.py test`. It uses the standard
library only, and installs again when constraints.txt or pyproject.toml has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed.txt"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_PYTHON = (3, 10)


class DevError(Exception):
    """What went wrong and what to do next, in one line."""


class Job(NamedTuple):
    """What to run in .venv: each step is a call of its Python, the last one takes the user's arguments."""

    summary: str
    extra: str
    steps: tuple[tuple[str, ...], ...]


LINT = (
    ("-m", "ruff", "format", "--check", "--quiet"),
    ("-m", "ruff", "check", "--quiet"),
    ("-m", "mypy"),
)
JOBS = {
    "demo": Job("adapt a real model to real text and show what it brings", "demo", (("scripts/demo.py",),)),
    "lint": Job("format, lint and types", "test", LINT),
    "test": Job("format, lint, types, then pytest", "test", (*LINT, ("-m", "pytest"))),
    "zoo": Job("take adapters through every transformers architecture", "test", (("-m", "tests.zoo"),)),
}


def pinned_version(package: str, constraints: str) -> str:
    """The version that the text of a constraints file gives to `package`."""
    pin = re.search(rf"^{re.escape(package)}==([^\s;]+)", constraints, re.MULTILINE)
    if pin is None:
        raise DevError(f"constraints.txt has no pin for {package}; add a line '{package}==VERSION'")
    return pin[1]


def fingerprint(root: Path) -> str:
    """A hash of all that decides what is installed; the root is part of it, as an editable install points there."""
    parts = (str(root).encode(), (root / "constraints.txt").read_bytes(), (root / "pyproject.toml").read_bytes())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def write_stamp(stamp: Path, digest: str, extras: set[str]) -> None:
    """Record that `extras` are installed as `digest` asks."""
    stamp.write_text("\n".join([digest, *sorted(extras)]) + "\n", encoding="utf-8")


def installed_extras(stamp: Path, digest: str) -> set[str]:
    """The extras that are installed as `digest` asks; none if the stamp is missing or of another digest."""
    if not stamp.is_file():
        return set()
    found, *extras = stamp.read_text(encoding="utf-8").split() or [""]
    return set(extras) if found == digest else set()


def say(message: str) -> None:
    print(f"dev.py: {message}", flush=True)


def venv_works() -> bool:
    """Whether .venv has a Python that starts, is new enough and has pip."""
    probe = f"import pip, sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    try:
        return subprocess.run([PYTHON, "-c", probe], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def make_venv() -> None:
    say(f"making {VENV} with Python {sys.version.split()[0]}")
    if subprocess.call([sys.executable, "-m", "venv", "--clear", str(VENV)]) != 0:
        raise DevError("could not make .venv; if Python's venv module is missing, install it (Debian: python3-venv)")


def pip_install(*what: str) -> None:
    """Install under the constraints; pip shows its errors and nothing else."""
    command = [PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", CONSTRAINTS, *what]
    if subprocess.call(command, cwd=ROOT) != 0:
        raise DevError(f"pip could not install {what[-1]}; its reason is above, mend that and run this again")


def check_torch(pin: str) -> None:
    """Raise unless .venv holds the pinned torch; builds of one version (+cpu, +cu130) are as good as each other."""
    query = "from importlib.metadata import version; print(version('torch'))"
    found = subprocess.run([PYTHON, "-c", query], stdout=subprocess.PIPE, text=True).stdout.strip()
    if found.split("+")[0] != pin:
        raise DevError(f"torch came out as {found or 'nothing'} instead of {pin}; delete .venv and run this again")


def install(extra: str) -> None:
    """Bring .venv to what constraints.txt and pyproject.toml ask for, with `extra` in it; quick when it is there."""
    digest = fingerprint(ROOT)
    # Without a stamp an install was cut short, perhaps in the middle of a package that pip then takes for complete.
    if not (STAMP.is_file() and venv_works()):
        make_venv()
    extras = installed_extras(STAMP, digest)
    if extra in extras:
        return
    STAMP.unlink(missing_ok=True)
    torch = pinned_version("torch", CONSTRAINTS.read_text(encoding="utf-8"))
    say(f"installing torch {torch}; this can take minutes")
    # First and alone: resolved together with other packages, another build of torch may be pulled.
    pip_install(f"torch=={torch}")
    say(f"installing lora_inject with what '{extra}' needs")
    pip_install("--editable", f".[{extra}]")
    check_torch(torch)
    write_stamp(STAMP, digest, extras | {extra})


def run(job: Job, arguments: list[str]) -> int:
    """Run the steps in order and return the first exit code that is not 0."""
    steps = [*job.steps[:-1], (*job.steps[-1], *arguments)]
    for step in steps:
        say(f"python {' '.join(step)}")
        code = subprocess.call([PYTHON, *step], cwd=ROOT)
        if code != 0:
            return code if code > 0 else 128 - code
    return 0


def parse(argv: list[str]) -> tuple[str, list[str]]:
    """The job's name and the arguments that are for the job itself."""
    jobs = "\n".join(f"  {name:6} {job.summary}" for name, job in JOBS.items())
    parser = argparse.ArgumentParser(
        prog="dev.py",
        description=f"Make .venv, then run a job in it.\n\njobs:\n{jobs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the job's last step")
    options = parser.parse_args(argv)
    return options.job, options.arguments


def main(argv: list[str]) -> int:
    name, arguments = parse(argv)
    try:
        if sys.version_info < OLDEST_PYTHON:
            oldest = ".".join(map(str, OLDEST_PYTHON))
            raise DevError(f"Python {sys.version.split()[0]} is too old; call this with {oldest} or newer")
        install(JOBS[name].extra)
        return run(JOBS[name], arguments)
    except DevError as error:
        print(f"dev.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dev.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
