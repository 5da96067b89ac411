"""Spectra and norms in `inspect_adapter` against plain linear algebra on the whole update."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from adapter_files import write_adapter
from safetensors.torch import load_file, save_file
from torch import nn

import lora_inject as li
from lora_inject.inspection import inspect_adapter
from lora_inject.report import base_norms
from lora_inject.report.spectra import spectrum_of, thinned


class Kinds(nn.Module):
    """One module of every layout that the factors of an adapter have in a file."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.table = nn.Embedding(11, 6)
        self.line = nn.Conv1d(4, 6, 3)
        self.image = nn.Conv2d(4, 6, (3, 2), groups=2)
        self.back = nn.ConvTranspose1d(3, 4, 3)
        self.pair = nn.Bilinear(4, 5, 3)
        self.rnn = nn.LSTM(4, 5)
        self.attention = nn.MultiheadAttention(8, 2)
        self.moe = nn.Module()
        self.moe.experts = nn.Parameter(torch.randn(3, 5, 4))


def as_matrices(path, delta, factorization):
    """The update as the matrices that its factors multiply to, by the table in docs/file-format.md."""
    delta = delta.double()
    if path == "image" and factorization == "balanced":
        out, channels, high, wide = delta.shape
        return delta.permute(0, 2, 1, 3).reshape(1, out * high, channels * wide)
    if path == "back":
        rows, out, kernel = delta.shape
        return delta.permute(0, 2, 1).reshape(1, rows * kernel, out)
    return delta if path == "moe.experts" else delta.reshape(1, delta.shape[0], -1)


@pytest.fixture(params=["pointwise", "balanced"])
def kinds(request, tmp_path):
    """A model with an adapter on every kind, and its file."""
    torch.manual_seed(0)
    model = Kinds()
    targets = ["linear", "table", "line", "pair", "moe.experts", "rnn", "attention"]
    targets += [li.Target("back", factorization="pointwise"), li.Target("image", factorization=request.param)]
    li.inject(model, targets, rank=3, alpha=5)
    for parameter in li.adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    return model, li.export(model, tmp_path / "kinds.safetensors"), request.param


def deltas(model):
    """The update and the weight of every site, by the site's path in a file."""
    for ref in li.adapters(model):
        ((name, delta),) = ref.adapter.delta(ref.module).items()
        yield ref.path, delta.detach(), ref.module._parameters[name].detach()


def test_spectra_are_those_of_the_whole_update(kinds):
    model, path, factorization = kinds
    found = {site.path: site for site in inspect_adapter(path, spectra=True)}
    expected = dict((site, delta) for site, delta, _ in deltas(model))
    assert found.keys() == expected.keys() and len(found) >= 11
    for site, delta in expected.items():
        spectrum = found[site].spectrum
        sigma = np.stack([np.linalg.svd(m, compute_uv=False) for m in as_matrices(site, delta, factorization).numpy()])
        count = min(3, sigma.shape[1])
        assert len(spectrum.values) == count and spectrum.matrices == len(sigma)
        # The reference was rounded to float32 when the update was formed.
        np.testing.assert_allclose(spectrum.values, np.sqrt((sigma**2).mean(0))[:count], rtol=2e-5)
        shares = sigma[:, :count] / sigma[:, :count].sum(1, keepdims=True)
        ranks = np.exp(-(shares * np.log(shares)).sum(1))
        assert spectrum.effective_rank == pytest.approx(ranks.mean(), rel=1e-5)
        assert spectrum.effective_rank_range == pytest.approx((ranks.min(), ranks.max()), rel=1e-5)
        assert spectrum.stable_rank == pytest.approx(((sigma**2).sum(1) / sigma[:, 0] ** 2).mean(), rel=1e-5)
        energy = np.cumsum((sigma**2).sum(0)) / (sigma**2).sum()
        assert spectrum.rank_90 == np.argmax(energy >= 0.9) + 1
        assert spectrum.rank_99 == np.argmax(energy >= 0.99) + 1
        assert found[site].norm_delta == pytest.approx(math.sqrt((sigma**2).sum()), rel=1e-5)


def test_equal_directions_count_in_full_and_one_direction_counts_one():
    for count in (1, 3, 8):
        found = spectrum_of(torch.eye(8, dtype=torch.float64)[:, :count] * 4, 0.5)
        assert found.values == pytest.approx([2.0] * count)
        assert (found.effective_rank, found.stable_rank) == pytest.approx((count, count))
        assert (found.rank_90, found.rank_99) == (math.ceil(0.9 * count), math.ceil(0.99 * count))
    one = spectrum_of(torch.ones(5, 4, dtype=torch.float64), 1.0)
    assert (one.effective_rank, one.stable_rank, one.rank_99) == pytest.approx((1, 1, 1), rel=1e-9)


def test_a_zero_update_has_rank_0_and_tiny_ones_have_theirs():
    zero = spectrum_of(torch.zeros(2, 5, 4, dtype=torch.float64), 2.0)
    assert (zero.values, zero.effective_rank, zero.stable_rank, zero.rank_90) == ((0.0,) * 4, 0.0, 0.0, 0)
    tiny = spectrum_of(torch.eye(3, dtype=torch.float64) * 1e-200, 1.0)
    assert (tiny.effective_rank, tiny.stable_rank) == pytest.approx((3, 3))
    assert spectrum_of(torch.eye(3, dtype=torch.float64) * 1e300, 1e300) is None


def test_a_stack_with_a_zero_matrix_counts_it(tmp_path):
    a, b = torch.randn(2, 3, 6), torch.randn(2, 4, 3)
    b[1] = 0
    path = tmp_path / "a.safetensors"
    write_adapter(path, {"mlp.experts": (a, b)}, kind="parameter", extras={"parameter": "experts"})
    spectrum = inspect_adapter(path, spectra=True).sites[0].spectrum
    sigma = np.linalg.svd((b[0].double() @ a[0].double()).numpy(), compute_uv=False)[:3]
    share = sigma / sigma.sum()
    rank = np.exp(-(share * np.log(share)).sum())
    assert spectrum.values == pytest.approx(sigma / math.sqrt(2), rel=1e-12)
    assert spectrum.effective_rank_range == pytest.approx((0, rank))
    assert spectrum.effective_rank == pytest.approx(rank / 2)


def test_dense_updates_have_spectra_too(tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 5))
    li.inject(model, "0", rank=4, alpha=2, dense=True)
    dense = model[0].adapters["default"].lora_dense
    nn.init.normal_(dense)
    li.export(model, tmp_path / "dense.safetensors")
    spectrum = inspect_adapter(tmp_path / "dense.safetensors", spectra=True).sites[0].spectrum
    expected = np.linalg.svd(dense.detach().double().numpy(), compute_uv=False) / 2
    assert spectrum.values == pytest.approx(expected, rel=1e-12)


def test_nothing_is_computed_that_nobody_asked_for(kinds):
    found = inspect_adapter(kinds[1])
    assert {(site.spectrum, site.norm_base, site.relative) for site in found} == {(None, None, None)}
    assert json.loads(json.dumps(found.to_dict()))["sites"][0]["spectrum"] is None


def save_base(model, path, prefix="", dtype=None):
    li.uninject(model)
    state = {prefix + key: (value if dtype is None else value.to(dtype)) for key, value in model.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, str(path))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("block", [2**24, 40])
def test_norms_of_the_base_are_those_of_its_tensors(kinds, tmp_path, monkeypatch, dtype, prefix, block):
    model, path, _ = kinds
    monkeypatch.setattr(base_norms, "BLOCK", block)
    expected = {site: (delta, weight.to(dtype).double()) for site, delta, weight in deltas(model)}
    base = save_base(model, tmp_path / "base.safetensors", prefix, dtype)
    found = inspect_adapter(path, base=base)
    assert found.base == str(base)
    for site in found:
        delta, weight = expected[site.path]
        assert site.norm_base == pytest.approx(float(weight.square().sum().sqrt()), rel=1e-12)
        assert site.relative == pytest.approx(float(delta.double().norm() / weight.norm()), rel=1e-5)


def test_another_base_is_refused_unless_told(kinds, tmp_path):
    model, path, _ = kinds
    nn.init.normal_(model.linear._parameters["weight"])
    base = save_base(model, tmp_path / "base.safetensors")
    with pytest.raises(li.MismatchError, match=r"1 of \d+ sites differ:\n  linear\n"):
        inspect_adapter(path, base=base)
    norm = load_file(str(base))["linear.weight"].double().norm()
    found = {site.path: site for site in inspect_adapter(path, base=base, check_base=False)}
    assert found["linear"].norm_base == pytest.approx(float(norm), rel=1e-12)


def test_weights_that_the_base_lacks_are_left_out_and_a_foreign_base_is_refused(kinds, tmp_path):
    model, path, _ = kinds
    state = load_file(str(save_base(model, tmp_path / "base.safetensors")))
    state["table.weight"] = state["table.weight"].to(torch.int8)
    del state["linear.weight"]
    save_file(state, str(tmp_path / "less.safetensors"))
    found = {site.path: site.norm_base for site in inspect_adapter(path, base=tmp_path / "less.safetensors")}
    assert [site for site, norm in found.items() if norm is None] == ["linear", "table"]
    save_file({"other": torch.zeros(3)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(li.MismatchError, match="weight of none of the"):
        inspect_adapter(path, base=tmp_path / "other.safetensors")
    with pytest.raises(li.FormatError, match="cannot be read"):
        inspect_adapter(path, base=tmp_path / "nowhere.safetensors")


def test_a_weight_of_zeros_has_no_relative_size(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    li.inject(model, "0", rank=1)
    path = li.export(model, tmp_path / "a.safetensors")
    (site,) = inspect_adapter(path, base=save_base(model, tmp_path / "base.safetensors"))
    assert (site.norm_base, site.relative) == (0.0, None)


def test_thinned_keeps_the_ends():
    assert thinned([5.0, 4.0, 3.0], 4) == [(1, 5.0), (2, 4.0), (3, 3.0)]
    found = thinned(range(1000), 7)
    assert len(found) == 7 and found[0] == (1, 0) and found[-1] == (1000, 999)


def test_parameters_that_are_trained_as_a_whole_have_spectra_and_relative_sizes(tmp_path):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.LayerNorm(5))
    li.inject(model, [li.Target(path, adapter="full") for path in ("0.weight", "1.weight")], rank=1)
    for parameter in li.adapter_parameters(model).values():
        nn.init.normal_(parameter)
    path = li.export(model, tmp_path / "full.safetensors")
    expected = {site: (delta.double(), weight.double()) for site, delta, weight in deltas(model)}
    found = inspect_adapter(path, spectra=True, base=save_base(model, tmp_path / "base.safetensors"))
    assert [site.path for site in found] == ["0.weight", "1.weight"]
    for site in found:
        delta, weight = expected[site.path]
        sigma = np.linalg.svd(delta.reshape(len(delta), -1).numpy(), compute_uv=False)
        assert site.spectrum.values == pytest.approx(sigma, rel=1e-6)
        assert site.relative == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-6)


def test_a_fingerprint_that_nobody_knows_is_not_compared(tmp_path):
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    weight = torch.randn(5, 6)
    save_file({"proj.weight": weight}, str(tmp_path / "base.safetensors"))
    path = write_adapter(tmp_path / "a.safetensors", {"proj": (a, b)}, fingerprint=None)
    (site,) = inspect_adapter(path, base=tmp_path / "base.safetensors")
    assert site.norm_base == pytest.approx(float(weight.double().norm()), rel=1e-12)
    path = write_adapter(tmp_path / "b.safetensors", {"proj": (a, b)}, fingerprint="0" * 16)
    with pytest.raises(li.MismatchError, match="1 of 1 sites differ"):
        inspect_adapter(path, base=tmp_path / "base.safetensors")


@pytest.mark.parametrize("shape", [(2, 0, 6), (2, 4, 0)])
def test_factors_without_numbers_are_a_zero_update(tmp_path, shape):
    rank, rows, columns = shape
    path = write_adapter(tmp_path / "a.safetensors", {"p": (torch.zeros(rank, columns), torch.zeros(rows, rank))})
    (site,) = inspect_adapter(path, spectra=True)
    assert (site.norm_delta, site.spectrum.effective_rank) == (0.0, 0.0)
