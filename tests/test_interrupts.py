"""All or nothing: an error, or Ctrl-C, at any point of inject, merge, unmerge, uninject and load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from models import TOKENS, fill, text
from snapshot import assert_same, snapshot

import lora_inject as li
from lora_inject.residual import Residual

ROOT = Path(__file__).resolve().parent.parent


def fresh(tmp_path):
    return text().eval()


def with_adapters(tmp_path):
    model = fresh(tmp_path)
    li.inject(model, ["up", "down", "head", "embed"], rank=2, bias=True, seed=0)
    fill(model)
    return model


def merged(tmp_path):
    model = with_adapters(tmp_path)
    li.merge(model)
    return model


def with_file(tmp_path):
    li.export(with_adapters(tmp_path), tmp_path / "a.safetensors")
    return fresh(tmp_path)


CALLS = {
    "inject": (fresh, lambda m, d: li.inject(m, ["up", "down", "head"], rank=2)),
    "inject-more": (with_adapters, lambda m, d: li.inject(m, ["up", "down"], name="b", rank=2)),
    "merge": (with_adapters, lambda m, d: li.merge(m)),
    "unmerge": (merged, lambda m, d: li.unmerge(m)),
    "uninject": (with_adapters, lambda m, d: li.uninject(m)),
    "uninject-merged": (merged, lambda m, d: li.uninject(m)),
    "uninject-keep": (merged, lambda m, d: li.uninject(m, keep_merged=True)),
    "load": (with_file, lambda m, d: li.load(m, d / "a.safetensors")),
}
every = pytest.mark.parametrize(("make", "call"), CALLS.values(), ids=CALLS)


KEPT_ALIVE = []
AFTER = 25
"""Lines that a call runs at most once its change is complete."""


class Lines:
    """Runs something before the n-th line of the package's code that a call executes."""

    def __init__(self, stop: int, act, counts=lambda frame: True) -> None:
        self.stop, self.act, self.counts, self.count = stop, act, counts, 0

    def __call__(self, frame, event, argument):
        if "lora_inject" not in frame.f_globals.get("__name__", ""):
            return None
        if event == "line" and self.counts(frame):
            self.count += 1
            if self.count == self.stop:
                self.act()
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


def _lines(make, call, tmp_path) -> int:
    # Counted the second time: the first makes host classes, which live as long as a host, and fills caches.
    for _ in range(2):
        model = make(tmp_path)
        KEPT_ALIVE.append(model)
        with Lines(-1, None) as lines:
            call(model, tmp_path)
    return lines.count


# Between open() and the with statement that closes it, an interrupt leaves a file to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@every
def test_ctrl_c_at_any_line_takes_everything_back_or_comes_after_everything(make, call, tmp_path):
    # In the last lines the change is complete, and an interrupt rightly comes after everything.
    total = _lines(make, call, tmp_path) - AFTER
    interrupted = 0
    for stop in range(1, total, max(1, total // 60)):
        model = make(tmp_path)
        before, wanted = snapshot(model), model(TOKENS)
        try:
            with Lines(stop, lambda: os.kill(os.getpid(), signal.SIGINT)):
                call(model, tmp_path)
        except KeyboardInterrupt:
            interrupted += 1
            assert_same(before, model)
            assert torch.equal(model(TOKENS), wanted)
    assert interrupted >= total // max(1, total // 60) - 1, "Ctrl-C was swallowed"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@every
def test_an_error_at_any_line_of_the_change_takes_everything_back(make, call, tmp_path):
    def inside(frame) -> bool:
        """The change is under way while Ctrl-C is put off."""
        return (
            signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            and "commit" not in frame.f_code.co_filename
        )

    model = make(tmp_path)
    with Lines(-1, None, inside) as lines:
        call(model, tmp_path)
    assert lines.count > 20
    for stop in range(1, lines.count, max(1, lines.count // 60)):
        model = make(tmp_path)
        before, wanted = snapshot(model), model(TOKENS)
        with pytest.raises(MemoryError), Lines(stop, _fail, inside):
            call(model, tmp_path)
        assert_same(before, model)
        assert torch.equal(model(TOKENS), wanted)


def _fail():
    sys.settrace(None)
    raise MemoryError


def _interrupts_before(monkeypatch, owner, name):
    """Sends Ctrl-C each time the method is about to run."""
    method = getattr(owner, name)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def test_ctrl_c_while_verify_goes_back_comes_after_it(tmp_path, monkeypatch):
    model = with_adapters(tmp_path)
    before = snapshot(model)
    _interrupts_before(monkeypatch, Residual, "restore")
    with pytest.raises(KeyboardInterrupt):
        li.verify(model, TOKENS)
    assert_same(before, model)
    assert not any(ref.adapter.merged for ref in li.adapters(model))


def test_ctrl_c_anywhere_in_the_merge_and_unmerge_of_verify_leaves_nothing_merged(tmp_path):
    def inside(frame) -> bool:
        return frame.f_code.co_name in ("_merge_error", "unmerge", "unmerge_host", "merge_host", "restore")

    model = with_adapters(tmp_path)
    with Lines(-1, None, inside) as lines:
        li.verify(model, TOKENS)
    for stop in range(1, lines.count, max(1, lines.count // 25)):
        model = with_adapters(tmp_path)
        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt), Lines(stop, lambda: os.kill(os.getpid(), signal.SIGINT), inside):
            li.verify(model, TOKENS)
        assert_same(before, model)
        assert not any(ref.adapter.merged for ref in li.adapters(model))


@pytest.mark.parametrize("where", ["enter", "leave"])
def test_ctrl_c_while_disabled_begins_or_ends_leaves_the_model_merged_as_it_was(tmp_path, monkeypatch, where):
    model = merged(tmp_path)
    before, wanted = snapshot(model), model(TOKENS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "enter":
            _interrupts_before(patch, Residual, "restore")
        with li.disabled(model):
            assert where == "leave", "the interrupt came before the block"
            _interrupts_before(patch, Residual, "note")
    assert all(ref.adapter.merged and not ref.adapter.muted for ref in li.adapters(model))
    assert torch.equal(model(TOKENS), wanted)
    # An untied parameter is a new one after each merge.
    assert snapshot(model)["values"] == before["values"]


def test_ctrl_c_raised_between_two_sites_by_an_adapter_class(clean_registry):
    """A third-party adapter whose construction fails at the second site: the first must not be there either."""
    from lora_inject.adapters.linear import LinearAdapter

    @li.register
    class Failing(LinearAdapter):
        kind = "failing"
        made = 0

        def __init__(self, *args):
            super().__init__(*args)
            Failing.made += 1
            if Failing.made == 2:
                raise KeyboardInterrupt

    model = text()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        li.inject(model, ["up", "down"])
    assert_same(before, model)


def test_in_another_thread_everything_works_too():
    model, errors = text(), []
    before = snapshot(model)

    def work():
        try:
            li.inject(model, "*", rank=2)
            fill(model)
            li.merge(model)
            li.uninject(model)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert_same(before, model)


@pytest.mark.parametrize("how", ["own-handler", "ignored"])
def test_a_handler_that_the_program_set_is_asked_in_place_of_raising(how, tmp_path):
    """Training loops set a handler that stops at the end of the step; background jobs ignore Ctrl-C."""
    make, call = CALLS["inject"]
    total, seen = _lines(make, call, tmp_path), []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if how == "ignored" else lambda *args: seen.append(1))
    try:
        for stop in range(1, total, total // 40):
            model = make(tmp_path)
            seen.clear()
            with Lines(stop, lambda: os.kill(os.getpid(), signal.SIGINT)):
                call(model, tmp_path)
            assert seen == ([] if how == "ignored" else [1])
            assert len(list(li.adapters(model))) == 3
    except KeyboardInterrupt:
        pytest.fail("KeyboardInterrupt in place of the program's own handler")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_real_ctrl_c_from_outside(tmp_path):
    """A process that injects and uninjects for ever gets a signal from another: its base must be whole afterwards."""
    code = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch; torch.set_num_threads(1)
from models import text
from snapshot import snapshot, assert_same
import lora_inject as li
model = text()
before = snapshot(model)
print("ready", flush=True)
try:
    while True:
        li.inject(model, "*", rank=2)
        li.merge(model)
        li.uninject(model)
except KeyboardInterrupt:
    if any(True for _ in li.adapters(model)):
        li.uninject(model)
    assert_same(before, model)
    print("whole", flush=True)
"""
    source = code.format(tests=str(ROOT / "tests"), root=str(ROOT))
    for delay in (0.003, 0.01, 0.05):
        process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline() == "ready\n"
            threading.Event().wait(delay)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        assert out == "whole\n"
