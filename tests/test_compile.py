"""torch.compile with the real inductor, fullgraph, before and after injection."""

from __future__ import annotations

import pytest
import torch
from contract import flat
from models import fill
from torch import nn
from variants import VARIANTS

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
MORE = ("linear-own-forward", "linear-biases-on-no-bias", "embedding-padding-biases", "conv-2d-balanced-reflect")
MORE += ("linear-dense", "linear-rslora")
KINDS = {variant.kind: variant for variant in reversed(VARIANTS)}
# dynamo cannot trace torch's recurrent networks.
KINDS.pop("recurrent")
CASES = [*KINDS.values(), *(variant for variant in VARIANTS if variant.id in MORE)]


@pytest.fixture(autouse=True)
def _compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=64):
        yield
    torch._dynamo.reset()


def close(found, wanted) -> bool:
    found, wanted = (t if isinstance(t, tuple) else (t,) for t in (found, wanted))
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def compiled(model: nn.Module, backend: str = "inductor"):
    return torch.compile(model, fullgraph=True, backend=backend)


class Everything(nn.Module):
    """A variant of every kind side by side, so that inductor runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(variant.model(torch.float32) for variant in CASES)

    def forward(self, xs):
        return [flat(part(*x))[0] for part, x in zip(self.parts, xs, strict=True)]


def test_every_adapter_class_compiles_after_injection_with_its_gradients():
    model, xs = Everything(), [variant.x(torch.float32) for variant in CASES]
    for part, variant in zip(model.parts, CASES, strict=True):
        variant.inject(part)
    fill(model)

    def results(run):
        model.zero_grad()
        outputs = run(xs)
        sum(out.square().sum() for out in outputs).backward()
        return outputs, {key: p.grad.clone() for key, p in li.adapter_parameters(model).items()}

    (wanted, eager), (found, fast) = results(model), results(compiled(model))
    for variant, one, other in zip(CASES, wanted, found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), variant.id
    assert eager.keys() == fast.keys()
    for key, gradient in eager.items():
        assert torch.allclose(fast[key], gradient, rtol=1e-3, atol=1e-4), key


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.out = nn.Linear(6, 4)

    def forward(self, tokens):
        return self.out(self.conv(self.embed(tokens).transpose(1, 2)).relu().transpose(1, 2))


TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def test_a_model_compiled_before_injection_follows_it_and_its_end():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False)
    x = torch.randn(3, 6)
    plain, run = model(x), compiled(model)
    with torch.no_grad():
        assert close(run(x), plain)
        li.inject(model, "*", rank=2, alpha=16)
        fill(model)
        assert close(run(x), model(x)) and not close(run(x), plain)
        li.uninject(model)
        assert close(run(x), plain)


def test_a_compiled_model_follows_every_change():
    """One model, the whole life of an adapter; what torch.compile must notice is the same for every backend."""
    model = Net().eval().requires_grad_(False)
    plain, run = model(TOKENS), compiled(model, "eager")
    with torch.no_grad():
        assert close(run(TOKENS), plain)
        li.inject(model, "*", rank=2, seed=0)
        assert close(run(TOKENS), plain)
        fill(model)
        assert close(run(TOKENS), model(TOKENS))
        assert not close(run(TOKENS), plain)
        with li.disabled(model):
            assert close(run(TOKENS), plain)
        for factor in (0.5, 3.0):
            with li.scaled(model, factor):
                assert close(run(TOKENS), model(TOKENS))
                assert not close(run(TOKENS), plain)
        adapted = model(TOKENS)
        assert close(run(TOKENS), adapted)
        li.inject(model, "out", rank=2, name="b")
        fill(model, 5, "b")
        assert close(run(TOKENS), model(TOKENS)) and not close(run(TOKENS), adapted)
        li.activate(model, "default")
        assert close(run(TOKENS), adapted)
        li.merge(model)
        assert close(run(TOKENS), adapted)
        li.unmerge(model)
        assert close(run(TOKENS), adapted)
        li.uninject(model)
        assert close(run(TOKENS), plain)


def test_targets_can_be_injected_through_the_compiled_model():
    model = Net().eval()
    run = compiled(model, "eager")
    run(TOKENS)
    assert [site.path for site in li.inject(run, ["embed", "out"])] == ["embed", "out"]
    fill(run)
    keys = set(li.adapter_parameters(run))
    assert keys == {key for key in run.state_dict() if ".adapters." in key}
    assert close(run(TOKENS), model(TOKENS))


def test_scaling_is_right_under_inductor():
    """`torch.add(y, mm, alpha=s)` gives wrong numbers there on a CPU; the update must not be written that way."""
    layer = nn.Linear(64, 48).requires_grad_(False)
    li.inject(layer, "", rank=4, alpha=64)
    fill(layer)
    x = torch.randn(32, 64)
    adapter = layer.adapters["default"]
    exact = x.double() @ (layer._parameters["weight"] + 16 * adapter.lora_B @ adapter.lora_A).double().T
    exact = exact + layer._parameters["bias"].double()
    with torch.no_grad():
        assert torch.allclose(compiled(layer)(x).double(), exact, rtol=1e-4, atol=1e-3)
