"""The mask of the fused path's dropout: eight elements in a byte and back, and what it does to any number."""

from __future__ import annotations

import pytest
import torch

from lora_inject.dropout import draw, keep, keep_, mask_of, pack, unpack

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (7, 33), (0, 4)], ids=str)
@pytest.mark.parametrize("rate", [0.0005, 0.3, 0.9995])
def test_a_packed_mask_comes_back_from_a_bit_for_each_element(dtype, shape, rate):
    x = torch.zeros(shape, dtype=dtype)
    rows = draw(x, rate)
    bits = pack(rows)
    mask = unpack(bits, dtype, shape)
    assert bits.dtype == torch.uint8 and bits.numel() == (x.numel() + 7) // 8
    assert mask.shape == x.shape and set(mask.unique().tolist()) <= {0, 1}
    assert torch.equal(mask, mask_of(rows, x))
    assert torch.equal(mask.flatten().to(torch.uint8), rows.flatten()[: x.numel()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_stays_keeps_its_bits_and_what_is_dropped_is_zero_whatever_it_was(dtype):
    odd = torch.tensor([1.5, -0.0, float("inf"), float("nan"), -float("inf"), 1e-7], dtype=dtype).repeat(2, 20)
    mask = mask_of(draw(odd, 0.5), odd)
    before, own, spent, leaf = mask.clone(), odd.clone(), mask.clone(), odd.clone().requires_grad_(True)
    with torch.no_grad():
        quick = [keep(odd, spent), keep_(own, mask)]
    # Each takes the memory that it says, and only that.
    assert quick[0].data_ptr() == spent.data_ptr() and quick[1] is own and torch.equal(mask, before)
    parts = [keep(leaf, mask), keep_(leaf, mask)]
    for kept in (*quick, *parts):
        bits, found = (t.detach().view(mask.dtype) for t in (odd, kept))
        assert torch.equal(found[mask == 1], bits[mask == 1])
        assert (found[mask == 0] == 0).all() and 60 < (mask == 0).sum() < 180
    for kept in parts:
        (gradient,) = torch.autograd.grad(kept.sum(), leaf)
        assert torch.equal(gradient, mask.to(dtype))
    assert torch.equal(mask, before)


def test_a_number_whose_sign_is_yet_to_be_changed():
    x = torch.conj(torch.randn(4, 8, dtype=torch.complex64)).imag
    assert x.is_neg()
    mask = mask_of(draw(x, 0.5), x)
    with torch.no_grad():
        wanted = torch.where(mask == 1, x.resolve_neg(), torch.zeros(()))
        assert torch.equal(keep(x, mask), wanted)


def test_the_mask_follows_the_generator_and_every_call_draws_another():
    x = torch.zeros(16, 16)
    torch.manual_seed(5)
    first, second = draw(x, 0.5), draw(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(draw(x, 0.5), first) and not torch.equal(first, second)
