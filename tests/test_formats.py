"""What all formats share: recognition, factors in the order of the input, names, prefixes, whole parameters."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from snapshot import assert_same, snapshot
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_inject as li
from lora_inject.formats.content import look
from lora_inject.formats.factors import Factors, alpha_for
from lora_inject.formats.orient import inward, outward
from lora_inject.formats.prefixes import aligned
from lora_inject.formats.resolve import Parsed, resolve
from lora_inject.formats.trained import as_updates, as_values, difference
from lora_inject.registry import adapter_for
from lora_inject.state import bundle_of


def fill(model) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


MODULES = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6), {}),
    "linear-biases": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6), {"bias": True}),
    "linear-dense-wide": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6), {"rank": 6, "dense": True}),
    "linear-dense-tall": (lambda: nn.Linear(5, 6), lambda: torch.randn(3, 5), {"rank": 6, "dense": True}),
    "linear-rslora": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6), {"rslora": True}),
    "conv1d": (lambda: Conv1D(5, 6), lambda: torch.randn(3, 6), {}),
    "conv1d-biases": (lambda: Conv1D(5, 6), lambda: torch.randn(3, 6), {"bias": True}),
    "conv1d-dense": (lambda: Conv1D(5, 6), lambda: torch.randn(3, 6), {"rank": 8, "dense": True}),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.arange(7), {}),
    "embedding-dense": (lambda: nn.Embedding(7, 5), lambda: torch.arange(7), {"rank": 7, "dense": True}),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), lambda: torch.randn(2, 4, 5, 5), {}),
    "conv-balanced": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2),
        lambda: torch.randn(2, 4, 5, 5),
        {"factorization": "balanced", "bias": True},
    ),
    "conv-dense": (lambda: nn.Conv2d(2, 3, 2), lambda: torch.randn(2, 2, 4, 4), {"rank": 9, "dense": True}),
}


def by_hand(module: nn.Module, x: torch.Tensor, factors: Factors) -> torch.Tensor:
    """Returns scaling * (B (A x) + b) in float64, with A and B as layers of the module's own kind."""
    a, b = factors.a.double(), factors.b.double()
    bias = torch.zeros(b.shape[0], dtype=torch.float64) if factors.bias is None else factors.bias.double()
    scaling = factors.alpha / (math.sqrt(a.shape[0]) if factors.rslora else a.shape[0])
    if isinstance(module, nn.Embedding):
        return scaling * (b @ a[:, x] + bias[:, None]).T
    if isinstance(module, nn.Conv2d):
        first = torch.cat([a] * module.groups)
        options = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        inner = torch.nn.functional.conv2d(x.double(), first, groups=module.groups, **options)
        return scaling * torch.nn.functional.conv2d(inner, b, bias, groups=module.groups)
    return scaling * (x.double() @ a.T @ b.T + bias)


@pytest.mark.parametrize("case", MODULES)
def test_factors_in_the_order_of_the_input_compute_what_the_adapter_adds(case):
    make, input, options = MODULES[case]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), input()
    base = model(x)
    li.inject(model, "0", **({"rank": 3, "alpha": 5.0} | options))
    fill(model)
    bundle = bundle_of(model)
    factors = outward(bundle, bundle.sites["0"])
    added = (model(x) - base).double()
    assert torch.allclose(added, by_hand(li.adapters(model).__next__().module, x, factors), atol=2e-5)
    if case.split("-")[-1] in ("linear", "conv1d", "embedding", "conv", "rslora"):
        config, tensors = inward(factors, adapter_for(make()))
        assert config.scaling == bundle.sites["0"].config.scaling
        assert all(torch.equal(tensors[name], bundle.entries["0"][name]) for name in ("lora_A", "lora_B"))


@pytest.mark.parametrize("make", [lambda: nn.ConvTranspose2d(2, 3, 2), lambda: nn.EmbeddingBag(5, 3)])
def test_what_others_do_not_know_is_refused_by_name(make):
    model = nn.Sequential(make())
    li.inject(model, "0", rank=1)
    bundle = bundle_of(model)
    with pytest.raises(li.UnsupportedError, match="0: an adapter of kind"):
        outward(bundle, bundle.sites["0"])


@given(st.floats(1e-6, 1e6), st.integers(1, 4096), st.booleans())
def test_an_alpha_for_a_scaling_gives_it_back(scaling, rank, rslora):
    found = alpha_for(scaling, rank, rslora) / (math.sqrt(rank) if rslora else rank)
    assert abs(found - scaling) <= 2**-52 * scaling
    if not rslora and rank & (rank - 1) == 0:
        assert found == scaling


@pytest.mark.parametrize("alpha", [-4.0, 0.0])
def test_a_scale_that_is_not_positive_goes_into_b(alpha):
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    found = Factors(path="0", a=a, b=b, alpha=alpha).checked("file")
    assert found.alpha > 0
    assert torch.equal(found.scaling * (found.b @ found.a), (alpha / 2) * (b @ a))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"b": torch.ones(5, 3)}, "do not share a rank"),
        ({"a": torch.ones(6)}, "do not share a rank"),
        ({"a": torch.ones(2, 6, dtype=torch.int32)}, "floating-point"),
        ({"alpha": math.nan}, "not finite"),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(change, why):
    given = {"path": "0", "a": torch.ones(2, 6), "b": torch.ones(5, 2), "alpha": 2.0} | change
    with pytest.raises(li.FormatError, match=f"file: 0: .*{why}"):
        Factors(**given).checked("file")


KNOWN = {"model.layers.0.q", "model.layers.1.q", "model.embed", "head", "model", ""}


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [
        (["model.layers.0.q", "head"], ["model.layers.0.q", "head"]),
        (["base_model.model.model.layers.0.q"], ["model.layers.0.q"]),
        (["_orig_mod.model.layers.0.q", "_orig_mod.head"], ["model.layers.0.q", "head"]),
        (["module._orig_mod.model.layers.0.q"], ["model.layers.0.q"]),
        (["layers.0.q", "layers.1.q"], ["model.layers.0.q", "model.layers.1.q"]),
        (["base_model.model.layers.0.q"], ["model.layers.0.q"]),
        (["layers.0.q", "other.1.q"], None),
        (["layers.0.q", "head"], None),
    ],
)
def test_a_prefix_is_recognised_where_it_is_complete(paths, wanted):
    found = aligned(paths, KNOWN)
    assert (found if wanted is None else [found[0](path) for path in paths]) == wanted
    if wanted not in (None, paths):
        assert "prefix" in found[1] or "under" in found[1]


def test_a_prefix_is_not_guessed_where_two_would_do():
    assert aligned(["q"], {"model.q", "transformer.q"}) is None


class Wrapped(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model


def test_loading_says_that_a_prefix_was_added_and_refuses_where_it_is_not_sure(tmp_path):
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    whole = Wrapped(copy.deepcopy(inner))
    li.inject(inner, "*", rank=2)
    fill(inner)
    path = li.export(inner, tmp_path / "adapter.safetensors")
    plan = li.load(whole, path)
    assert [site.path for site in plan] == ["model.0", "model.1"]
    assert any("'model.'" in note for note in plan.notes) and plan.notes[0] in str(plan)
    x = torch.randn(2, 4)
    assert torch.equal(whole.model(x), inner(x))
    two = Wrapped(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    two.transformer = copy.deepcopy(two.model)
    before = snapshot(two)
    with pytest.raises(li.MismatchError, match="no module for 2 of 2 sites"):
        li.load(two, path, check_base=False)
    assert_same(before, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_update_of_a_whole_parameter_gives_the_trained_value_back_exactly(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, generator=generator).to(dtype)
    trained = (
        weight.double() + torch.randn(1000, generator=generator).double() * 10.0 ** torch.arange(-5, 5).repeat(100)
    ).to(dtype)
    update = difference(trained, weight)
    wide = torch.float64 if torch.float64 in (dtype, update.dtype) else torch.float32
    assert torch.equal((weight.to(wide) + update.to(wide)).to(dtype), trained)


def test_whole_parameters_become_updates_with_a_model_and_values_again(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    values = {"1.weight": torch.randn(4), "1.bias": torch.randn(4)}
    pair = Factors(path="0", a=torch.randn(2, 4), b=torch.randn(4, 2), alpha=2.0)
    bundle = resolve(Parsed(path=Path("file"), factors=[pair], full=values), model)
    updates = as_updates(bundle, model)
    assert {path: record.kind for path, record in updates.sites.items()} == {
        "0": "linear",
        "1.weight": "full",
        "1.bias": "full",
    }
    again = as_values(updates, model)
    assert all(torch.equal(again.full[path], value) for path, value in values.items()) and set(again.sites) == {"0"}
    with pytest.raises(li.UnsupportedError, match=r"base's weights:\n  1\.weight"):
        as_values(updates, None)
    with pytest.raises(li.MismatchError, match=r"1\.weight: shape \(5,\)"):
        as_updates(resolve(Parsed(path=Path("file"), factors=[pair], full={"1.weight": torch.ones(5)}), model), model)
    with pytest.raises(li.UnsupportedError, match="meta"):
        as_updates(bundle, copy.deepcopy(model).to("meta"))


def test_one_site_twice_and_names_that_fit_two_modules_are_refused():
    pair = {"a": torch.randn(2, 4), "b": torch.randn(4, 2), "alpha": 2.0}
    model = nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(4, 4)}), "a": nn.ModuleDict({"b_c": nn.Linear(4, 4)})})
    flat = Parsed(path=Path("f"), factors=[Factors(path="a_b_c", **pair)], spell=lambda path: [path.replace(".", "_")])
    with pytest.raises(li.MismatchError, match=r"a_b_c: a_b\.c or a\.b_c"):
        resolve(flat, model)
    twice = Parsed(path=Path("f"), factors=[Factors(path="a.b_c", **pair)] * 2)
    with pytest.raises(li.FormatError, match="stands twice"):
        resolve(twice, model)


def test_a_convolution_of_kernel_one_may_be_stored_like_a_linear_layer_and_the_other_way_round():
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Linear(4, 6))
    flat = Factors(path="0", a=torch.randn(2, 4), b=torch.randn(6, 2), alpha=2.0)
    deep = Factors(path="1", a=torch.randn(2, 4, 1, 1), b=torch.randn(6, 2, 1, 1), alpha=2.0)
    bundle = resolve(Parsed(path=Path("f"), factors=[flat, deep]), model)
    assert bundle.entries["0"]["lora_A"].shape == (2, 4, 1, 1) and bundle.entries["1"]["lora_B"].shape == (6, 2)


def test_what_is_no_adapter_is_refused_and_says_what_it_holds(tmp_path):
    save_file({"some.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(li.FormatError, match=r"known format.*some\.weight"):
        li.load(nn.Linear(2, 2), tmp_path / "a.safetensors")
    with pytest.raises(li.FormatError, match="no adapter"):
        look(tmp_path)
    with pytest.raises(li.FormatError, match="cannot be read"):
        look(tmp_path / "nothing")
    torch.save({"x": torch.ones(2)}, tmp_path / "a.bin")
    with pytest.raises(li.FormatError, match="--allow-pickle"):
        look(tmp_path / "a.bin")
    assert torch.equal(look(tmp_path / "a.bin", allow_pickle=True).read(None)["x"], torch.ones(2))


class Payload:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "ran"))


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.safetensors"])
def test_a_pickle_runs_nothing_even_where_pickles_are_allowed(tmp_path, name):
    torch.save({"x": Payload(tmp_path / "ran")}, tmp_path / name)
    for allowed in (False, True):
        with pytest.raises(li.FormatError):
            look(tmp_path / name, allow_pickle=allowed)
    assert not (tmp_path / "ran").exists()


def llama(path: Path, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 32,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, **options))
    model.save_pretrained(path)
    return model.eval()


def test_convert_checks_the_base_on_disk_and_names_the_sites_that_differ(tmp_path):
    model = llama(tmp_path / "base")
    li.inject(model, "*.q_proj", rank=2)
    fill(model)
    path = li.export(model, tmp_path / "adapter.safetensors")
    done = li.convert(path, tmp_path / "again.safetensors", "lora_inject", model=tmp_path / "base")
    assert (done.read, done.written, done.sites, done.base) == ("lora_inject", "lora_inject", 2, "checked")
    fresh = llama(tmp_path / "other", num_key_value_heads=2)
    with pytest.raises(li.MismatchError, match=r"2 of 2 sites differ(?s:.)*layers\.0\.self_attn\.q_proj"):
        with torch.no_grad():
            fresh.get_submodule("model.layers.0.self_attn.q_proj").weight.zero_()
            fresh.get_submodule("model.layers.1.self_attn.q_proj").weight.zero_()
        fresh.save_pretrained(tmp_path / "other")
        li.convert(path, tmp_path / "x.safetensors", "lora_inject", model=tmp_path / "other")
    assert not (tmp_path / "x.safetensors").exists()
    told = li.convert(path, tmp_path / "x.safetensors", "lora_inject", model=tmp_path / "other", check_base=False)
    assert told.base == "not checked"
    with pytest.raises(li.StateError, match="exists"):
        li.convert(path, tmp_path / "x.safetensors", "lora_inject")


def test_an_adapter_of_unknown_base_loads_anywhere_and_gets_its_fingerprint_from_a_base(tmp_path):
    model = llama(tmp_path / "base")
    li.inject(model, "*.q_proj", rank=2)
    fill(model)
    path = li.export(model, tmp_path / "adapter.safetensors")
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        meta = file.metadata()
    base = json.loads(meta["base"])
    known = copy.deepcopy(base)
    for site in base["sites"].values():
        site["hash"] = None
    save_file(load_file(path), tmp_path / "unknown.safetensors", meta | {"base": json.dumps(base)})
    li.load(llama(tmp_path / "b2"), tmp_path / "unknown.safetensors")
    li.convert(tmp_path / "unknown.safetensors", tmp_path / "known.safetensors", "lora_inject", model=tmp_path / "base")
    with safe_open(tmp_path / "known.safetensors", "pt") as file:
        assert json.loads(file.metadata()["base"]) == known
