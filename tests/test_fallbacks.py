"""The table "When a linear layer takes another path" in docs/how-the-swap-works.md, row by row.

Each row says which path runs, and its outputs and gradients are those of the formula in float64.
"""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

import lora_inject as li
from lora_inject.fused import fused_linear

PAGE = Path(__file__).resolve().parent.parent / "docs" / "how-the-swap-works.md"
HALF = {torch.bfloat16, torch.float16}


class Own(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Marked(Tensor):
    """Stands for the tensor subclasses in which quantized and sharded weights come."""


class Same(nn.Module):
    def forward(self, weight):
        return weight * 1


def made(cls=nn.Linear, names=("a",), dtype=torch.float32, before=lambda layer: None, **options) -> nn.Module:
    torch.manual_seed(3)
    layer = (Conv1D(4, 6) if cls is Conv1D else cls(6, 4)).to(dtype)
    before(layer)
    for name in names:
        li.inject(layer, "", name=name, **{"rank": 2, "alpha": 3, **options})
    with torch.no_grad():
        for parameter in li.adapter_parameters(layer).values():
            parameter.normal_(0, 0.5)
    return layer


def patched(layer: nn.Module) -> None:
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)


def unbiased(layer: nn.Module) -> None:
    layer.bias = None


def marked(layer: nn.Module) -> None:
    weight = layer.weight.detach().as_subclass(Marked)
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


def reference(layer: nn.Module, x: Tensor, masks: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Returns the output and the leaves x, A, B, ... in float64, each step written out."""
    copies = {key: p.detach().double().as_subclass(Tensor) for key, p in layer.state_dict().items()}
    x = x.detach().double().requires_grad_(True)
    weight = copies.get("weight", copies.get("parametrizations.weight.original"))
    out = x @ (weight if isinstance(layer, Conv1D) else weight.T) + copies.get("bias", 0)
    leaves = [x]
    for (name, adapter), mask in zip(layer.adapters.items(), masks, strict=True):
        p = {k: copies[f"adapters.{name}.{k}"].requires_grad_(True) for k in adapter._parameters}
        leaves += p.values()
        met = x * mask
        if "lora_dense" in p:
            out = out + 1.5 * (met @ p["lora_dense"].T)
        elif isinstance(layer, Conv1D):
            out = out + 1.5 * (met @ p["lora_B"] @ p["lora_A"])
        else:
            inner = met @ p["lora_A"].T + p.get("lora_A_bias", 0)
            out = out + 1.5 * (inner @ p["lora_B"].T + p.get("lora_B_bias", 0))
    return out, leaves


def plainly(layer, x):
    return layer(x)


def autocast(layer, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x)


def one_rank(layer, x):
    """Runs the layer on a DTensor over one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    mesh = init_device_mesh("cpu", (1,))
    distribute_module(layer, mesh)
    return layer(DTensor.from_local(x, mesh, [Replicate()])).to_local()


def selectively(layer, x):
    """Checkpoints the layer, its matrix products kept."""
    keep = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    return checkpoint(layer, x, use_reentrant=False, context_fn=keep)


def compiled(layer, x):
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")(x)


CASES = {
    # row of the table: (path, layer, run, dtype of the arithmetic)
    "`nn.Linear` and its subclasses that leave `forward` alone": ("fused", made, plainly, torch.float32),
    "`Conv1D` of transformers": ("fused", lambda: made(Conv1D), plainly, torch.float32),
    "float64": ("fused", lambda: made(dtype=torch.float64), plainly, torch.float64),
    "bfloat16": ("fused", lambda: made(dtype=torch.bfloat16), plainly, torch.bfloat16),
    "float16": ("fused", lambda: made(dtype=torch.float16), plainly, torch.float16),
    "autocast": ("fused", made, autocast, torch.bfloat16),
    "several adapters without dropout": ("fused", lambda: made(names=("a", "b")), plainly, torch.float32),
    "gradient checkpointing": (
        *("fused", made, lambda layer, x: checkpoint(layer, x, use_reentrant=False), torch.float32),
    ),
    "several adapters with dropout, training": (
        *("parts", lambda: made(names=("a", "b"), dropout=0.5).train(), plainly, torch.float32),
    ),
    "`bias=True`": ("parts", lambda: made(bias=True), plainly, torch.float32),
    "`dense=True` where it is used": ("parts", lambda: made(dense=True, rank=4, alpha=6), plainly, torch.float32),
    "a weight that is a tensor subclass (quantized, for one)": (
        *("parts", lambda: made(before=marked), plainly, torch.float32),
    ),
    "a weight or input that is a DTensor": ("parts", made, one_rank, torch.float32),
    "`torch.compile`": ("parts", made, compiled, torch.float32),
    "`torch.func`: vmap, grad, jvp": ("parts", made, lambda layer, x: torch.func.vmap(layer)(x), torch.float32),
    "a dispatch mode (selective checkpointing, counters of operations)": (
        *("parts", lambda: made(before=unbiased), selectively, torch.float32),
    ),
    "a subclass with a `forward` of its own": ("weight", lambda: made(Own), plainly, torch.float32),
    "a `forward` set on the instance": ("weight", lambda: made(before=patched), plainly, torch.float32),
    "a weight that is computed (parametrized)": (
        *("weight", lambda: made(before=lambda layer: parametrize.register_parametrization(layer, "weight", Same()))),
        *(plainly, torch.float32),
    ),
}


@pytest.fixture
def process_group(tmp_path):
    os.environ.setdefault("MASTER_ADDR", "localhost")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", CASES)
def test_every_path_gives_the_formula_s_outputs_and_gradients(row, monkeypatch, request):
    path, make, run, dtype = CASES[row]
    if run is one_rank:
        request.getfixturevalue("process_group")
    layer, calls = make(), []
    layers = sys.modules["lora_inject.adapters.linear"]
    monkeypatch.setattr(layers, "fused_linear", lambda *a, **k: calls.append(1) or fused_linear(*a, **k))
    given = next(p.dtype for key, p in layer.named_parameters() if "adapters" not in key)
    x = torch.randn(2, 3, 6).to(given).requires_grad_(True)
    masks = [torch.ones(2, 3, 6, dtype=torch.float64) for _ in layer.adapters]
    if "dropout" in row and path == "parts":
        torch.manual_seed(8)
        masks = [F.dropout(torch.ones(2, 3, 6), 0.5).double() for _ in masks]
    wanted, leaves = reference(layer, x, masks)
    torch.manual_seed(8)
    found = run(layer, x)
    assert bool(calls) is (path == "fused"), "another path than the table says"
    assert (layer.lora_family is None) is (path == "weight")
    found.double().square().sum().backward()
    wanted.square().sum().backward()
    tolerance = 0.04 if dtype in HALF else 1e-9 if dtype == torch.float64 else 1e-5
    own = [x, *li.adapter_parameters(layer).values()]
    grads = [getattr(t.grad, "_local_tensor", t.grad) for t in own]
    for one, other in zip([found, *grads], [wanted, *(leaf.grad for leaf in leaves)], strict=True):
        scale = other.abs().max()
        assert (one.double() - other).abs().max() <= tolerance * scale
        assert scale > 0


def test_a_wrong_input_gives_the_base_s_own_error():
    layer, plain = made(), nn.Linear(6, 4)
    for x in (torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 5)):
        with pytest.raises(RuntimeError) as wanted:
            plain(x)
        with pytest.raises(RuntimeError, match=re.escape(str(wanted.value))):
            layer(x)


def test_a_model_on_the_meta_device_has_the_shapes():
    layer = nn.Linear(6, 4, device="meta")
    li.inject(layer, "", rank=2)
    out = layer(torch.empty(2, 3, 6, device="meta", requires_grad=True))
    out.sum().backward()
    assert out.shape == (2, 3, 4) and layer.adapters["default"].lora_A.grad.shape == (2, 6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_goes_by_the_parts():
    layer, x = made(), torch.randn(2, 3, 6)
    _, found = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    one, two = (reference(layer, point, [torch.ones(2, 3, 6)])[0] for point in (x + 1, x))
    assert torch.allclose(found.double(), one - two, atol=1e-5)


def test_the_page_has_a_row_for_every_case():
    text = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (.+?) \| (fused|parts|weight) \|", text, re.MULTILINE))
    assert {row: path for row, (path, *_) in CASES.items()}.items() <= rows.items()
    assert set(rows) - set(CASES) == {"a second derivative", "the meta device"}
