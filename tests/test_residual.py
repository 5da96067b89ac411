"""Merging without a copy: what is kept, what it proves, and every way back to the original bits."""

from __future__ import annotations

import pytest
import torch
from snapshot import assert_same, snapshot
from torch import nn
from weights import layer, original

import lora_inject as li
from lora_inject import keeping

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore::lora_inject.RoundingWarning")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("keep", ["residual", "copy"])
@pytest.mark.parametrize("relative", [1e-4, 0.03, 1.0, 300.0])
@pytest.mark.parametrize("accumulate", [torch.float32, torch.float64])
def test_unmerge_gives_every_bit_back(small_blocks, dtype, keep, relative, accumulate):
    made = layer(dtype, relative=relative)
    before = snapshot(made)
    for _ in range(2):
        li.merge(made, keep=keep, accumulate=accumulate)
        li.unmerge(made)
        assert_same(before, made)


@every_dtype
def test_the_sum_is_rounded_once_in_every_block(small_blocks, dtype):
    made = layer(dtype, relative=0.5)
    adapter = made.adapters["default"]
    wanted = made._parameters["weight"].double() + adapter.lora_B.double() @ adapter.lora_A.double()
    report = li.merge(made, accumulate=torch.float64)
    if dtype == torch.float64:
        # A product of fewer rows may have other last bits.
        assert torch.allclose(made._parameters["weight"], wanted, rtol=1e-13, atol=1e-16)
    else:
        assert torch.equal(made._parameters["weight"], wanted.detach().to(dtype))
    (row,) = report
    assert row.kept == report.kept and not (row.untied or row.created or row.widened)


def test_float64_accumulation_is_closer_than_float32():
    errors = {}
    for accumulate in (torch.float32, torch.float64):
        made = layer(torch.float64, relative=1.0, dtype=torch.float32)
        adapter, w = made.adapters["default"], made._parameters["weight"].detach().clone()
        wanted = w + adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
        li.merge(made, accumulate=accumulate)
        errors[accumulate] = float((made._parameters["weight"] - wanted).abs().max())
    assert errors[torch.float64] < 1e-15 < 1e-10 < errors[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("relative", [0.001, 0.01, 0.03])
def test_what_is_kept_is_a_small_part_of_the_weight(dtype, relative):
    made = layer(dtype, size=1024, relative=relative)
    before, weight = original(made), made._parameters["weight"].nbytes
    report = li.merge(made)
    assert report.kept <= 0.15 * weight
    held = [t for way in made.adapters.kept.values() for t in (*way.places, *way.values)]
    held += [p for way in made.adapters.kept.values() for source in way.sources for p in source.parameters()]
    assert report.kept == sum(t.untyped_storage().nbytes() for t in held), "every byte counts"
    li.unmerge(made)
    assert original(made) == before
    assert li.merge(made, keep="copy").kept == weight


def recorded(made: nn.Module) -> set[int]:
    """Returns the positions of the elements that the merge has kept as they were."""
    (way,) = made.adapters.kept.values()
    columns = made._parameters["weight"].shape[1]
    starts = [rows.start * columns for rows in way.blocks]
    return {start + int(at) for start, places in zip(starts, way.places, strict=True) for at in places}


@every_dtype
def test_a_single_changed_element_is_found_or_repaired(small_blocks, dtype):
    """Never silently wrong: what subtraction and the record give back is the original, or nothing is changed."""
    made, before = layer(dtype), original(layer(dtype))
    li.merge(made)
    known, bits = recorded(made), keeping.bits(made._parameters["weight"].detach().view(-1))
    free = [place for place in (0, 1, 601, 1200, 4093, 4094, 4095) if place not in known]
    assert len(free) > 2
    for place in (*free, *list(known)[:3]):
        saved = int(bits[place])
        for change in (1, 1 << (8 * dtype.itemsize - 2)):
            bits[place] = saved ^ change
            changed = snapshot(made)
            try:
                li.unmerge(made)
            except li.StateError as error:
                assert place not in known
                assert "cannot be proven" in str(error) and "keep_merged=True" in str(error)
                with pytest.raises(li.StateError, match="cannot be proven"):
                    li.uninject(made)
                assert_same(changed, made)
                assert made.adapters["default"].merged
                bits[place] = saved
            else:
                assert place in known or change == 1, "a large change outside the record cannot be repaired"
                assert original(made) == before
                li.merge(made)
    li.unmerge(made)
    assert original(made) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_single_change_and_no_exchange_leaves_the_checksum(dtype):
    weight = torch.randn(6, 7).to(dtype)
    proof = keeping.checksum([weight])
    assert proof == keeping.checksum([weight[:2], weight[2:]]) == keeping.checksum([weight.t().contiguous().t()])
    for place in range(weight.numel()):
        for bit in range(8 * dtype.itemsize - 1):
            other = weight.clone()
            keeping.bits(other.view(-1))[place] ^= 1 << bit
            assert keeping.checksum([other]) != proof
    swapped = weight.clone()
    swapped[0, 0], swapped[5, 6] = weight[5, 6], weight[0, 0]
    assert keeping.checksum([swapped]) != proof


def test_keep_nothing_has_no_way_back_but_keeping():
    made = layer(dtype := torch.bfloat16)
    report = li.merge(made, keep="nothing")
    assert report.kept == 0
    before = snapshot(made)
    for call in (li.unmerge, li.uninject):
        with pytest.raises(li.StateError, match=r"nothing.*load the base"):
            call(made)
        assert_same(before, made)
    merged = original(made)
    li.uninject(made, keep_merged=True)
    assert original(made) == merged != original(layer(dtype)) and type(made) is nn.Linear
