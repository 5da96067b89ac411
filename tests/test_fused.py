"""The one autograd function of linear layers: its numbers, its gradients, what it saves, and when it steps aside."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import pytest
import torch
from reference import within
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora_inject as li
from lora_inject.dropout import draw
from lora_inject.fused import fused_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(6,), (5, 6), (2, 3, 6), (2, 1, 3, 6)]
transposed = pytest.mark.parametrize("transposed", [False, True])


def numbers(dtype: torch.dtype, shape=(5, 6), ranks=(2,), *, transposed=False, grad=False) -> tuple[Tensor, ...]:
    """Returns x, W (4 outputs, 6 inputs), b, and the factors that the input meets first and second."""
    generator = torch.Generator().manual_seed(1)
    weight = (6, 4) if transposed else (4, 6)
    pairs = [((6, r), (r, 4)) if transposed else ((r, 6), (4, r)) for r in ranks]
    shapes = [shape, weight, (4,), *(one for pair in pairs for one in pair)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return tuple(t.requires_grad_(grad) for t in made)


def by_hand(x, weight, bias, scales, factors, transposed=False, sign=lambda t: t) -> Tensor:
    """x W^T + b + sum of s (x A^T) B^T in float64, with W, A and B as the layer stores them."""
    x, weight, bias, *factors = (sign(t.detach().double()) for t in (x, weight, bias, *factors))
    out = x @ (weight if transposed else weight.T) + bias
    for scale, first, second in zip(scales, factors[::2], factors[1::2], strict=True):
        product = first @ second if transposed else (second @ first).T
        out = out + sign(torch.tensor(scale, dtype=torch.float64)) * (x @ product)
    return out


@transposed
@pytest.mark.parametrize("ranks", [(2,), (1, 3), (2, 2, 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_the_output_is_the_formula(transposed, ranks, shape, dtype, grad):
    x, weight, bias, *factors = numbers(dtype, shape, ranks, transposed=transposed, grad=grad)
    scales = (1.5, -0.5, 3.0)[: len(ranks)]
    found = fused_linear(x, weight, bias, scales, factors, transposed=transposed)
    wanted = by_hand(x, weight, bias, scales, factors, transposed)
    size = by_hand(x, weight, bias, scales, factors, transposed, torch.abs)
    assert found.dtype == dtype and found.shape == wanted.shape and found.requires_grad is grad
    assert within(found, wanted, size, 8 if dtype.itemsize == 2 else 32)
    alone = by_hand(x, weight, bias, (0.0,) * len(ranks), factors, transposed)
    assert not within(found, alone, size, 32 if dtype.itemsize > 2 else 8)


@transposed
@pytest.mark.parametrize("ranks", [(2,), (1, 2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_every_argument(transposed, ranks, shape):
    def run(x, weight, bias, *factors):
        return fused_linear(x, weight, bias, (1.5, -0.5)[: len(ranks)], factors, transposed=transposed)

    given = numbers(torch.float64, shape, ranks, transposed=transposed, grad=True)
    assert gradcheck(run, given)
    assert gradgradcheck(run, given)


@transposed
@pytest.mark.parametrize("train_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_token_in_half_precision_meets_the_factors_as_they_are(dtype, train_first, transposed):
    x, weight, _, *factors = numbers(torch.float32, (1, 1, 6), transposed=transposed, grad=True)
    x = x.detach().to(dtype).requires_grad_(True)
    zero = torch.zeros_like(weight, dtype=dtype)
    factors[0].requires_grad_(train_first)
    found = fused_linear(x, zero, None, (1.5,), factors, transposed=transposed)
    far, *exact = (t.detach().double().requires_grad_(True) for t in (x, *factors))
    first, second = exact if transposed else (factor.T for factor in exact)
    wanted = 1.5 * far @ first @ second
    # One rounding to half precision, and none of the factors: theirs would add up to several.
    assert torch.allclose(found.double(), wanted, rtol=torch.finfo(dtype).eps * 0.51, atol=0)
    with torch.no_grad():
        assert torch.equal(fused_linear(x, zero, None, (1.5,), factors, transposed=transposed), found)
    found.double().sum().backward()
    wanted.sum().backward()
    leaves, reference = [x, *factors], [far, *exact]
    for one, other in zip(leaves, reference, strict=True):
        if one.requires_grad:
            assert torch.allclose(one.grad.double(), other.grad, rtol=0, atol=0.02 * float(other.grad.abs().max()))
    assert (factors[0].grad is None) is not train_first


@transposed
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("scales", [(1.5,), (1.0,), (1.5, 0.5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_token_at_all_gives_zero_gradients(dtype, scales, dropout, transposed):
    ranks = (2,) * len(scales)
    x, weight, bias, *factors = numbers(dtype, (2, 0, 6), ranks, transposed=transposed, grad=True)
    rate = dropout if len(scales) == 1 else 0.0
    fused_linear(x, weight, bias, scales, factors, transposed=transposed, dropout=rate).sum().backward()
    for tensor in (x, weight, bias, *factors):
        assert tensor.grad.shape == tensor.shape and not tensor.grad.any()


@transposed
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_backward_passes_at_once(transposed):
    x, weight, bias, *factors = numbers(torch.float64, (5, 6), transposed=transposed, grad=True)
    out = fused_linear(x, weight, bias, (1.5,), factors, transposed=transposed, dropout=0.4)
    leaves, directions = [x, *factors], torch.randn(3, 5, 4, dtype=torch.float64)
    found = torch.autograd.grad(out, leaves, directions, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda one: torch.autograd.grad(out, leaves, one, retain_graph=True))(directions)
    for i, direction in enumerate(directions):
        wanted = torch.autograd.grad(out, leaves, direction, retain_graph=True)
        for batch, other, one in zip(found, mapped, wanted, strict=True):
            assert torch.allclose(batch[i], one) and torch.allclose(other[i], one)


@transposed
def test_gradients_with_dropout(transposed):
    def run(*given):
        torch.manual_seed(4)
        x, weight, bias, *factors = given
        return fused_linear(x, weight, bias, (1.5,), factors, transposed=transposed, dropout=0.4)

    given = numbers(torch.float64, (2, 3, 6), transposed=transposed, grad=True)
    assert gradcheck(run, given)
    assert gradgradcheck(run, given)
    with torch.no_grad():
        assert not torch.equal(run(*given), by_hand(*given[:3], (1.5,), given[3:], transposed))


def test_a_dropout_next_to_one_scales_what_stays_and_drops_the_rest():
    x, rate = torch.rand(4096, 64, generator=torch.Generator().manual_seed(0)) + 1, 0.999999
    out = fused_linear(x, torch.zeros(64, 64), None, (1.0,), (torch.eye(64), torch.eye(64)), dropout=rate)
    kept = out != 0
    assert torch.allclose(out[kept].double(), x[kept].double() / (1 - rate), rtol=1e-5)
    assert kept.sum() < 200, "one in four such calls is expected to keep one, or a few of one column"


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(rate):
    x, size = torch.ones(400, 64), 64
    eye, zero = torch.eye(size), torch.zeros(size, size)
    out = fused_linear(x, zero, None, (1.0,), (eye, eye), dropout=rate)
    dropped = (out == 0).double().mean()
    deviation = (rate * (1 - rate) / x.numel()) ** 0.5
    assert abs(dropped - rate) < 5 * deviation
    assert torch.allclose(out[out != 0], torch.full(((out != 0).sum(),), 1 / (1 - rate)), rtol=1e-3)
    assert abs(out.double().mean() - 1) < 5 * deviation / (1 - rate) + 1e-4
    assert not torch.equal(out, fused_linear(x, zero, None, (1.0,), (eye, eye), dropout=rate)), "a new mask each time"
    rows = (out == 0).double()
    assert rows.mean(0).std() < 3 * (rate * (1 - rate) / 400) ** 0.5, "columns are dropped alike"


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.1, 0.9995])
def test_dropout_has_the_asked_rate_beyond_eight_bits(rate):
    dropped = torch.zeros(64, 256, dtype=torch.float64)
    torch.manual_seed(0)
    for _ in range(200):
        dropped += draw(dropped, rate).view(dropped.shape) == 0
    draws = 200 * dropped.numel()
    assert abs(dropped.sum() / draws - rate) < 5 * (rate * (1 - rate) / draws) ** 0.5
    # Independent draws: what each element, each feature and each token lost has the variance of a binomial one.
    for count, times in ((dropped, 200), (dropped.sum(0), 200 * 64), (dropped.sum(1), 200 * 256)):
        assert 0.5 < count.var() / (times * rate * (1 - rate)) < 1.6


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_draws_the_same_mask_again(reentrant):
    layer = adapted(dropout=0.5).train()
    x = torch.randn(3, 6, requires_grad=True)

    def gradients(run):
        layer.zero_grad()
        torch.manual_seed(9)
        run(x).sum().backward()
        return [p.grad for p in li.adapter_parameters(layer).values()]

    wanted = gradients(layer)
    found = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def adapted(names=("default",), cls=nn.Linear, **options) -> nn.Module:
    torch.manual_seed(2)
    layer = Conv1D(4, 6) if cls is Conv1D else cls(6, 4)
    for name in names:
        li.inject(layer, "", rank=2, alpha=3, name=name, **options)
    with torch.no_grad():
        for parameter in li.adapter_parameters(layer).values():
            parameter.normal_()
    return layer


def unfused(layer: nn.Module, x: Tensor) -> Tensor:
    """The formula with ordinary operations, so that autograd does all."""
    weight = layer._parameters["weight"]
    out = x @ (weight if isinstance(layer, Conv1D) else weight.T) + layer._parameters["bias"]
    for adapter in layer.adapters.values():
        a, b = adapter.lora_A, adapter.lora_B
        out = out + 1.5 * (x @ (b @ a if isinstance(layer, Conv1D) else (b @ a).T))
    return out


@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
@pytest.mark.parametrize("names", [("a",), ("a", "b")])
@pytest.mark.parametrize("freeze", [True, False])
def test_a_layer_trains_as_the_formula_says(cls, names, freeze):
    layer, x = adapted(names, cls, freeze=freeze), torch.randn(2, 3, 6, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found = torch.autograd.grad(layer(x).square().sum(), leaves)
    wanted = torch.autograd.grad(unfused(layer, x).square().sum(), leaves)
    assert len(leaves) == 1 + 2 * len(names) + 2 * (not freeze)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [lambda y: y.div_(2), lambda y: y.add_(1), lambda y: y[:, 0].mul_(3)])
@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
def test_the_output_can_be_changed_in_place(change, cls):
    layer, x = adapted(cls=cls, freeze=False), torch.randn(2, 3, 6)
    found, wanted = layer(x), unfused(layer, x)
    change(found)
    change(wanted)
    parameters = list(layer.parameters())
    one = torch.autograd.grad(found.square().sum(), parameters)
    other = torch.autograd.grad(wanted.square().sum(), parameters)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, x_dtype):
    layer, x = adapted(freeze=False), torch.randn(5, 6).to(x_dtype).requires_grad_(True)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
    assert out.dtype == dtype
    exact = copy.deepcopy(layer).double()
    far = x.detach().double().requires_grad_(True)
    wanted = unfused(exact, far)
    assert torch.allclose(out.double(), wanted, rtol=0.02, atol=0.1)
    out.double().sum().backward()
    wanted.sum().backward()
    assert x.grad.dtype == x_dtype and torch.allclose(x.grad.double(), far.grad, rtol=0.05, atol=0.1)
    for one, other in zip(layer.parameters(), exact.parameters(), strict=True):
        assert one.grad.dtype == torch.float32
        assert torch.allclose(one.grad.double(), other.grad, rtol=0.05, atol=0.2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_transform_of_functorch_goes_the_plain_way():
    layer, x = adapted(), torch.randn(3, 2, 6)
    assert torch.allclose(torch.func.vmap(layer)(x), unfused(layer, x), atol=1e-5)
    parameters = {k: p.detach() for k, p in li.adapter_parameters(layer).items()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        wanted = torch.autograd.grad(unfused(layer, row).square().sum(), list(li.adapter_parameters(layer).values()))
        for key, gradient in zip(parameters, wanted, strict=True):
            assert torch.allclose(found[key][i], gradient, rtol=1e-4, atol=1e-4)
    _, moved = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    assert torch.allclose(moved, unfused(layer, x + 1) - unfused(layer, x), atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, moved, atol=1e-5)


def test_the_input_of_q_k_and_v_is_saved_once_and_no_large_product_at_all():
    torch.manual_seed(0)
    parts = nn.ModuleDict({name: nn.Linear(64, 64) for name in "qkv"})
    li.inject(parts, "*", rank=2)
    x = torch.randn(32, 64, requires_grad=True)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outs = [part(x) for part in parts.values()]
    assert len(outs) == 3
    held = {x.untyped_storage().data_ptr(), *(p.untyped_storage().data_ptr() for p in parts.parameters())}
    extra = {pointer: size for pointer, size in saved.items() if pointer not in held}
    assert x.untyped_storage().data_ptr() in saved
    assert not extra, f"{sum(extra.values())} bytes beside the input and the weights"


def test_a_weight_that_changes_before_the_backward_pass_is_noticed():
    layer = nn.Linear(6, 5)
    li.inject(layer, "", rank=2)
    out = layer(torch.randn(4, 6, requires_grad=True))
    with torch.no_grad():
        layer._parameters["weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class _Made(TorchDispatchMode):
    """Collects the sizes of the tensors that operations make anew, views of the module's own left out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.own = {p.untyped_storage()._cdata for p in module.parameters()}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        flat = [one for one in tree_leaves(found) if isinstance(one, Tensor)]
        self.sizes += [one.numel() for one in flat if one.untyped_storage()._cdata not in self.own]
        return found


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Conv1d(12, 20, 3), torch.randn(2, 12, 9)),
        (lambda: nn.Conv2d(12, 20, 3), torch.randn(2, 12, 7, 7)),
        (lambda: nn.Conv2d(12, 20, 3, groups=2), torch.randn(2, 12, 7, 7)),
        (lambda: nn.Conv3d(6, 7, 3), torch.randn(1, 6, 4, 4, 4)),
        (lambda: nn.ConvTranspose2d(12, 20, 3), torch.randn(2, 12, 5, 5)),
        (lambda: nn.Embedding(50, 24), torch.randint(0, 50, (3, 5))),
        (lambda: nn.EmbeddingBag(50, 24), torch.randint(0, 50, (3, 5))),
    ],
    ids=["conv1d", "conv2d", "groups", "conv3d", "transposed", "embedding", "bag"],
)
def test_convolutions_and_embeddings_make_no_dense_update(make, x):
    layer = make()
    size = layer.weight.numel()
    li.inject(layer, "", rank=2)
    nn.init.normal_(layer.adapters["default"].lora_B)
    with _Made(layer) as made:
        layer(x).square().sum().backward()
    assert made.sizes and size not in made.sizes
    with _Made(layer) as made:
        layer.weight  # noqa: B018
    # The reader of the weight does make one, so the look would have seen it.
    assert size in made.sizes


@transposed
@pytest.mark.parametrize(("dropout", "ranks"), [(0.0, (2,)), (0.0, (1, 2)), (0.4, (2,))])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_with_the_first_factor_and_the_weight_frozen(transposed, dropout, ranks, shape):
    x, weight, bias, *factors = numbers(torch.float64, shape, ranks, transposed=transposed, grad=True)
    for tensor in (weight, *factors[0::2]):
        tensor.requires_grad_(False)

    def run(x, bias, *seconds):
        torch.manual_seed(4)
        pairs = [one for pair in zip(factors[0::2], seconds, strict=True) for one in pair]
        scales = (1.5, -0.5)[: len(ranks)]
        return fused_linear(x, weight, bias, scales, pairs, transposed=transposed, dropout=dropout)

    assert gradcheck(run, (x, bias, *factors[1::2]))
    assert gradgradcheck(run, (x, bias, *factors[1::2]))
    assert gradcheck(lambda *rest: run(x.detach(), *rest), (bias, *factors[1::2]))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_frozen_a_keeps_only_the_rank_sized_product_and_a_bit_for_what_may_be_dropped(dropout):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    li.inject(layer, "", rank=2, train_a=False, dropout=dropout)
    nn.init.normal_(layer.adapters["default"].lora_B)
    x = torch.randn(32, 64, requires_grad=True) * 1
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(x).sum()
    held = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    mask = 32 * 64 // 8 if dropout else 0
    assert sum(size for pointer, size in saved.items() if pointer not in held) == 32 * 2 * 4 + mask


def test_train_a_freezes_a_alone_and_travels_with_files_and_copies(tmp_path):
    layer = adapted(train_a=False)
    flags = {key: p.requires_grad for key, p in layer.named_parameters()}
    wanted = {"weight": False, "bias": False, "adapters.default.lora_A": False, "adapters.default.lora_B": True}
    assert flags == wanted
    assert list(li.adapter_parameters(layer)) == ["adapters.default.lora_A", "adapters.default.lora_B"]
    layer(torch.randn(3, 6)).sum().backward()
    assert {key for key, p in layer.named_parameters() if p.grad is not None} == {"adapters.default.lora_B"}
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    li.export(layer, tmp_path / "a.safetensors")
    fresh = nn.Linear(6, 4)
    fresh.load_state_dict({key: value for key, value in layer.state_dict().items() if "adapters" not in key})
    li.load(fresh, tmp_path / "a.safetensors")
    x = torch.randn(3, 6)
    for twin in (*twins, fresh):
        assert {key: p.requires_grad for key, p in twin.named_parameters()} == wanted
        assert torch.equal(twin(x), layer(x))
    li.uninject(layer)
    assert all(p.requires_grad for p in layer.parameters())


def test_a_file_from_before_train_a_trains_a(tmp_path):
    layer, path = adapted(train_a=False), tmp_path / "a.safetensors"
    li.export(layer, path)
    with safe_open(path, "pt") as file:
        meta, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    described = json.loads(meta["adapter"])
    assert described["sites"][0].pop("train_a") is False
    save_file(tensors, path, meta | {"adapter": json.dumps(described)})
    li.uninject(layer)
    li.load(layer, path)
    assert layer.adapters["default"].lora_A.requires_grad
    described["sites"][0].pop("rank")
    save_file(tensors, path, meta | {"adapter": json.dumps(described)})
    with pytest.raises(li.FormatError, match="exactly the keys"):
        li.load(nn.Linear(6, 4), path)


def test_it_is_what_a_plain_layer_runs_and_what_others_do_not(monkeypatch):
    calls = []
    layers = sys.modules["lora_inject.adapters.linear"]
    monkeypatch.setattr(layers, "fused_linear", lambda *a, **k: calls.append(1) or fused_linear(*a, **k))
    x = torch.randn(3, 6)
    adapted()(x)
    assert len(calls) == 1
    adapted(bias=True)(x)
    adapted(("a", "b"), dropout=0.5).train()(x)
    li.inject(layer := nn.Linear(6, 4), "", rank=4, dense=True)
    layer(x)
    assert len(calls) == 1


def test_an_input_of_a_wrong_dtype_or_width_gives_the_layer_s_own_error():
    layer, plain = adapted(), nn.Linear(6, 4)
    for x in (torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 5), torch.ones(3, 6, dtype=torch.int64)):
        with pytest.raises(RuntimeError) as wanted:
            plain(x)
        with pytest.raises(RuntimeError) as found:
            layer(x)
        assert str(found.value) == str(wanted.value)
