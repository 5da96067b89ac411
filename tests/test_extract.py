"""Adapters from full fine-tunes: from two checkpoints on disk, against dense decompositions in float64."""

import copy
import json
import math

import pytest
import torch
import transformers
from files_by_hand import read_file, strength_of
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import lora_inject as li
from lora_inject.algebra import sketch, weights
from lora_inject.cli import main

WIDE = (torch.float32, torch.float64)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def llama(**options):
    config = transformers.LlamaConfig(vocab_size=61, num_key_value_heads=1, **(SMALL | options))
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@torch.no_grad()
def tuned_copy(model, std=0.05, rank=None, skip=()):
    """Returns a copy with every parameter moved, matrices by updates of the given rank."""
    made = copy.deepcopy(model)
    for name, parameter in made.named_parameters():
        if any(part in name for part in skip):
            continue
        if rank is None or parameter.dim() < 2:
            parameter += torch.randn_like(parameter) * std
        else:
            rows = parameter.shape[0]
            parameter += (torch.randn(rows, rank) @ torch.randn(rank, parameter[0].numel())).reshape(
                parameter.shape
            ) * std
    return made


def delta_of(site):
    """Returns B A of a factored site as a matrix, float64."""
    a, b = (site["tensors"][name].double() for name in ("lora_A", "lora_B"))
    if "parameter" in site["options"]:
        return strength_of(site) * (b @ a)
    return strength_of(site) * b.movedim(1, -1).reshape(-1, b.shape[1]) @ a.reshape(a.shape[0], -1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_rank_gives_the_tuned_model(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    tuned = tuned_copy(model, skip=["norm"])
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a.safetensors", rank=64)
    assert {site.path for site in report} >= {"lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj"}
    assert report.error < 1e-6 * report.norm and not report.left and report.unchanged == 5
    li.load(model, tmp_path / "a.safetensors")
    tokens = torch.randint(0, 61, (2, 7))
    assert torch.allclose(model(tokens).logits, tuned(tokens).logits, atol=1e-5)


def test_a_fine_tune_may_have_untied_the_head(tmp_path):
    model = llama(tie_word_embeddings=True)
    tuned = llama(tie_word_embeddings=False)
    tuned.load_state_dict(model.state_dict())
    tuned.lm_head.weight += torch.randn(61, 16)
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a.safetensors", rank=64)
    assert [row.path for row in report] == ["lm_head"]
    li.load(model, tmp_path / "a.safetensors")
    tokens = torch.randint(0, 61, (2, 7))
    assert torch.allclose(model(tokens).logits, tuned(tokens).logits, atol=1e-5)


def test_ranks_errors_and_what_is_left_are_true(tmp_path):
    model = llama()
    tuned = tuned_copy(model)
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").is_file()
    report = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a.safetensors", rank=3)
    sites = read_file(tmp_path / "a.safetensors")
    assert [row.path for row in report] == list(sites)
    for row in report:
        weight = f"{row.path}.weight"
        change = tuned.get_parameter(weight).double() - model.get_parameter(weight).double()
        values = torch.linalg.svdvals(change)
        assert row.rank == sites[row.path]["rank"] == 3 and row.exact
        assert math.isclose(row.norm, float(change.norm()), rel_tol=1e-9)
        assert math.isclose(row.error, float((change - delta_of(sites[row.path])).norm()), rel_tol=1e-7)
        assert math.isclose(row.error, float(values[3:].norm()), rel_tol=1e-5)
    norms = {one.path: one for one in report.left}
    assert set(norms) == {name for name, p in model.named_parameters() if p.dim() == 1}
    final = tuned.model.norm.weight.double() - model.model.norm.weight.double()
    assert math.isclose(norms["model.norm.weight"].norm, float(final.norm()), rel_tol=1e-9)
    assert "model.norm.weight" in str(report) and json.dumps(report.to_dict())


def test_an_energy_gives_each_site_its_own_rank(tmp_path):
    model = llama()
    tuned = tuned_copy(model)
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a.safetensors", energy=0.8)
    for row in report:
        weight = f"{row.path}.weight"
        values = torch.linalg.svdvals(tuned.get_parameter(weight).double() - model.get_parameter(weight).double())
        shares = values.square().cumsum(0) / values.square().sum()
        assert row.rank == int((shares < 0.8).sum()) + 1
    assert len({row.rank for row in report}) > 1


def test_what_did_not_change_is_skipped_and_patterns_choose(tmp_path):
    model = llama()
    tuned = tuned_copy(model, skip=["v_proj"])
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    ends = (tmp_path / "base", tmp_path / "tuned", tmp_path / "a.safetensors")
    more = {"targets": ["*.self_attn.*", "*.up_proj"], "exclude": "*.layers.1.self_attn.q_proj", "overwrite": True}
    report = li.extract(*ends, rank=2, **more)
    layers = [f"model.layers.{i}" for i in range(2)]
    assert {row.path for row in report} == {
        *(f"{layer}.self_attn.{name}_proj" for layer in layers for name in "qko"),
        *(f"{layer}.mlp.up_proj" for layer in layers),
    } - {"model.layers.1.self_attn.q_proj"}
    assert report.unchanged == 2 and not report.left
    for option in ("targets", "exclude", "whole"):
        with pytest.raises(li.TargetError, match=r"q_prj.*q_proj"):
            li.extract(*ends, rank=2, overwrite=True, **{option: "*.q_prj"})


class Zoo(nn.Module):
    """A module of every class whose weight is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(9, 6, padding_idx=2)
        self.fc = nn.Linear(6, 8)
        self.c_attn = Conv1D(5, 8)
        self.conv = nn.Conv2d(3, 4, (2, 3), groups=1)
        self.up_conv = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.lstm = nn.LSTM(4, 3)
        self.norm = nn.LayerNorm(5)


def test_kinds_follow_from_names_and_shapes_without_a_config(tmp_path):
    model = Zoo()
    tuned = tuned_copy(model)
    tuned.embed_tokens.weight.data[2] = model.embed_tokens.weight[2]
    for name, one in (("base", model), ("tuned", tuned)):
        save_file(one.state_dict(), tmp_path / f"{name}.safetensors")
    ends = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "a.safetensors")
    report = li.extract(*ends, rank=64)
    assert "no config" in report.note
    assert {row.path: row.adapter for row in report} == {
        "embed_tokens": "embedding",
        "fc": "linear",
        "c_attn.weight": "parameter",
        "conv": "conv",
        "up_conv": "conv_transpose",
        "experts": "parameter",
        "lstm.weight_ih_l0": "parameter",
        "lstm.weight_hh_l0": "parameter",
    }
    assert not load_file(ends[2])["embed_tokens.lora_B"][2].any()
    li.load(model, ends[2])
    li.merge(model)
    for name, parameter in model.named_parameters():
        if "adapters" not in name and parameter.dim() > 1:
            assert torch.allclose(parameter, tuned.get_parameter(name), atol=1e-5), name


def test_the_kinds_of_a_model_with_a_config_are_its_own(tmp_path):
    sizes = {"vocab_size": 31, "n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    tuned = tuned_copy(model, skip=["ln_", "bias"])
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a.safetensors", rank=64)
    kinds = {row.path: row.adapter for row in report}
    assert kinds["transformer.h.0.attn.c_attn"] == "transposed_linear"
    assert kinds["transformer.wpe"] == kinds["transformer.wte"] == "embedding" and kinds["lm_head"] == "linear"
    li.load(model, tmp_path / "a.safetensors")
    tokens = torch.randint(0, 31, (2, 7))
    assert torch.allclose(model(tokens).logits, tuned(tokens).logits, atol=1e-4)


def test_packed_experts_share_a_rank(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=40, num_key_value_heads=1, num_local_experts=3, **(SMALL | {"num_hidden_layers": 1})
    )
    model = transformers.MixtralForCausalLM(config).eval().requires_grad_(False)
    tuned = tuned_copy(model, skip=["norm"])
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a.safetensors", energy=0.9)
    rows = {row.path: row for row in report}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    change = tuned.get_parameter(name).double() - model.get_parameter(name).double()
    values = torch.linalg.svdvals(change)
    shares = values.square().sum(0).cumsum(0) / values.square().sum()
    assert rows[name].rank == int((shares < 0.9).sum()) + 1
    site = read_file(tmp_path / "a.safetensors")[name]
    assert math.isclose(rows[name].error, float((change - delta_of(site)).norm()), rel_tol=1e-7)
    li.load(model, tmp_path / "a.safetensors")


def test_norms_and_biases_are_stored_whole_on_request(tmp_path):
    sizes = {"vocab_size": 31, "n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval().requires_grad_(False)
    tuned = tuned_copy(model)
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    patterns = ["*.bias", "*.ln_*", "transformer.wpe"]
    report = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=64, whole=patterns)
    rows = {row.path: row for row in report}
    assert (
        not report.left
        and rows["transformer.h.0.ln_1.weight"].adapter == rows["transformer.wpe.weight"].adapter == "full"
    )
    stored = load_file(tmp_path / "a")["transformer.wpe.weight.lora_dense"].double()
    change = tuned.transformer.wpe.weight.double() - model.transformer.wpe.weight.double()
    assert math.isclose(rows["transformer.wpe.weight"].error, float((stored - change).norm()), abs_tol=1e-12)
    li.load(model, tmp_path / "a")
    tokens = torch.randint(0, 31, (2, 7))
    assert torch.allclose(model(tokens).logits, tuned(tokens).logits, atol=1e-4)
    with pytest.raises(li.UnsupportedError, match="single number"):
        save_file({"a.scale": torch.tensor(1.0)}, tmp_path / "one")
        save_file({"a.scale": torch.tensor(2.0)}, tmp_path / "two")
        li.extract(tmp_path / "one", tmp_path / "two", tmp_path / "b", rank=1, whole="a.scale")


@pytest.fixture
def randomized(monkeypatch):
    """Uses the randomized method for small matrices too, read in several blocks."""
    monkeypatch.setattr(sketch, "SMALL", 8)
    monkeypatch.setattr(weights, "BLOCK", 900)


def decaying(rows, columns, rate, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, min(rows, columns), generator=generator).double()).Q for n in (rows, columns)
    )
    return (u * rate ** torch.arange(min(rows, columns))) @ v.mT


@pytest.mark.parametrize("shape", [(120, 90), (90, 120), (3, 70, 60)])
def test_the_randomized_method_is_as_good_as_the_exact_one(tmp_path, randomized, shape):
    stack = [decaying(*shape[-2:], 0.8, i) for i in range(shape[0] if len(shape) == 3 else 1)]
    change = torch.stack(stack).reshape(shape).float().double()
    base = torch.zeros(shape)
    save_file({"m.w": base}, tmp_path / "base")
    save_file({"m.w": change.float()}, tmp_path / "tuned")
    (row,) = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=6)
    values = torch.linalg.svdvals(change)
    assert not row.exact
    assert float(values[..., 6:].norm()) <= row.error <= float(values[..., 6:].norm()) * (1 + 1e-6)
    site = read_file(tmp_path / "a")["m.w"]
    assert math.isclose(row.error, float((change - delta_of(site)).norm()), rel_tol=1e-9)
    (row,) = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", energy=0.99, overwrite=True)
    shares = values.square().reshape(-1, values.shape[-1]).sum(0).cumsum(0) / values.square().sum()
    assert row.rank == int((shares < 0.99).sum()) + 1
    assert row.relative**2 <= 0.01 * (1 + 1e-6)


def test_an_energy_that_needs_nearly_all_directions_is_found_exactly(tmp_path, randomized):
    change = torch.randn(90, 80)
    save_file({"m.weight": torch.zeros(90, 80)}, tmp_path / "base")
    save_file({"m.weight": change}, tmp_path / "tuned")
    (row,) = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", energy=0.95)
    values = torch.linalg.svdvals(change.double())
    shares = values.square().cumsum(0) / values.square().sum()
    assert row.exact and row.rank == int((shares < 0.95).sum()) + 1


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor of a wide dtype holds that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.dtype in WIDE:
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_a_large_weight_is_read_in_blocks(tmp_path):
    rows, columns = 8000, 800
    torch.manual_seed(1)
    change = torch.randn(rows, 4) @ torch.randn(4, columns) * 0.01
    base = torch.randn(rows, columns).bfloat16()
    tuned = (base.float() + change).bfloat16()
    save_file({"m.weight": base}, tmp_path / "base")
    save_file({"m.weight": tuned}, tmp_path / "tuned")
    true = tuned.double() - base.double()
    with Largest() as largest:
        (row,) = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=4)
    assert not row.exact and read_file(tmp_path / "a")["m"]["dtype"] == "float32"
    assert math.isclose(row.error, float((true - delta_of(read_file(tmp_path / "a")["m"])).norm()), rel_tol=1e-7)
    assert row.error < 1.001 * float(torch.linalg.matrix_norm(true - (true @ (q := basis(true, 4))) @ q.mT))
    assert 0 < largest.numbers < 0.5 * true.numel(), (
        largest.numbers,
        "the whole matrix was never held in a wide dtype",
    )


def basis(matrix, rank):
    """Returns the leading right singular vectors, by the eigenvectors of the Gram matrix."""
    return torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, -rank:]


def test_buffers_and_whole_numbers_that_changed_are_listed(tmp_path):
    tensors = {"m.weight": torch.randn(4, 3), "m.steps": torch.tensor([1, 2]), "m.same": torch.tensor([7])}
    save_file(tensors, tmp_path / "base")
    changed = {"m.weight": tensors["m.weight"] + 1, "m.steps": torch.tensor([1, 3])}
    save_file(tensors | changed, tmp_path / "tuned")
    report = li.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=1)
    assert [(one.path, one.norm) for one in report.left] == [("m.steps", None)]
    assert "int64" in report.left[0].why and report.unchanged == 1


# Refusals


def checkpoints(tmp_path, base, tuned):
    save_file(base, tmp_path / "base")
    save_file(tuned, tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned", tmp_path / "out"


def test_tensors_without_a_counterpart_are_listed(tmp_path):
    base = {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(3, 2), "c.weight": torch.ones(2, 2)}
    tuned = {"a.weight": torch.zeros(3, 2), "b.weight": torch.ones(4, 2), "d.weight": torch.ones(2, 2)}
    ends = checkpoints(tmp_path, base, tuned)
    with pytest.raises(li.MismatchError) as caught:
        li.extract(*ends, rank=1)
    assert all(
        word in str(caught.value) for word in ("3 tensors", "b.weight: (3, 2) became (4, 2)", "c.weight", "d.weight")
    )
    assert not ends[2].exists()
    assert [row.path for row in li.extract(*ends, rank=1, exclude=["b", "c.*", "d"])] == ["a"]


def test_shapes_other_than_those_of_the_config_are_told(tmp_path):
    model = llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    for name, add in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
        changed = {key: value + add for key, value in tensors.items()}
        save_file(changed, tmp_path / name / "model.safetensors")
    ends = (tmp_path / "base", tmp_path / "tuned", tmp_path / "a")
    with pytest.raises(li.MismatchError, match=r"model\.norm\.weight: \(5,\) in .*\(16,\) in the model"):
        li.extract(*ends, rank=1)
    found = li.extract(*ends, rank=1, exclude="model.norm")
    assert "model.norm.weight" not in {one.path for one in found.left}


def test_changes_below_the_range_of_squares_are_kept(tmp_path):
    tiny = torch.full((3, 2), 1e-200, dtype=torch.float64)
    ends = checkpoints(tmp_path, {"a.weight": tiny * 0}, {"a.weight": tiny})
    found = li.extract(*ends, rank=1)
    assert found.relative == found.sites[0].relative == 0 and str(found)
    assert torch.allclose(delta_of(read_file(ends[2])["a"]) * 1e200, tiny * 1e200)


def test_equal_checkpoints_give_nothing(tmp_path):
    one = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3)}
    ends = checkpoints(tmp_path, one, one)
    with pytest.raises(li.StateError, match="no matrix differs"):
        li.extract(*ends, rank=1)
    save_file(one | {"a.bias": torch.zeros(3)}, tmp_path / "tuned")
    with pytest.raises(li.StateError, match=r"a\.bias.*--whole"):
        li.extract(*ends, rank=1)
    assert not ends[2].exists()


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    bad = torch.ones(3, 2)
    bad[1, 1] = math.nan
    ends = checkpoints(tmp_path, {"a.weight": torch.ones(3, 2)}, {"a.weight": bad})
    with pytest.raises(li.FormatError, match=r"a\.weight: NaN"):
        li.extract(*ends, rank=1)


def test_an_overflow_of_the_stored_dtype_is_refused(tmp_path):
    ends = checkpoints(tmp_path, {"a.weight": torch.zeros(3, 2)}, {"a.weight": torch.full((3, 2), 1e30)})
    with pytest.raises(li.StateError, match=r"overflow in torch\.float16"):
        li.extract(*ends, rank=1, dtype="float16")
    assert not ends[2].exists()


def test_inputs_are_not_overwritten(tmp_path):
    base, tuned, _ = checkpoints(tmp_path, {"a.weight": torch.zeros(3, 2)}, {"a.weight": torch.ones(3, 2)})
    old = tuned.read_bytes()
    with pytest.raises(li.StateError, match="one of the inputs"):
        li.extract(base, tuned, tuned, rank=1)
    assert tuned.read_bytes() == old
    for options in ({}, {"rank": 1, "energy": 0.5}, {"rank": 1, "name": "no good"}, {"rank": 1, "dtype": "int8"}):
        with pytest.raises(li.ConfigError):
            li.extract(base, tuned, tmp_path / "out", **options)


def test_the_command(tmp_path, capsys):
    base, tuned, out = checkpoints(
        tmp_path,
        {"a.weight": torch.zeros(9, 7), "b.weight": torch.zeros(3, 2)},
        {"a.weight": torch.randn(9, 7), "b.weight": torch.ones(3, 2)},
    )
    ends = [str(base), str(tuned), "-o", str(out)]
    assert main(["extract", *ends, "--rank", "2", "-t", "a", "--dtype", "float64", "--name", "mine", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(site["path"], site["rank"]) for site in told["sites"]] == [("a", 2)] and told["name"] == "mine"
    assert load_file(out)["a.lora_A"].dtype == torch.float64
    assert main(["extract", *ends, "--rank", "2"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["extract", *ends, "--energy", "0.5", "--exclude", "a", "--overwrite"]) == 0
    assert "1 sites" in capsys.readouterr().out
    assert main(["extract", *ends, "--overwrite"]) == 2
    assert "--rank, --energy" in capsys.readouterr().err
