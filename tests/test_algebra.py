"""Sums, differences and cuts of adapter files, against float64 by hand, for every kind of module."""

import json
import math
import re
import shlex
import time
from pathlib import Path

import pytest
import torch
from contract import of_every_stored_kind, outputs, quiet, train
from files_by_hand import linear_site, read_file, strength_of, update_in, write_file
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import low_rank_path, update_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from variants import VARIANTS

import lora_inject as li
from lora_inject.cli import main

pytestmark = quiet
W1, W2 = 0.7, -1.3


def exported(variant, path, dtype=torch.float64, seed=3, **options):
    """Exports an adapter of the variant's module, its numbers drawn by the seed."""
    model = variant.model(dtype)
    variant.inject(model, **options)
    train(model, seed)
    return li.export(model, path)


def pair(variant, tmp_path, dtype=torch.float64):
    """Returns two files of other ranks and scalings."""
    second = {"rank": 2, "alpha": 3.0, "rslora": not variant.options.get("rslora", False)}
    one = exported(variant, tmp_path / "one.safetensors", dtype)
    return one, exported(variant, tmp_path / "two.safetensors", dtype, seed=5, **second)


def updates(variant, path):
    """Returns the updates of the one site of a file, in float64 and by hand."""
    ((_, site),) = read_file(path).items()
    tensors = {name: tensor.double() for name, tensor in site["tensors"].items()}
    host = variant.model(torch.float64).get_submodule(variant.at)
    return update_of(variant.kind, host, tensors, strength_of(site))


def paths_of(variant, path, x):
    ((_, site),) = read_file(path).items()
    return low_rank_path(x, {name: t.double() for name, t in site["tensors"].items()}, strength_of(site))


def weighted(one, two, w1=W1, w2=W2):
    return {key: w1 * one.get(key, 0.0) + w2 * two.get(key, 0.0) for key in one | two}


def assert_close(found, wanted, tolerance=1e-12):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert (found[key] - value).abs().max() <= tolerance * (1 + value.abs().max()), key


def dense_of(variant, path):
    """Returns the update that biases and padding rows leave aside: scaling * B A in the shape of the weight."""
    ((_, site),) = read_file(path).items()
    p = {name: t.double() for name, t in site["tensors"].items() if not name.endswith("_bias")}
    if variant.kind in ("block", "embedding", "embedding_bag"):
        return strength_of(site) * (p["lora_dense"] if "lora_dense" in p else p["lora_B"] @ p["lora_A"])
    host = variant.model(torch.float64).get_submodule(variant.at)
    return update_of(variant.kind, host, p, strength_of(site))["weight"]


def as_matrix(variant, weight):
    """Returns the weight as the matrix that B A is, by hand."""
    if variant.kind == "conv_transpose":
        return weight.movedim(1, -1).flatten(0, -2)
    if variant.kind == "conv" and variant.options.get("factorization") == "balanced":
        ahead = (weight.dim() - 2) // 2
        return weight.movedim(1, 1 + ahead).flatten(0, ahead).flatten(1)
    if variant.kind == "full":
        return weight.reshape(len(weight), -1)
    return weight if variant.parameter else weight.flatten(1)


# Sums


@of_every_stored_kind
def test_a_sum_is_the_weighted_sum_of_the_updates(variant, tmp_path):
    one, two = pair(variant, tmp_path)
    out = tmp_path / "sum.safetensors"
    report = li.add([one, two], out, weights=[W1, W2])
    x = variant.x(torch.float64)
    if variant.kind == "block":
        wanted = W1 * paths_of(variant, one, x[0]) + W2 * paths_of(variant, two, x[0])
        assert torch.allclose(paths_of(variant, out, x[0]), wanted, atol=1e-12)
    else:
        assert_close(updates(variant, out), weighted(updates(variant, one), updates(variant, two)))
    assert report.relative < 1e-15
    model = variant.model(torch.float64)
    li.load(model, out)
    model.eval()
    both = variant.model(torch.float64)
    li.load(both, one, "one")
    li.load(both, two, "two")
    both.eval()
    for ref in li.adapters(both):
        ref.adapter.scaling *= W1 if ref.name == "one" else W2
    for found, wanted in zip(outputs(model, x), outputs(both, x), strict=True):
        assert torch.allclose(found, wanted, atol=1e-10)


@of_every_stored_kind
def test_a_sum_of_every_stored_kind_is_rounded_once(variant, tmp_path):
    if variant.kind == "block":
        pytest.skip("has no weight; its tensors are those of a linear layer")
    one, two = pair(variant, tmp_path, torch.float32)
    out = tmp_path / "sum.safetensors"
    li.add([one, two], out, weights=[W1, W2])
    host = variant.model(torch.float64).get_submodule(variant.at)
    ((_, site),) = read_file(out).items()
    sizes = update_of(variant.kind, host, {n: t.double().abs() for n, t in site["tensors"].items()}, strength_of(site))
    exact = weighted(updates(variant, one), updates(variant, two))
    for key, value in updates(variant, out).items():
        allowed = torch.finfo(torch.float32).eps / 2 * (1.001 if key != "bias" else 3) * sizes[key].abs() + 1e-30
        if "lora_B_bias" in site["tensors"]:
            allowed = allowed * 3  # both factors of a bias are rounded
        assert bool(((value - exact[key]).abs() <= allowed).all()), key


@of_every_stored_kind
def test_one_file_with_weight_one_stays_as_it_is(variant, tmp_path):
    one = exported(variant, tmp_path / "one.safetensors", torch.float32)
    li.add(one, tmp_path / "same.safetensors")
    before, after = load_file(one), load_file(tmp_path / "same.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    ((_, first),), ((_, second),) = read_file(one).items(), read_file(tmp_path / "same.safetensors").items()
    assert {k: v for k, v in first.items() if k not in ("tensors", "dense")} == {
        k: v for k, v in second.items() if k not in ("tensors", "dense")
    }


@of_every_stored_kind
def test_subtracting_what_was_added_gives_back_the_update(variant, tmp_path):
    one, two = pair(variant, tmp_path)
    both, back, small = (tmp_path / f"{name}.safetensors" for name in ("both", "back", "small"))
    li.add([one, two], both)
    li.subtract(both, two, back)
    li.resize(back, small, energy=1.0)
    if variant.kind == "block":
        x = variant.x(torch.float64)[0]
        found, wanted = paths_of(variant, small, x), paths_of(variant, one, x)
        assert torch.allclose(found, wanted, atol=1e-10)
    else:
        assert_close(updates(variant, small), updates(variant, one), 1e-11)
    ((_, first),), ((_, last),) = read_file(one).items(), read_file(small).items()
    assert last["rank"] <= first["rank"]


@of_every_stored_kind
def test_merging_the_sum_is_merging_both(variant, tmp_path):
    if variant.kind == "block":
        pytest.skip("cannot be merged")
    one, two = pair(variant, tmp_path, torch.float32)
    li.add([one, two], tmp_path / "sum.safetensors")
    model, both = variant.model(torch.float32), variant.model(torch.float32)
    li.load(model, tmp_path / "sum.safetensors")
    li.load(both, one, "one")
    li.load(both, two, "two")
    for merged in (model, both):
        li.merge(merged)
        li.uninject(merged, keep_merged=True)
    for found, wanted in zip(model.parameters(), both.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_sites_that_only_one_file_has_are_kept(tmp_path):
    one = write_file(tmp_path / "one", {"a": linear_site(5, 4, 2), "b": linear_site(3, 4, 1, 1)})
    two = write_file(tmp_path / "two", {"c": linear_site(6, 7, 3, 2, alpha=1.5), "a": linear_site(5, 4, 1, 3)})
    li.add([f"{one}:2", f"{two}:-0.5"], tmp_path / "out")
    first, second, found = read_file(one), read_file(two), read_file(tmp_path / "out")
    assert list(found) == ["a", "b", "c"]
    assert_close(update_in(found["a"]), weighted(update_in(first["a"]), update_in(second["a"]), 2, -0.5), 1e-6)
    assert_close(update_in(found["b"]), {"weight": 2 * update_in(first["b"])["weight"]}, 1e-6)
    assert_close(update_in(found["c"]), {"weight": -0.5 * update_in(second["c"])["weight"]}, 1e-6)


def test_a_weight_of_zero_leaves_the_other_update(tmp_path):
    one, two = (write_file(tmp_path / str(i), {"a": linear_site(5, 4, 2, i)}) for i in (1, 2))
    li.add([one, two], tmp_path / "out", weights=[0, 1.5])
    li.add([one], tmp_path / "none", weights=[0])
    assert_close(
        update_in(read_file(tmp_path / "out")["a"]), {"weight": 1.5 * update_in(read_file(two)["a"])["weight"]}, 1e-6
    )
    assert not update_in(read_file(tmp_path / "none")["a"])["weight"].any()


def test_the_dtype_is_the_widest_of_a_site_or_the_one_that_is_asked_for(tmp_path):
    half, brain = (
        write_file(tmp_path / str(d), {"a": linear_site(5, 4, 2, dtype=d)}) for d in (torch.float16, torch.bfloat16)
    )
    li.add([half, brain], tmp_path / "out")
    assert read_file(tmp_path / "out")["a"]["dtype"] == "float32"
    li.add([brain, brain], tmp_path / "same")
    assert {t.dtype for t in load_file(tmp_path / "same").values()} == {torch.bfloat16}
    li.add([half, half], tmp_path / "wide", dtype="float64")
    assert {t.dtype for t in load_file(tmp_path / "wide").values()} == {torch.float64}
    li.resize(half, tmp_path / "small", rank=1, dtype=torch.bfloat16)
    assert read_file(tmp_path / "small")["a"]["dtype"] == "bfloat16"


def with_bias(site, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, rank = site["tensors"]["lora_B"].shape
    biases = {
        "lora_A_bias": torch.randn(rank, generator=generator),
        "lora_B_bias": torch.randn(rows, generator=generator),
    }
    return site | {"bias": True, "tensors": site["tensors"] | biases}


@pytest.mark.parametrize("first", [True, False])
def test_biases_may_be_in_one_file_alone(tmp_path, first):
    sites = [linear_site(5, 4, 2, 1), linear_site(5, 4, 3, 2, alpha=2.0)]
    sites[first] = with_bias(sites[first], 3)
    one, two = (write_file(tmp_path / str(i), {"a": site}) for i, site in enumerate(sites))
    li.add([one, two], tmp_path / "out", weights=[W1, W2])
    li.add([one, two], tmp_path / "small", weights=[W1, W2], rank=2)
    wanted = weighted(*(update_in(read_file(path)["a"]) for path in (one, two)))
    assert_close(update_in(read_file(tmp_path / "out")["a"]), wanted, 1e-6)
    small = read_file(tmp_path / "small")["a"]
    assert not small["tensors"]["lora_A_bias"].any()
    assert (update_in(small)["bias"] - wanted["bias"]).abs().max() < 1e-6


def test_aliases_of_one_module_are_one_site(tmp_path):
    one = write_file(tmp_path / "one", {"a": linear_site(5, 4, 2, 1, aliases=["tied"])})
    two = write_file(tmp_path / "two", {"tied": linear_site(5, 4, 2, 2, aliases=["a"])})
    li.add([one, two], tmp_path / "out")
    assert list(read_file(tmp_path / "out")) == ["a"]
    wanted = weighted(update_in(read_file(one)["a"]), update_in(read_file(two)["tied"]), 1, 1)
    assert_close(update_in(read_file(tmp_path / "out")["a"]), wanted, 1e-6)


# Cuts


@of_every_stored_kind
@pytest.mark.parametrize("rank", [1, 2])
def test_a_cut_is_the_best_of_its_rank_and_its_error_is_true(variant, rank, tmp_path):
    source = exported(variant, tmp_path / "one.safetensors")
    out = tmp_path / "small.safetensors"
    (row,) = li.resize(source, out, rank=rank)
    if variant.kind == "block":
        origin = torch.zeros(1, 8, dtype=torch.float64)
        assert torch.allclose(paths_of(variant, source, origin), paths_of(variant, out, origin))
    elif "bias" in updates(variant, source):
        assert torch.allclose(updates(variant, out)["bias"], updates(variant, source)["bias"], atol=1e-12)
    elif variant.options.get("bias"):  # an embedding, whose biases are in its rows
        shifts = [updates(variant, path)["weight"] - dense_of(variant, path) for path in (source, out)]
        kept = torch.arange(9) != (variant.model(torch.float64).get_submodule(variant.at).padding_idx or -1)
        assert torch.allclose(shifts[0][kept], shifts[1][kept], atol=1e-12)
    before, after = dense_of(variant, source), dense_of(variant, out)
    assert math.isclose(row.norm, float(before.norm()), rel_tol=1e-9)
    assert math.isclose(row.error, float((before - after).norm()), rel_tol=1e-7, abs_tol=1e-12)
    best = float(torch.linalg.svdvals(as_matrix(variant, before))[..., rank:].norm())
    assert row.error <= best * (1 + 1e-9) + 1e-12


@of_every_stored_kind
def test_a_cut_to_the_full_rank_changes_nothing(variant, tmp_path):
    source = exported(variant, tmp_path / "one.safetensors", torch.float32)
    report = li.resize(source, tmp_path / "same.safetensors", rank=1000)
    assert report.relative < 1e-6
    if variant.kind != "block":
        assert_close(updates(variant, tmp_path / "same.safetensors"), updates(variant, source), 1e-6)
    if variant.options.get("rank", 3) <= min(as_matrix(variant, dense_of(variant, source)).shape[-2:]):
        before, after = load_file(source), load_file(tmp_path / "same.safetensors")
        assert all(torch.equal(before[key], after[key]) for key in before)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    ranks=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    weights=st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3),
    energy=st.floats(0.05, 1.0),
)
def test_sums_and_cuts_of_any_shape(tmp_path_factory, rows, columns, ranks, weights, energy):
    folder = tmp_path_factory.mktemp("any")
    sites = [linear_site(rows, columns, rank, i, torch.float64, alpha=i + 1.0) for i, rank in enumerate(ranks)]
    files = [write_file(folder / str(i), {"a": site}) for i, site in enumerate(sites)]
    weights = weights[: len(files)]
    exact = sum(w * update_in(site)["weight"] for w, site in zip(weights, sites, strict=True))
    li.add(files, folder / "sum", weights=weights)
    assert (update_in(read_file(folder / "sum")["a"])["weight"] - exact).abs().max() < 1e-11
    (row,) = li.add(files, folder / "cut", weights=weights, energy=energy)
    values = torch.linalg.svdvals(exact)
    shares = values.square().cumsum(0) / values.square().sum() if exact.any() else torch.ones(1)
    kept = update_in(read_file(folder / "cut")["a"])["weight"]
    assert abs(float((exact - kept).norm()) - row.error) < 1e-10
    if exact.any() and row.rank < sum(ranks):
        assert shares[row.rank - 1] >= energy - 1e-9
        assert row.rank == 1 or shares[row.rank - 2] < energy + 1e-9
        assert row.error <= float(values[row.rank :].norm()) + 1e-10


def test_the_matrices_of_a_stack_share_rank_and_energy(tmp_path):
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    a[1] *= 100  # the energy is nearly all in the second matrix
    site = {"adapter": "parameter", "shape": [3, 5, 6], "rank": 4, "dtype": torch.float64}
    site |= {"options": {"parameter": "up"}, "tensors": {"lora_A": a, "lora_B": b}}
    source = write_file(tmp_path / "stack", {"m.up": site})
    (row,) = li.resize(source, tmp_path / "out", energy=0.9)
    values = torch.linalg.svdvals(b @ a)
    shares = values.square().sum(0).cumsum(0) / values.square().sum()
    assert row.rank == int((shares < 0.9).sum()) + 1
    assert math.isclose(row.error, float(values[:, row.rank :].norm()), rel_tol=1e-9)
    assert load_file(tmp_path / "out")["m.up.lora_A"].shape == (3, row.rank, 6)


def test_zero_rows_and_columns_stay_exactly_zero(tmp_path):
    site = linear_site(9, 7, 4)
    site["tensors"]["lora_B"][0] = 0  # as the padding row of an embedding
    site["tensors"]["lora_A"][:, 2] = 0
    li.resize(write_file(tmp_path / "one", {"a": site}), tmp_path / "out", rank=2)
    tensors = load_file(tmp_path / "out")
    assert not tensors["a.lora_B"][0].any() and not tensors["a.lora_A"][:, 2].any()


def test_the_product_is_never_formed(tmp_path):
    one, two = (write_file(tmp_path / str(i), {"a": linear_site(200_000, 200_000, 4, i)}) for i in (1, 2))
    start = time.monotonic()
    (row,) = li.add([one, two], tmp_path / "sum")  # the product would take 160 GB
    (cut,) = li.resize(tmp_path / "sum", tmp_path / "cut", rank=4)
    report, likeness = li.norms(tmp_path / "cut"), li.similarity(one, two)
    assert time.monotonic() - start < 60
    sites = [read_file(path)["a"]["tensors"] for path in (one, two)]
    a, b = (torch.cat([t[n].double() for t in sites], d) for n, d in (("lora_A", 0), ("lora_B", 1)))
    values = torch.linalg.eigvals((b.mT @ b) @ (a @ a.mT)).real.clamp(min=0).sqrt().sort(descending=True).values
    assert math.isclose(row.norm, float(values.norm()), rel_tol=1e-6)
    assert math.isclose(cut.error, float(values[4:].norm()), rel_tol=1e-5)
    assert math.isclose(report.total.spectral, float(values[0]), rel_tol=1e-6)
    assert abs(likeness.cosine) < 0.05


def test_a_weight_without_rows_is_served_too(tmp_path):
    empty = write_file(tmp_path / "empty", {"a": linear_site(0, 4, 3)})
    li.add([empty, empty], tmp_path / "sum")
    (row,) = li.resize(empty, tmp_path / "small", rank=1)
    assert (row.rank, row.norm, row.error) == (3, 0, 0)
    assert load_file(tmp_path / "sum")["a.lora_B"].shape == (0, 6)
    assert li.norms(empty).total.frobenius == li.similarity(empty, empty).cosine == 0


# Refusals; nothing is written


def refused(kind, *words, call):
    with pytest.raises(kind) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == []


def test_different_kinds_and_shapes_are_listed(tmp_path):
    one = write_file(tmp_path / "one", {p: linear_site(5, 4, 2) for p in "abc"})
    other = linear_site(5, 4, 2) | {"adapter": "transposed_linear"}
    two = write_file(tmp_path / "two", {"a": other, "b": linear_site(5, 6, 2), "c": linear_site(5, 4, 1)})
    for call in (lambda: li.add([one, two], tmp_path / "out"), lambda: li.similarity(one, two)):
        refused(li.MismatchError, "2 sites", "a: ", "b: ", "transposed_linear", "(5, 6)", call=call)
    assert not (tmp_path / "out").exists()


def test_two_factorizations_of_a_kernel_do_not_add_up(tmp_path):
    variants = {v.id: v for v in VARIANTS}
    one = exported(variants["conv-2d-pointwise-plain"], tmp_path / "one")
    two = exported(variants["conv-2d-balanced-plain"], tmp_path / "two")
    refused(li.MismatchError, "pointwise", "balanced", call=lambda: li.add([one, two], tmp_path / "out"))
    flat = [
        exported(variants["conv-1d"], tmp_path / "p"),
        exported(variants["conv-1d"], tmp_path / "b", factorization="balanced"),
    ]
    li.add(flat, tmp_path / "out")  # in one dimension both are the same
    wanted = weighted(*(updates(variants["conv-1d"], path) for path in flat), 1, 1)
    assert_close(updates(variants["conv-1d"], tmp_path / "out"), wanted)


def test_other_bases_are_listed_and_may_be_allowed(tmp_path):
    one = write_file(tmp_path / "one", {"a": linear_site(5, 4, 2), "b": linear_site(5, 4, 2)})
    two = write_file(tmp_path / "two", {"a": linear_site(5, 4, 2, hash="11"), "b": linear_site(5, 4, 2)})
    refused(li.MismatchError, "1 sites", "  a", "check_base=False", call=lambda: li.add([one, two], tmp_path / "out"))
    refused(li.MismatchError, "  a", call=lambda: li.similarity(one, two))
    li.add([one, two], tmp_path / "out", check_base=False)
    assert li.similarity(one, two, check_base=False).cosine > 0.99


def test_a_base_that_one_file_does_not_know_is_taken_from_the_other(tmp_path):
    one = write_file(tmp_path / "one", {"a": linear_site(5, 4, 2, hash=None)})
    two = write_file(tmp_path / "two", {"a": linear_site(5, 4, 2, hash="22")})
    li.add([one, two], tmp_path / "out")
    li.add([one, one], tmp_path / "unknown")
    assert read_file(tmp_path / "out")["a"]["hash"] == "22" and read_file(tmp_path / "unknown")["a"]["hash"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    site = linear_site(5, 4, 2)
    site["tensors"]["lora_A"][1, 1] = value
    bad = write_file(tmp_path / "bad", {"a": site})
    good = write_file(tmp_path / "good", {"a": linear_site(5, 4, 2)})
    calls = [lambda: li.add([good, bad], tmp_path / "out"), lambda: li.resize(bad, tmp_path / "out", rank=1)]
    calls += [lambda: li.norms(bad), lambda: li.similarity(good, bad), lambda: li.subtract(bad, good, tmp_path / "out")]
    for call in calls:
        refused(li.FormatError, "a.lora_A", "NaN or infinity", call=call)
    assert not (tmp_path / "out").exists()


def test_a_sum_that_overflows_is_refused(tmp_path):
    site = with_bias(linear_site(5, 4, 2), 0)
    site = site | {"dtype": torch.float16, "tensors": {name: t.half() for name, t in site["tensors"].items()}}
    site["tensors"]["lora_B_bias"] = torch.full((5,), 6e4, dtype=torch.float16)
    big = write_file(tmp_path / "big", {"a": site})
    refused(li.StateError, "a: lora_B_bias", "torch.float16", call=lambda: li.add([big, big], tmp_path / "out"))
    li.add([big, big], tmp_path / "out", dtype="float32")


def test_cuts_that_overflow_are_refused(tmp_path):
    site = linear_site(5, 4, 2, dtype=torch.float16, alpha=1e12)
    source = write_file(tmp_path / "big", {"a": site})
    call = lambda: li.resize(source, tmp_path / "out", rank=1)  # noqa: E731
    refused(li.StateError, "a: ", "not finite in torch.float16", call=call)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rank": 3}, "lora_A has shape"),
        ({"shape": [5]}, "cannot have a weight of shape"),
        ({"shape": [5, 4, 3]}, "cannot have a weight of shape"),
        ({"shape": "wide"}, "no list of sizes"),
        ({"dtype": torch.bfloat16}, "dtype float32"),
        ({"adapter": "none_such"}, "none_such"),
        ({"bias": True}, "lora_A_bias is missing"),
        ({"shape": [2**40, 2**40]}, "cannot have"),
        ({"dense": True, "rank": 2, "shape": [1, 1]}, "lora_dense is missing"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, change, word):
    bad = write_file(tmp_path / "bad", {"a": linear_site(5, 4, 2) | change})
    for call in (lambda: li.norms(bad), lambda: li.add([bad], tmp_path / "out")):
        refused(li.FormatError, "a: ", word, call=call)


ODD = [None, -1, 0, 1, 3, 2**70, 1e308, 5e-324, "x", "", [], {}, True, [2**40, 2**40], [3, 0], [5, 4, 3, 2, 1]]
ODD += ["full", "embedding", "block", "parameter", "conv", "conv_transpose", {"parameter": "w"}, {"parameter": 5}]
ODD += [{"in_features": 2**60, "out_features": 3}, {"example": 5}, "balanced", "float16"]


def places(value):
    """Yields every (container, key) of a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_metadata_gone_wrong_give_errors_of_ours(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("odd")
    kinds = [
        v
        for v in VARIANTS
        if v.id in ("linear-biases", "conv-2d-1x1", "parameter-experts", "block-biases", "linear-dense")
    ]
    source = exported(data.draw(st.sampled_from(kinds)), folder / "good")
    with safe_open(source, "pt") as file:
        metadata = dict(file.metadata())
    key = data.draw(st.sampled_from(["adapter", "base"]))
    changed = json.loads(metadata[key])
    where, name = data.draw(st.sampled_from(list(places(changed))))
    where[name] = data.draw(st.sampled_from(ODD))
    save_file(load_file(source), folder / "odd", metadata | {key: json.dumps(changed)})
    calls = [lambda out: li.norms(folder / "odd"), lambda out: li.similarity(folder / "odd", source)]
    calls += [lambda out: li.add([source, folder / "odd"], out), lambda out: li.resize(folder / "odd", out, rank=1)]
    for number, call in enumerate(calls):
        try:
            call(folder / str(number))
        except li.LoraInjectError:
            assert not (folder / str(number)).exists()


def test_stray_tensors_are_refused(tmp_path):
    site = linear_site(5, 4, 2)
    bad = write_file(tmp_path / "bad", {"a": site | {"tensors": site["tensors"] | {"x.lora_A": torch.ones(2)}}})
    refused(li.FormatError, "belong to no site", "a.x", call=lambda: li.norms(bad))


def test_classes_that_do_not_stack_are_refused(tmp_path, clean_registry):
    class Own(li.Adapter):
        kind = "own"

        @classmethod
        def can_adapt(cls, module):
            return False

        @classmethod
        def layout(cls, module, config, extras):
            return {}

        @classmethod
        def shape(cls, module, extras):
            return ()

        def delta(self, host):
            return {}

    li.register(Own)
    bad = write_file(tmp_path / "bad", {"a": linear_site(5, 4, 2) | {"adapter": "own"}})
    refused(li.UnsupportedError, "a: ", "'own'", "stacks", call=lambda: li.norms(bad))


def test_outputs_are_not_overwritten_by_accident(tmp_path):
    one = write_file(tmp_path / "one", {"a": linear_site(5, 4, 2)})
    (tmp_path / "link").symlink_to(one)
    old = one.read_bytes()
    for out in (one, tmp_path / "link"):
        refused(li.StateError, "one of the inputs", call=lambda out=out: li.add([one, one], out))
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    refused(li.StateError, "there already", call=lambda: li.resize(one, other, rank=1))
    assert (one.read_bytes(), other.read_bytes()) == (old, b"mine")
    wanted = 2 * update_in(read_file(one)["a"])["weight"]
    li.add([one, one], one, overwrite=True)
    assert_close(update_in(read_file(one)["a"]), {"weight": wanted}, 1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "one", "other"]


def test_options_that_cannot_be_used_are_refused(tmp_path):
    one, out = write_file(tmp_path / "one", {"a": linear_site(5, 4, 2)}), tmp_path / "out"
    calls = [
        (lambda: li.add([], out), "at least one"),
        (lambda: li.add([one], out, weights=[1, 2]), "2 weights"),
        (lambda: li.add([one], out, weights=[math.nan]), "finite"),
        (lambda: li.add([one], out, rank=1, energy=0.5), "one of them"),
        (lambda: li.resize(one, out), "rank=N"),
        (lambda: li.resize(one, out, rank=0), "rank=0"),
        (lambda: li.resize(one, out, energy=1.5), "energy=1.5"),
        (lambda: li.resize(one, out, energy=0), "energy=0"),
        (lambda: li.add([one], out, dtype="int8"), "dtype"),
        (lambda: li.add([one], out, name="no good"), "no good"),
    ]
    for call, word in calls:
        refused(li.ConfigError, word, call=call)
    assert not out.exists()


# The commands


def test_the_commands_do_what_the_functions_do(tmp_path, capsys):
    one, two = (write_file(tmp_path / f"{i}.safetensors", {"a": linear_site(6, 5, 2, i)}) for i in (1, 2))
    x, y, z = (str(tmp_path / name) for name in ("x", "y", "z"))

    def run(*argv):
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    code, out, _ = run("add", f"{one}:0.7", f"{two}:-0.3", "-o", x, "--name", "mine", "--dtype", "float64", "--json")
    wanted = weighted(update_in(read_file(one)["a"]), update_in(read_file(two)["a"]), 0.7, -0.3)
    assert code == 0 and json.loads(out)["sites"][0]["rank"] == 4 and json.loads(out)["name"] == "mine"
    assert_close(update_in(read_file(x)["a"]), wanted)
    code, out, _ = run("subtract", one, f"{two}:0.5", "-o", y, "--rank", 1, "--json")
    assert code == 0 and json.loads(out)["sites"][0]["rank"] == 1
    code, out, _ = run("resize", x, "-o", z, "--energy", 0.9, "--json")
    values = torch.linalg.svdvals(wanted["weight"]).square()
    assert json.loads(out)["sites"][0]["rank"] == int((values.cumsum(0) / values.sum() < 0.9).sum()) + 1
    code, out, _ = run("norms", x, "--json")
    assert math.isclose(json.loads(out)["total"]["frobenius"], float(wanted["weight"].norm()), rel_tol=1e-9)
    code, out, _ = run("similarity", one, two, "--json")
    assert math.isclose(json.loads(out)["cosine"], li.similarity(one, two).cosine)
    for command in (["norms", x], ["similarity", one, two], ["resize", x, "-o", z, "--rank", 1, "--overwrite"]):
        code, out, err = run(*command)
        assert (code, err) == (0, "") and re.search(r"^a +linear +6 x 5 ", out, re.MULTILINE)


def test_errors_of_the_commands_are_one_line(tmp_path, capsys):
    one = write_file(tmp_path / "one", {"a": linear_site(6, 5, 2)})
    two = write_file(tmp_path / "two", {"a": linear_site(6, 5, 2, hash="11")})
    out = tmp_path / "out"
    for argv, word in (
        (["add", one, two, "-o", out], "--any-base"),
        (["add", one, "-o", one], "--overwrite"),
        (["add", one, "-o", out, "--rank", 1, "--energy", 0.5], "--rank or --energy"),
        (["resize", one, "-o", out], "--rank, --energy"),
        (["norms", tmp_path / "none"], "none"),
    ):
        assert main([str(word) for word in argv]) == 2
        told = capsys.readouterr()
        assert told.out == "" and re.fullmatch(r"lora-inject: error: [^\n]+\n", told.err) and word in told.err
    assert not out.exists()
    assert main(["add", str(one), str(two), "-o", str(out), "--any-base"]) == 0
    assert main(["similarity", str(one), str(two), "--any-base"]) == 0
    capsys.readouterr()


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = Path(li.__file__).resolve().parents[1].joinpath("docs", "algebra.md").read_text(encoding="utf-8")
    names, commands = {}, 0
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(text, names)
        for command in text.splitlines() if language == "sh" else ():
            program, *argv = shlex.split(command)
            assert (program, main(argv)) == ("lora-inject", 0), command
            commands += 1
    capsys.readouterr()
    assert commands >= 8


# What is told


@of_every_stored_kind
def test_norms_are_those_of_the_dense_update(variant, tmp_path):
    source = exported(variant, tmp_path / "one.safetensors")
    (row,) = li.norms(source)
    dense = as_matrix(variant, dense_of(variant, source))
    values = torch.linalg.svdvals(dense).flatten()
    shares = values / values.sum()
    shares = shares[shares > 0]
    sizes = row.sizes
    assert math.isclose(sizes.frobenius, float(dense.norm()), rel_tol=1e-9)
    assert math.isclose(sizes.spectral, float(values.max()), rel_tol=1e-9)
    assert math.isclose(sizes.nuclear, float(values.sum()), rel_tol=1e-9)
    assert math.isclose(sizes.stable_rank, float(dense.norm() ** 2 / values.max() ** 2), rel_tol=1e-9)
    assert math.isclose(sizes.effective_rank, math.exp(-float((shares * shares.log()).sum())), rel_tol=1e-9)


def test_norms_of_all_sites_are_those_of_the_block_diagonal_matrix(tmp_path):
    sites = {"a": linear_site(5, 4, 2, 1), "b": linear_site(3, 7, 3, 2, alpha=5.0), "c": linear_site(2, 2, 1, 3)}
    sites["c"]["tensors"]["lora_B"] *= 0
    found = li.norms(write_file(tmp_path / "one", sites))
    values = torch.linalg.svdvals(torch.block_diag(*(update_in(site)["weight"] for site in sites.values())))
    assert math.isclose(found.total.frobenius, float(values.norm()), rel_tol=1e-9)
    assert math.isclose(found.total.nuclear, float(values.sum()), rel_tol=1e-9)
    assert math.isclose(found.total.spectral, float(values[0]), rel_tol=1e-9)
    assert found.sites[2].sizes.effective_rank == found.sites[2].sizes.stable_rank == 0
    assert "all together" in str(found) and json.dumps(found.to_dict())


@of_every_stored_kind
def test_the_cosine_is_that_of_the_dense_updates(variant, tmp_path):
    one, two = pair(variant, tmp_path)
    (row,) = li.similarity(one, two)
    dense = [dense_of(variant, path) for path in (one, two)]
    wanted = torch.nn.functional.cosine_similarity(*(d.flatten() for d in dense), dim=0)
    assert math.isclose(row.cosine, float(wanted), rel_tol=1e-9, abs_tol=1e-12)
    if variant.parameter is None or dense[0].dim() == 2:
        matrices = [as_matrix(variant, d) for d in dense]
        for transposed, found in ((False, row.columns), (True, row.rows)):
            projectors = [projector(m.mT if transposed else m) for m in matrices]
            ranks = [int(torch.linalg.matrix_rank(m)) for m in matrices]
            assert math.isclose(found, float((projectors[0] @ projectors[1]).trace()) / min(ranks), abs_tol=1e-8)


def projector(matrix):
    """Returns the orthogonal projection on the column space."""
    return matrix @ torch.linalg.pinv(matrix)


def test_similarity_of_a_file_with_itself_and_with_another_side(tmp_path):
    sites = {"a": linear_site(5, 4, 2, 1), "b": linear_site(3, 7, 3, 2)}
    one, two = write_file(tmp_path / "one", sites), write_file(tmp_path / "two", {"a": sites["a"]})
    same, part = li.similarity(one, one), li.similarity(one, two)
    assert math.isclose(same.cosine, 1) and all(math.isclose(s.columns, 1) and math.isclose(s.rows, 1) for s in same)
    norms = [float(update_in(site)["weight"].norm()) for site in sites.values()]
    assert math.isclose(part.cosine, norms[0] / math.hypot(*norms), rel_tol=1e-9)
    assert part.alone == (("b",), ()) and "only in" in str(part) and json.dumps(part.to_dict())
    other = linear_site(5, 4, 2, 1)
    q = torch.linalg.qr(torch.cat([other["tensors"]["lora_B"], torch.randn(5, 3)], 1)).Q
    other["tensors"]["lora_B"] = q[:, 2:4].contiguous()
    (row,) = li.similarity(two, write_file(tmp_path / "other", {"a": other}))
    assert row.columns < 1e-10 and math.isclose(row.rows, 1) and abs(row.cosine) < 1e-6


def test_a_zero_update_is_like_nothing(tmp_path):
    zero = linear_site(5, 4, 2)
    zero["tensors"]["lora_B"] *= 0
    empty = write_file(tmp_path / "zero", {"a": zero})
    found = li.similarity(empty, write_file(tmp_path / "one", {"a": linear_site(5, 4, 2)}))
    assert (found.cosine, found.sites[0].columns, found.sites[0].column_cosines) == (0, 0, ())
    (row,) = li.resize(empty, tmp_path / "out", rank=1)
    assert (row.rank, row.norm, row.error, row.relative) == (1, 0, 0, 0)
    (row,) = li.resize(empty, tmp_path / "out", energy=0.5, overwrite=True)
    assert row.rank == 1
