"""What all tests share: one thread per test process, and a fresh start for every random number and registry."""

from __future__ import annotations

import signal

import pytest
import torch

from lora_inject import registry, rows

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def clean_registry():
    """Lets a test register adapter classes without leaving them to the next one."""
    before, loaded = registry._classes, registry._loaded
    yield
    registry._classes, registry._loaded = before, loaded


@pytest.fixture
def small_blocks(monkeypatch):
    """Lets a merge cut small weights into several blocks too."""
    monkeypatch.setattr(rows, "BLOCK", 600)


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Lets SIGINT interrupt, as tests of Ctrl-C need: a shell that runs its job in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
