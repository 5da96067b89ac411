"""Writing shards: raw copies and row blocks, on a few threads that read, compute and write at the same time."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import FormatError
from .journal import Journal
from .layout import Copy, Shard
from .patching import WRITE, Sample, Scratch, Work, split, write_all

CHUNK = 2**25
"""Bytes of a raw copy that one thread takes at a time."""
FLUSH = 2**26
"""Bytes after which a shard is synced on the way, so that its last sync is short."""
KEEP = 2**24
"""Bytes of freed memory that the C library is made to keep for the next block."""

_sync = getattr(os, "fdatasync", os.fsync)
_NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF}
"""Errors that say no more than that the system cannot do this with these files."""

Advance = Callable[[int, str], None]


class _Output:
    """A shard while it is written: its file, what is still to be given out or under way, and what was measured."""

    def __init__(self, shard: Shard, number: int) -> None:
        self.shard, self.number = shard, number
        self.tasks = _tasks(shard)
        self.pending = self.unsynced = 0
        self.given = False
        self.samples: list[Sample] = []

    def give(self) -> Copy | Work | None:
        """Returns the next piece of work on it, None where all is given."""
        task = next(self.tasks, None)
        self.given = task is None
        self.pending += not self.given
        return task


def _tasks(shard: Shard) -> Iterator[Copy | Work]:
    for copy in shard.copies:
        yield from _cut(copy)
    for patch in shard.patches:
        yield from split(patch)


class _Writer:
    """Hands out the work on some shards to any number of threads, each with a file of its own while there are enough.

    The system lets one thread at a time write to a file.
    """

    def __init__(self, shards: Sequence[Shard], journal: Journal, advance: Advance) -> None:
        self.journal, self.advance = journal, advance
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.sources: dict[Path, int] = {}
        self.left = iter(shards)
        self.open: list[_Output] = []
        self.syncs: queue.SimpleQueue[tuple[_Output, bool] | None] = queue.SimpleQueue()
        self.errors: list[BaseException] = []

    def _next(self, before: _Output | None) -> tuple[_Output, Copy | Work] | None:
        """Returns work on the same file as before, else on one that is not begun, else on any."""
        with self.lock:
            if before is not None and (task := self._give(before)) is not None:
                return before, task
            for shard in self.left:
                output = self._begin(shard)
                if (task := self._give(output)) is not None:
                    return output, task
            for output in self.open:
                if (task := self._give(output)) is not None:
                    return output, task
        return None

    def _begin(self, shard: Shard) -> _Output:
        output = _Output(shard, self.journal.create(shard.name))
        self.open.append(output)
        _reserve(output.number, shard.size)
        write_all(output.number, shard.head, 0)
        self.advance(len(shard.head), shard.name)
        return output

    def _give(self, output: _Output) -> Copy | Work | None:
        if output.given:
            return None
        task = output.give()
        if task is None and not output.pending:
            self.syncs.put((output, True))
        return task

    def source(self, path: Path) -> int:
        """Returns the base's file, opened once."""
        with self.lock:
            if path not in self.sources:
                self.sources[path] = os.open(path, os.O_RDONLY)
            return self.sources[path]

    def run(self) -> None:
        """Works until nothing is left, or something failed; one call per thread."""
        # OpenMP counts its threads per calling thread.
        torch.set_num_threads(1)
        scratch, output = Scratch(), None
        try:
            while not self.stop.is_set() and (given := self._next(output)) is not None:
                output, task = given
                self._do(output, task, scratch)
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()
        finally:
            self.syncs.put(None)

    def sync(self, threads: int) -> None:
        """Syncs and completes shards, so that no thread waits for the disk, until that many threads are done."""
        while threads:
            asked = self.syncs.get()
            if asked is None:
                threads -= 1
            elif asked[1]:
                with self.lock:
                    self.open.remove(asked[0])
                self.journal.complete(asked[0].shard.name, asked[0].number, asked[0].samples)
            else:
                _sync(asked[0].number)

    def _do(self, output: _Output, task: Copy | Work, scratch: Scratch) -> None:
        samples: list[Sample] = []
        if isinstance(task, Copy):
            copy_bytes(self.source(task.source), output.number, task)
        else:
            place = task.patch.target.place
            source = None if place is None else self.source(place.header.path)
            samples = task.do(source, output.number, scratch)
        with self.lock:
            output.samples += samples
            output.unsynced += task.size
            output.pending -= 1
            done, flush = output.given and not output.pending, output.unsynced >= FLUSH
            if flush:
                output.unsynced = 0
        if done or flush:
            self.syncs.put((output, done))
        self.advance(task.size, output.shard.name)

    def close(self) -> None:
        """Closes all files; unfinished shards are removed."""
        for number in self.sources.values():
            os.close(number)
        for output in self.open:
            self.journal.abandon(output.shard.name, output.number)


def write_shards(shards: Sequence[Shard], journal: Journal, threads: int, advance: Advance) -> None:
    """Writes shards to their temporary names and completes them in the journal, each as soon as its bytes are there.

    Args:
        shards: what to write; those that are complete already are left out by the caller.
        journal: knows where.
        threads: how many threads work.
        advance: told the bytes and the name of what was written, from any thread.

    Raises:
        FormatError: the disk does not take the files, or the base cannot be read.
        StateError: a sum is not finite.
    """
    writer = _Writer(shards, journal, advance)
    workers = [threading.Thread(target=writer.run, name=f"merge-{i}") for i in range(threads)]
    _keep_memory()
    try:
        with _single_threaded():
            _work(workers, writer)
    except OSError as error:
        raise _explained(error) from error
    finally:
        writer.close()
    if writer.errors:
        raise _explained(writer.errors[0]) from writer.errors[0].__cause__


def _work(workers: Sequence[threading.Thread], writer: _Writer) -> None:
    for worker in workers:
        worker.start()
    try:
        writer.sync(len(workers))
    finally:
        writer.stop.set()
        for worker in workers:
            worker.join()


def _keep_memory() -> None:
    """Lets the C library keep what blocks free.

    It returns freed memory to the system beyond a threshold that follows the largest piece it has seen freed; without
    this, every block would be paid for in page faults again.
    """
    torch.empty(KEEP, dtype=torch.uint8)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Lets each torch operation use one thread, since blocks run beside each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _explained(error: BaseException) -> BaseException:
    if not isinstance(error, OSError):
        return error
    where = error.filename or "the output"
    return FormatError(
        f"{where}: cannot be read or written: {error.strerror or error}. What is complete is kept: mend this and run "
        "the same merge again to continue"
    )


def _reserve(number: int, size: int) -> None:
    """Takes the disk space of a file at once: cheaper than piece by piece, and a full disk is found at the start."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(number, 0, size)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise


def _cut(copy: Copy) -> Iterator[Copy]:
    for start in range(0, copy.size, CHUNK):
        yield Copy(copy.source, copy.start + start, copy.offset + start, min(CHUNK, copy.size - start))


def copy_bytes(source: int, into: int, copy: Copy) -> None:
    """Copies bytes inside the kernel where the system can, else through memory."""
    done = 0
    while done < copy.size:
        count = _copy_some(source, into, copy, done)
        if count == 0:
            raise FormatError(f"{copy.source}: became shorter while it was copied: do not change the base meanwhile")
        done += count


def _copy_some(source: int, into: int, copy: Copy, done: int) -> int:
    left, start, offset = copy.size - done, copy.start + done, copy.offset + done
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, into, left, start, offset)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    data = os.pread(source, min(left, WRITE), start)
    write_all(into, data, offset)
    return len(data)
