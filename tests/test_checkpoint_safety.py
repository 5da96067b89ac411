"""Merging on disk survives kills, full disks and hostile files, and never shows anything but complete files."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_inject as li
from lora_inject import rows
from lora_inject.checkpoint import journal, merge_checkpoint, patching, plan, stream

KILLS = 56
WORK = journal.WORK


@pytest.fixture
def pieces(tmp_path):
    """A base of four shards with other files beside them, an adapter, and the output of an uninterrupted merge."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"l{i}": nn.Linear(96, 160) for i in range(8)})
    base = tmp_path / "base"
    base.mkdir()
    where = {}
    for i in range(4):
        state = {k: v for k, v in model.state_dict().items() if int(k[1]) // 2 == i}
        name = f"model-{i + 1:05d}-of-00004.safetensors"
        save_file(state, base / name, {"format": "pt"})
        where |= dict.fromkeys(state, name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (base / "tokenizer.json").write_text("{}")
    li.inject(model, ["l[0-5]"], rank=4, seed=0)
    for parameter in li.adapter_parameters(model).values():
        parameter.data.normal_()
    adapter = li.export(model, tmp_path / "a.safetensors")
    merge_checkpoint(base, adapter, tmp_path / "whole")
    return base, adapter, content(tmp_path / "whole")


def content(folder):
    """All files but the report, which holds times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("merge_report")
    }


def _slowly(base, adapter, out):
    """Runs in a fork: small blocks and slow syncs, so that a kill has moments to hit."""
    rows.BLOCK, patching.RUN, patching.WRITE, stream.CHUNK = 512, 2, 256, 1024
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, _after(0.001, getattr(os, name)))
    merge_checkpoint(base, adapter, out, threads=2)


def _after(seconds, call):
    def late(*arguments, **options):
        time.sleep(seconds)
        return call(*arguments, **options)

    return late


def test_killed_at_any_moment_the_next_run_finishes_bit_equal(tmp_path, pieces):
    base, adapter, whole = pieces
    fork = multiprocessing.get_context("fork")
    chance, span = random.Random(0), 1.0
    killed = continued = rounds = 0
    while killed < KILLS:
        rounds += 1
        assert rounds < 10 * KILLS
        out = tmp_path / f"out{rounds % 2}"
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(2):
            process = fork.Process(target=_slowly, args=(base, adapter, out))
            process.start()
            process.join(chance.uniform(0, span))
            process.kill()
            process.join()
            hit = process.exitcode == -signal.SIGKILL
            assert hit or process.exitcode == 0
            killed += hit
            # Aims at the whole length of a run, however loaded the machine is.
            span *= 1.1 if hit else 0.8
            shown = {k: v for k, v in content(out).items() if not k.startswith(WORK)} if out.exists() else {}
            assert all(whole.get(name) == data for name, data in shown.items()), sorted(shown)
        continued += merge_checkpoint(base, adapter, out, threads=2).status != "merged"
        assert content(out) == whole
    assert continued >= 10


def test_complete_shards_are_not_written_again(tmp_path, pieces, monkeypatch):
    base, adapter, whole = pieces
    done, created, complete = [], [], journal.Journal.complete

    def fail_at_third(self, name, number, samples=None):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(name)
        complete(self, name, number, samples)

    monkeypatch.setattr(journal.Journal, "complete", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(base, adapter, tmp_path / "out", threads=1)
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {WORK}
    create = journal.Journal.create
    monkeypatch.setattr(journal.Journal, "create", lambda self, name: created.append(name) or create(self, name))
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert report.status == "continued" and not set(done) & set(created)
    assert len(report) == 6 and content(tmp_path / "out") == whole
    assert merge_checkpoint(base, adapter, tmp_path / "out").status == "complete already"


def _unfinished(base, adapter, out, monkeypatch):
    """Leaves a merge after its first complete shard."""
    complete, done = journal.Journal.complete, []

    def once(self, name, number, samples=None):
        if done:
            os.close(number)
            raise OSError(5, "Input/output error")
        done.append(name)
        complete(self, name, number, samples)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "complete", once)
        with pytest.raises(li.FormatError, match="run the same merge again to continue"):
            merge_checkpoint(base, adapter, out, threads=1)


def test_an_unfinished_merge_of_other_inputs_is_never_continued(tmp_path, pieces, monkeypatch):
    base, adapter, whole = pieces
    _unfinished(base, adapter, tmp_path / "out", monkeypatch)
    with pytest.raises(li.StateError, match="unfinished merge of other inputs"):
        merge_checkpoint(base, f"{adapter}:0.5", tmp_path / "out")
    shard = next(base.glob("*1-of*"))
    before = shard.stat()
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(li.StateError, match="unfinished merge of other inputs"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert merge_checkpoint(base, adapter, tmp_path / "out", overwrite=True).status == "merged"
    assert content(tmp_path / "out") == whole


def test_two_processes_never_work_on_one_output(tmp_path, pieces, monkeypatch):
    base, adapter, whole = pieces
    _unfinished(base, adapter, tmp_path / "out", monkeypatch)
    other = journal.Journal(tmp_path / "out", merge_binding(base, adapter, tmp_path / "out"))
    assert other.begin(False)
    with pytest.raises(li.StateError, match="another process is at this merge"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    other.release()
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def merge_binding(base, adapter, out):
    from lora_inject.checkpoint.base import read_base
    from lora_inject.checkpoint.inputs import read_inputs

    return plan.make_plan(read_base(base), read_inputs(adapter, None), out).binding()


def test_an_existing_output_is_replaced_only_when_asked_and_whole_until_then(tmp_path, pieces, monkeypatch):
    base, adapter, whole = pieces
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"an older model")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(li.StateError, match="exists and is not empty"):
        merge_checkpoint(base, adapter, out)
    monkeypatch.setattr(stream, "copy_bytes", _no_space)
    with pytest.raises(li.FormatError, match="No space left"):
        merge_checkpoint(base, adapter, out, overwrite=True)
    assert content(out) == {"model.safetensors": b"an older model", "notes.txt": b"mine"}
    monkeypatch.undo()
    merge_checkpoint(base, adapter, out, overwrite=True)
    assert content(out) == whole | {"notes.txt": b"mine"}
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(li.StateError, match="is a file"):
        merge_checkpoint(base, adapter, file)


def _no_space(*arguments):
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(tmp_path, pieces, monkeypatch):
    base, adapter, _ = pieces
    monkeypatch.setattr("lora_inject.checkpoint.run.free_space", lambda out: 1000)
    with pytest.raises(li.FormatError, match="1,000 are free"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB, where the tests may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True)
    if done.returncode:
        pytest.skip("cannot mount a small file system here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up_on_the_way(pieces, small_disk, monkeypatch):
    base, adapter, whole = pieces
    monkeypatch.setattr("lora_inject.checkpoint.run.free_space", lambda out: 10**12)
    with pytest.raises(li.FormatError, match="No space left"):
        merge_checkpoint(base, adapter, small_disk / "out", threads=1)
    shown = {name for name in content(small_disk / "out") if not name.startswith(WORK)}
    assert not shown and not list(small_disk.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    merge_checkpoint(base, adapter, small_disk / "out")
    assert content(small_disk / "out") == whole


def test_a_read_only_target(pieces, small_disk, monkeypatch):
    base, adapter, _ = pieces
    monkeypatch.setattr("lora_inject.checkpoint.run.free_space", lambda out: 10**12)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(li.FormatError, match=r"cannot be written: .*[Rr]ead-only"):
        merge_checkpoint(base, adapter, small_disk / "out")


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync", "replace"])
def test_errors_of_the_system_leave_nothing_half_done(tmp_path, pieces, monkeypatch, call):
    base, adapter, whole = pieces
    if not hasattr(os, call):
        pytest.skip(f"this system has no {call}")
    monkeypatch.setattr(os, call, _no_space)
    with pytest.raises(li.FormatError, match="No space left"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def test_bytes_are_copied_through_memory_where_the_kernel_cannot(tmp_path, pieces, monkeypatch):
    base, adapter, whole = pieces

    def refuse(*arguments):
        raise OSError(18, "Invalid cross-device link")

    def unknown(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(os, "posix_fallocate", unknown, raising=False)
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def _head(entries, data=b""):
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [2]}
HOSTILE = {
    "empty": b"",
    "length of 2^60": (2**60).to_bytes(8, "little") + b"{}",
    "no JSON": _head(b"{nonsense"),
    "deep JSON": _head(b"[" * 200_000),
    "a list": _head(b"[]"),
    "truncated": _head({"w": F32 | {"data_offsets": [0, 8]}}, b"1234"),
    "overlap": _head({"w": F32 | {"data_offsets": [0, 8]}, "v": F32 | {"data_offsets": [4, 12]}}, b"x" * 12),
    "gap": _head({"w": F32 | {"data_offsets": [0, 8]}, "v": F32 | {"data_offsets": [16, 24]}}, b"x" * 24),
    "wrong dtype": _head({"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"x" * 8),
    "huge shape": _head({"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, b"x" * 8),
    "twice": _head(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32"}}', b"x" * 8),
    "a pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00" + b"." * 64,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bases_give_one_clear_error(tmp_path, pieces, name):
    _, adapter, _ = pieces
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(HOSTILE[name])
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(li.FormatError, match=r"model\.safetensors"):
        merge_checkpoint(folder, adapter, tmp_path / "out")
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("nonsense", "not valid JSON"),
        ("[]", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"w": "../secret.safetensors"}}', "not the name of a file beside the index"),
        ('{"weight_map": {"w": "gone.safetensors"}}', "cannot be read"),
        ('{"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}', "in no shard"),
        ('{"weight_map": {"w": "b.safetensors", "x": "a.safetensors"}}', "stand in two shards"),
    ],
)
def test_indices_that_lie(tmp_path, pieces, index, words):
    _, adapter, _ = pieces
    folder = tmp_path / "base2"
    folder.mkdir()
    for name in ("a", "b"):
        save_file({"w": torch.zeros(2)}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(li.FormatError, match=words):
        merge_checkpoint(folder, adapter, tmp_path / "out")


def test_a_base_that_shrinks_while_it_is_read(tmp_path, pieces, monkeypatch):
    base, adapter, _ = pieces
    create = journal.Journal.create

    def shrink(self, name):
        with (base / name).open("r+b") as file:
            file.truncate(2000)
        return create(self, name)

    monkeypatch.setattr(journal.Journal, "create", shrink)
    with pytest.raises(li.FormatError, match="became shorter"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _torchrun(*words):
    """Runs two ranks with the real launcher."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*run, *map(str, words)], capture_output=True, text=True, env=environment, timeout=200)


def test_ranks_share_the_shards_and_rank_0_alone_reports(tmp_path, pieces):
    base, adapter, whole = pieces
    out = tmp_path / "out"
    command = ["-m", "lora_inject", "merge", base, adapter, out]
    planned = _torchrun(*command, "--dry-run", "--json")
    assert (planned.returncode, json.loads(planned.stdout)["status"]) == (0, "planned")
    assert not out.exists()

    done = _torchrun(*command, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(out) == whole
    # One document and nothing else: a second rank's would make it unreadable.
    report = json.loads(done.stdout)
    assert report["status"] == "merged"
    assert {row["path"] for row in report["parameters"]} == {f"l{i}.weight" for i in range(6)}
    assert json.loads((out / "merge_report.json").read_bytes())["parameters"] == report["parameters"]

    again = _torchrun(*command)
    assert again.returncode == 0 and again.stdout.count("complete already") == 1
    other = _torchrun("-m", "lora_inject", "merge", base, f"{adapter}:0.5", out)
    assert other.returncode == 1 and "exists and is not empty" in other.stderr
    assert content(out) == whole


RANK = """
import os, signal, sys
from lora_inject.checkpoint.journal import Journal
from lora_inject.cli import main
complete = Journal.complete
def killed(self, name, number, samples=None):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    complete(self, name, number, samples)
Journal.complete = killed
sys.exit(main())
"""


def test_a_killed_rank_ends_the_run_and_the_same_command_continues(tmp_path, pieces):
    base, adapter, whole = pieces
    script, out = tmp_path / "rank.py", tmp_path / "out"
    script.write_text(RANK)
    dead = _torchrun(script, "merge", base, adapter, out)
    assert dead.returncode != 0 and "SIGKILL" in dead.stderr
    assert [place.name for place in out.iterdir()] == [WORK]
    done = _torchrun("-m", "lora_inject", "merge", base, adapter, out, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["status"] == "continued"
    assert content(out) == whole


def test_ranks_continue_what_one_process_left(tmp_path, pieces, monkeypatch):
    base, adapter, whole = pieces
    _unfinished(base, adapter, tmp_path / "late", monkeypatch)
    done = _torchrun("-m", "lora_inject", "merge", base, adapter, tmp_path / "late")
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(tmp_path / "late") == whole
