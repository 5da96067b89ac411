"""Where an untrained adapter does not give the base's bits: what the documentation says of it, and no more."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from snapshot import raw
from torch import nn

import lora_inject as li

ODD = [math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("options", [{}, {"bias": True}], ids=["fused", "parts"])
def test_a_token_that_is_not_finite_changes_its_own_outputs_alone(value, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    x = torch.randn(4, 6)
    x[2, 1] = value
    with torch.no_grad():
        model[0].weight[0, 1] = 0.5
        wanted = model(x)
    li.inject(model, "0", rank=2, **options)
    found = model(x)
    others = [0, 1, 3]
    assert raw(found[others]) == raw(wanted[others])
    assert found[2].isnan().all() and (wanted[2].isinf().all() or math.isnan(value))
    with li.disabled(model):
        assert raw(model(x)) == raw(wanted)


def test_a_product_that_overflows_does_so_too():
    model = nn.Sequential(nn.Linear(8, 3, bias=False)).requires_grad_(False)
    x = torch.full((2, 8), 1e38)
    x[1] = 1.0
    with torch.no_grad():
        model[0].weight.fill_(1e-3)
        wanted = model(x)
        li.inject(model, "0", rank=2)
        li.adapter_parameters(model)["0.adapters.default.lora_A"].fill_(1.0)
        found = model(x)
    assert wanted.isfinite().all() and found[0].isnan().all()
    assert raw(found[1]) == raw(wanted[1])


@pytest.mark.parametrize("kind", ["embedding", "linear"])
def test_a_negative_zero_becomes_a_positive_one_which_is_equal(kind):
    model = nn.Sequential(nn.Embedding(3, 4) if kind == "embedding" else nn.Linear(3, 4, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(-0.0)
    x = torch.arange(3) if kind == "embedding" else torch.ones(1, 3)
    plain = copy.deepcopy(model)
    li.inject(model, "0", rank=2)
    assert torch.equal(model(x), plain(x)) and not model(x).signbit().any()
    with li.disabled(model):
        assert raw(model(x)) == raw(plain(x))


def test_b_learns_from_the_first_step():
    """Leaving the update out while B is zero would be exact, but B would never learn."""
    model = nn.Sequential(nn.Linear(6, 5))
    li.inject(model, "0", rank=2)
    model(torch.randn(3, 6)).sum().backward()
    assert li.adapter_parameters(model)["0.adapters.default.lora_B"].grad.any()
