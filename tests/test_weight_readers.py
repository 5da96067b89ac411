"""Whoever reads a weight instead of calling the module gets W + delta, and who cannot is found by `verify`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import fill
from snapshot import assert_same, raw, snapshot
from torch import Tensor, nn

import lora_inject as li

SIZE, TOKENS = 8, 5


def layer(kind: type, **options) -> nn.Module:
    return kind(SIZE, 2, 16, dropout=0.0, batch_first=True, **options)


@torch.no_grad()
def by_hand(model: nn.Module, adapted: nn.Module) -> nn.Module:
    """Returns a float64 copy of the base with B A added to the weight of every site."""
    made = copy.deepcopy(model).double()
    for ref in li.adapters(adapted):
        path = ref.path if ref.adapter.parameter else f"{ref.path}.weight"
        made.get_parameter(path).add_(ref.adapter.lora_B.double() @ ref.adapter.lora_A.double())
    return made


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
TARGETS = {
    "all": ["*linear*", "*self_attn"],
    "feed-forward": ["*linear1", "*linear2"],
    "input": ["*self_attn.in_proj_weight"],
    "output": ["*self_attn.out_proj"],
}
LAYERS = {
    "post-norm": lambda: layer(nn.TransformerEncoderLayer),
    "pre-norm": lambda: layer(nn.TransformerEncoderLayer, norm_first=True),
    "gelu": lambda: layer(nn.TransformerEncoderLayer, activation="gelu"),
    "stack": lambda: nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 2),
    "stack-plain": lambda: nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 2, enable_nested_tensor=False),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_an_encoder_equals_the_slow_one(monkeypatch, make, targets, padded):
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(a[0].is_nested) or fast(*a))
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(3, TOKENS, SIZE)
    base, before = copy.deepcopy(model), snapshot(model)
    options = {"src_key_padding_mask": PADDING} if padded else {}
    li.inject(model, targets, rank=2)
    fill(model)
    real = ~PADDING if padded else torch.ones(3, TOKENS, dtype=torch.bool)
    wanted = by_hand(base, model)(x.double(), **options)[real]
    with torch.no_grad():
        found = model(x, **options)
        assert calls, "this must be the fast path"
        assert any(calls) is (padded and isinstance(model, nn.TransformerEncoder) and model.enable_nested_tensor)
        assert torch.allclose(found[real].double(), wanted, atol=1e-5)
        count = len(calls)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert torch.allclose(model(x, **options)[real].double(), wanted, atol=1e-5)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert len(calls) == count
        assert not torch.allclose(base(x, **options)[real].double(), wanted, atol=1e-2)
    assert torch.allclose(model(x, **options)[real].double(), wanted, atol=1e-5), "with gradients"
    li.merge(model)
    with torch.no_grad():
        assert torch.allclose(model(x, **options)[real].double(), wanted, atol=1e-5)
    li.uninject(model)
    assert_same(before, model)


@pytest.mark.parametrize("train", [True, False])
def test_a_decoder_reads_both_attentions(train):
    torch.manual_seed(0)
    model = nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 2).train(train)
    base, x, memory = copy.deepcopy(model), torch.randn(3, TOKENS, SIZE), torch.randn(3, 4, SIZE)
    plan = li.inject(model, ["*linear*", "*self_attn", "*multihead_attn"], rank=2)
    assert len(plan) == 2 * (2 + 2 * 2)
    fill(model)
    causal = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    options = {"tgt_mask": causal, "tgt_is_causal": True, "tgt_key_padding_mask": torch.zeros(3, TOKENS)}
    wide = {key: v.double() if isinstance(v, Tensor) else v for key, v in options.items()}
    wanted = by_hand(base, model)(x.double(), memory.double(), **wide)
    assert torch.allclose(model(x, memory, **options).double(), wanted, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model(x, memory, **options).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("own", [{}, {"kdim": 4, "vdim": 6}], ids=["packed", "separate"])
def test_300_steps_in_bfloat16_leave_the_base_of_an_attention_bit_identical(own):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(SIZE, 2, batch_first=True, **own).to(torch.bfloat16)
    before = {key: raw(value) for key, value in model.state_dict().items()}
    li.inject(model, "", rank=2)
    optimizer = torch.optim.AdamW(li.adapter_parameters(model).values(), lr=0.01)
    q, k, v = (
        torch.randn(2, 3, width, dtype=torch.bfloat16) for width in (SIZE, own.get("kdim", 8), own.get("vdim", 8))
    )
    target, losses = torch.randn(2, 3, SIZE), []
    for step in range(300):
        model.train(step % 3 != 2)
        optimizer.zero_grad()
        loss = (model(q, k, v)[0].float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            with torch.no_grad():
                model(q, k, v)
    assert losses[-1] < 0.9 * losses[0]
    state = model.state_dict()
    assert {key: raw(state[key]) for key in before} == before
    assert all(p.grad is None for key, p in model.named_parameters() if ".adapters." not in key and "lora" not in key)


class Reader(nn.Module):
    """Uses its child's weight by hand, in one of the ways that people do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.child, self.other, self.how = nn.Linear(6, 6), nn.Linear(6, 6), how
        self.listed, self.closure = [self.child.weight], (lambda weight: lambda x: x @ weight.T)(self.child.weight)
        self.held = [self.child]

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(x)
        if self.how == "attribute":
            return x @ self.child.weight.T + self.child.bias
        if self.how == "module-in-list":
            return self.held[0](x)
        if self.how == "list":
            return F.linear(x, self.listed[0], self.child.bias)
        return self.closure(x)


@pytest.mark.parametrize("how", ["attribute", "module-in-list"])
def test_a_reader_by_hand_gets_the_sum(how):
    model, x = Reader(how), torch.randn(3, 6)
    base = copy.deepcopy(model)
    li.inject(model, "child", rank=2)
    fill(model)
    assert torch.allclose(model(x).double(), by_hand(base, model)(x.double()), atol=1e-5)
    report = li.verify(model, x)
    assert report.ok and not report.dead, str(report)


@pytest.mark.parametrize("how", ["list", "closure"])
def test_a_reference_taken_before_is_found_and_the_advice_says_what_to_do(how):
    model, x = Reader(how), torch.randn(3, 6)
    li.inject(model, ["child", "other"], rank=2)
    before = snapshot(model)
    report = li.verify(model, x)
    assert_same(before, model)
    (dead,) = report.dead
    assert not report.ok and not report
    assert (dead.path, dead.reached, dead.effect, dead.gradient) == ("child", False, 0.0, 0.0)
    for word in ("reference taken before the injection", "inject first", "exclude it"):
        assert word in dead.advice and word in str(report)


class Shared(nn.Module):
    """One layer at two paths, and in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again = self.first
        self.plain = [self.first, self.mix]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.plain:
            x = torch.tanh(step(x))
        return self.again(x)


def test_a_shared_module_is_adapted_once_and_exported_once(tmp_path):
    model, x = Shared(), torch.randn(3, 6)
    base = copy.deepcopy(model)
    (site,) = li.inject(model, "again", rank=2)
    assert (site.path, site.aliases) == ("first", ("again",))
    fill(model)
    hand = by_hand(base, model)
    hand.plain = [hand.first, hand.mix]
    assert torch.allclose(model(x).double(), hand(x.double()), atol=1e-5)
    path = li.export(model, tmp_path / "a.safetensors")
    assert set(li.adapter_state(model)) == {"first.lora_A", "first.lora_B"}
    li.load(base, path)
    base.plain = [base.first, base.mix]
    assert torch.equal(base(x), model(x)) and base.again is base.first


def test_an_adapter_on_the_root_has_the_empty_path(tmp_path):
    root, x = nn.Linear(6, 5), torch.randn(3, 6)
    plain = root(x)
    li.inject(root, "", rank=2)
    fill(root)
    assert [ref.path for ref in li.adapters(root)] == [""]
    assert set(li.adapter_state(root)) == {"lora_A", "lora_B"}
    fresh = nn.Linear(6, 5)
    fresh.load_state_dict({k: v for k, v in root.state_dict().items() if "adapters" not in k})
    li.load(fresh, li.export(root, tmp_path / "a"))
    assert torch.equal(fresh(x), root(x))
    assert li.verify(root, x).ok
    li.merge(root)
    li.uninject(root)
    assert torch.equal(root(x), plain)


def test_no_segment_of_a_wrapper_shows_in_paths_or_files(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Shared()
    model.mix = checkpoint_wrapper(model.mix)
    model.first = model.again = torch.compile(model.first, backend="eager")
    model.plain = [model.first, model.mix]
    wrapped = torch.compile(nn.Sequential(model), backend="eager")
    li.inject(wrapped, "*", rank=2)
    fill(wrapped)
    path = li.export(wrapped, tmp_path / "a.safetensors")
    shown = [*(ref.path for ref in li.adapters(wrapped)), *li.adapter_state(wrapped)]
    assert {ref.path for ref in li.adapters(wrapped)} == {"0.first", "0.mix"}
    assert not any("_orig_mod" in name or "_checkpoint_wrapped" in name for name in shown)
    assert b"_orig_mod" not in path.read_bytes() and b"_checkpoint_wrapped" not in path.read_bytes()


class Breaking(nn.Module):
    """Fails in the forward that has seen the adapters perturbed."""

    def __init__(self, after: int | None) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3))
        self.after = after

    def forward(self, x):
        if self.after is not None:
            self.after -= 1
            if self.after < 0:
                raise RuntimeError("out of memory, say")
        return self.inner(x)[0]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("after", [None, 0, 1, 2])
def test_verify_leaves_everything_bit_for_bit_as_it_was_even_where_the_model_fails(trained, after):
    torch.manual_seed(0)
    model = Breaking(after)
    li.inject(model, ["inner.0", "inner.1"], rank=2)
    if trained:
        fill(model)
    for parameter in li.adapter_parameters(model).values():
        parameter.grad = torch.randn_like(parameter)
    before, generator = snapshot(model), torch.get_rng_state()
    grads = [p.grad.clone() for p in li.adapter_parameters(model).values()]
    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(1))
    failed = False
    try:
        report = li.verify(model, x)
        assert report.ok and len(report.verdicts) == 3
    except RuntimeError as error:
        failed = "out of memory" in str(error)
    assert failed is (after is not None)
    assert_same(before, model)
    assert torch.equal(torch.get_rng_state(), generator)
    now = [p.grad for p in li.adapter_parameters(model).values()]
    assert all(torch.equal(one, other) for one, other in zip(now, grads, strict=True))
    assert not any(ref.adapter.merged for ref in li.adapters(model))
