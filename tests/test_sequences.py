"""Any order of operations, with two names: afterwards the base is what it was, to the last bit and flag."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import TOKENS, fill, steps, text
from snapshot import assert_same, raw, snapshot
from torch import nn

import lora_inject as li

NAMES = st.sampled_from("ab")
TARGETS = st.sampled_from(["up", "down", "head", "embed", "*", "re:up|head"])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


class Model(nn.Module):
    """The text model with a convolution, and one linear twice."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.text = text(dtype=dtype)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.conv = nn.Conv1d(11, 11, 3, padding=1, bias=False).to(dtype)
        self.again = self.text.up
        self.text.norm.weight.requires_grad_(False)

    def forward(self, tokens):
        return self.conv(self.text(tokens).transpose(1, 2)) + self.again(self.text.embed(tokens)).mean()


class Life(RuleBasedStateMachine):
    """Each rule is one call; a call may be refused, and then it must have changed nothing."""

    @initialize(dtype=DTYPES)
    def start(self, dtype):
        self.folder = tempfile.TemporaryDirectory()
        self.model = Model(dtype).eval()
        self.before = snapshot(self.model)
        self.plain = self.model(TOKENS).detach()
        self.base = {key: raw(value) for key, value in self.model.state_dict().items()}
        self.files: list[Path] = []

    def attempt(self, call) -> bool:
        """Makes a call; if it is refused, nothing may have changed."""
        before = snapshot(self.model)
        try:
            call()
        except li.LoraInjectError:
            assert_same(before, self.model)
            return False
        return True

    @property
    def names(self) -> set[str]:
        return {ref.name for ref in li.adapters(self.model)}

    @property
    def merged(self) -> bool:
        return any(ref.adapter.merged for ref in li.adapters(self.model))

    @rule(name=NAMES, where=TARGETS, bias=st.booleans(), freeze=st.booleans())
    def inject(self, name, where, bias, freeze):
        pattern = where if where == "*" else f"re:text\\.({where.removeprefix('re:')})"
        self.attempt(lambda: li.inject(self.model, pattern, name=name, rank=2, bias=bias, freeze=freeze, seed=1))

    @precondition(lambda self: self.names)
    @rule(seed=st.integers(0, 3))
    def train(self, seed):
        fill(self.model, seed, size=0.1)
        if not self.merged and any(ref.adapter.enabled for ref in li.adapters(self.model)):
            steps(self.model, TOKENS, 1)

    @rule(names=st.sets(NAMES))
    def merge(self, names):
        self.attempt(lambda: li.merge(self.model, *sorted(names)))

    @rule()
    def unmerge(self):
        self.attempt(lambda: li.unmerge(self.model))

    @rule(names=st.sets(NAMES))
    def disable(self, names):
        def call():
            with li.disabled(self.model, *sorted(names)):
                out = self.model(TOKENS)
            if not names:
                assert torch.allclose(out, self.plain, rtol=0.05, atol=0.05)

        self.attempt(call)

    @rule(name=NAMES, factor=st.sampled_from([0.0, -1.0, 2.5]))
    def scale(self, name, factor):
        def call():
            with li.scaled(self.model, factor, name):
                self.model(TOKENS)

        self.attempt(call)

    @rule(names=st.sets(NAMES))
    def activate(self, names):
        self.attempt(lambda: li.activate(self.model, *sorted(names)))

    @rule(name=NAMES)
    def export(self, name):
        path = Path(self.folder.name) / f"{len(self.files)}.safetensors"
        if self.attempt(lambda: li.export(self.model, path, name)):
            self.files.append(path)

    @precondition(lambda self: self.files)
    @rule(name=NAMES, data=st.data())
    def load(self, name, data):
        path = data.draw(st.sampled_from(self.files))
        self.attempt(lambda: li.load(self.model, path, name))

    @rule(name=st.sampled_from(["a", "b", None]))
    def uninject(self, name):
        self.attempt(lambda: li.uninject(self.model, name))

    @precondition(lambda self: not self.names)
    @invariant()
    def without_adapters_there_is_no_trace(self):
        if hasattr(self, "before"):
            assert_same(self.before, self.model)

    @invariant()
    def an_unmerged_base_is_bit_identical(self):
        if hasattr(self, "base") and not self.merged:
            state = {k: raw(v) for k, v in self.model.state_dict().items() if ".adapters." not in k}
            assert state == self.base and list(state) == list(self.base)
            assert self.model.text.head._parameters["weight"] is self.model.text.embed._parameters["weight"]

    def teardown(self):
        if hasattr(self, "before"):
            if self.names:
                li.uninject(self.model)
            assert_same(self.before, self.model)
            self.folder.cleanup()


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
