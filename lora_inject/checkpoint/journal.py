"""What makes a merge safe to kill: unfinished work in a folder of its own, and a state file bound to the inputs.

All files are written and synced inside `OUT/.lora_inject_merge/`. Only when every one of them is complete are they
renamed to their final names, in one short burst that the next run repeats if it was cut short.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import FormatError, StateError
from ..safefile import parse_json
from ..safewrite import sync
from .patching import Sample

WORK = ".lora_inject_merge"
STATE = "state.json"
PART = ".part"
MEASURED = ".measured.json"


class Journal:
    """The working folder of one merge."""

    def __init__(self, out: Path, binding: str) -> None:
        self.out, self.work, self.binding = out, out / WORK, binding
        self.files = self.work / "files"
        self.lock: int | None = None
        self.made = False

    def create(self, name: str) -> int:
        """Opens a temporary file for reading and writing and returns its number."""
        place = self.work / f"{name}{PART}"
        place.parent.mkdir(parents=True, exist_ok=True)
        return os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def complete(self, name: str, number: int, samples: Sequence[Sample] | None = None) -> None:
        """Syncs and closes a file and puts it among those that are whole, what was measured on the way before it."""
        try:
            if samples is not None:
                rows = json.dumps([asdict(sample) for sample in samples])
                _write(self.work / f"{name}{MEASURED}", rows.encode())
            os.fsync(number)
        finally:
            os.close(number)
        place = self.files / name
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.work / f"{name}{PART}", place)
        sync(place.parent)

    def abandon(self, name: str, number: int) -> None:
        """Closes and removes a temporary file."""
        os.close(number)
        (self.work / f"{name}{PART}").unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file among those that are whole."""
        _write(self.files / name, data)

    def has(self, name: str, size: int) -> bool:
        """Says whether a file is complete."""
        place = self.files / name
        return place.is_file() and place.stat().st_size == size

    def measured(self, name: str) -> list[Sample]:
        """Returns what was measured while a complete shard was written, by this run or an earlier one."""
        rows = json.loads((self.work / f"{name}{MEASURED}").read_bytes())
        return [Sample(**(row | {"adapters": tuple(row["adapters"])})) for row in rows]

    def state(self) -> dict[str, Any] | None:
        """Returns what an earlier run left, or None."""
        place = self.work / STATE
        if not place.is_file():
            return None
        found = parse_json(place.read_bytes(), str(place))
        return found if isinstance(found, dict) else {}

    def begin(self, overwrite: bool) -> bool:
        """Makes the output folder and the working folder ready, and says whether an earlier run is continued.

        Raises:
            StateError: the folder holds something else, or the unfinished merge of other inputs.
        """
        state = self.state()
        if state is not None and state.get("binding") == self.binding:
            self._take()
            return True
        if state is not None and not overwrite:
            raise StateError(
                f"{self.out}: holds an unfinished merge of other inputs or options: repeat that one to finish it, or "
                "pass overwrite=True (--overwrite) to drop it, or choose another folder"
            )
        check_free(self.out, overwrite)
        if self.work.exists():
            self._take()
            shutil.rmtree(self.work)
        try:
            self._make()
        except OSError:
            self.discard()
            raise
        return False

    def _make(self) -> None:
        self.made = not self.out.exists()
        self.files.mkdir(parents=True)
        self._take()
        _write(self.work / STATE, json.dumps({"binding": self.binding, "publish": None}).encode())
        sync(self.out)

    def _take(self) -> None:
        """Makes sure that no other process works here; the system ends the lock with the process."""
        self.release()
        self.lock = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise StateError(f"{self.out}: another process is at this merge: wait for it") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise

    def release(self) -> None:
        """Lets other processes work here."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def publish(self, names: Sequence[str], stale: Iterable[str]) -> None:
        """Renames all complete files to their final names; a run that is killed here is finished by the next."""
        state = {"binding": self.binding, "publish": list(names), "stale": sorted(stale)}
        _write(self.work / STATE, json.dumps(state).encode())
        self.finish(state)

    def finish(self, state: dict[str, Any]) -> None:
        """Renames what a run that began to publish has not renamed yet, and removes the working folder."""
        for name in state["stale"]:
            (self.out / name).unlink(missing_ok=True)
        for name in state["publish"]:
            place = self.out / name
            if (self.files / name).exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.files / name, place)
            elif not place.exists():
                raise FormatError(
                    f"{place}: vanished while the merge was unfinished: remove {self.work} and start anew"
                )
        for folder in {(self.out / name).parent for name in state["publish"]}:
            sync(folder)
        # The state goes first: without it, what is left of the folder means nothing.
        (self.work / STATE).unlink()
        shutil.rmtree(self.work)

    def discard(self) -> None:
        """Removes the working folder, and the output folder if this process made it and nothing else is in it."""
        shutil.rmtree(self.work, ignore_errors=True)
        if self.made and self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()

    def drop_if_empty(self) -> None:
        """After an error: removes the working folder, and the output folder, unless complete shards are in it."""
        if not self.work.is_dir() or any(place.suffix == ".safetensors" for place in self.files.iterdir()):
            return
        state = self.state()
        if state is None or not state["publish"]:
            self.discard()


def check_free(out: Path, overwrite: bool) -> None:
    """Refuses an output that exists, unless it may be overwritten; an empty folder, or an unfinished merge, is none.

    Raises:
        StateError: the output exists.
    """
    if out.exists() and not out.is_dir():
        raise StateError(f"{out}: is a file: give a folder, which is made if it does not exist")
    if not overwrite and out.is_dir() and any(place.name not in (WORK, "lost+found") for place in out.iterdir()):
        raise StateError(f"{out}: exists and is not empty: choose another folder, or pass overwrite=True (--overwrite)")


def _write(place: Path, data: bytes) -> None:
    """Writes a small file, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f"{place.name}{PART}")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, place)
    sync(place.parent)
