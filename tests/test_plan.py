"""Plans: pure, complete, printable, quick; every check lies before the first change."""

from __future__ import annotations

import gc
import json
import time

import pytest
import torch
from snapshot import assert_same, snapshot
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lora_inject as li


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_planning_changes_nothing():
    model = nn.ModuleDict({"net": mlp(), "table": nn.Embedding(5, 8), "conv": nn.Conv2d(3, 4, 3)})
    before, state = snapshot(model), torch.get_rng_state()
    targets = ["*.0", "table", "conv", li.Target("net", adapter="block", example=torch.ones(1, 8))]
    li.plan(model, targets, rank=2)
    assert_same(before, model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_plan_counts_what_inject_then_adds():
    model = nn.ModuleDict({"net": mlp(), "table": nn.Embedding(5, 8)})
    base = sum(p.numel() for p in model.parameters())
    plan = li.plan(model, ["net.*", "table"], rank=2)
    assert [site.parameters for site in plan] == [2 * (8 + 16), 2 * (16 + 4), 2 * (5 + 8)]
    assert plan.model_parameters == base
    assert plan.share == pytest.approx(plan.parameters / base)
    li.inject(model, ["net.*", "table"], rank=2)
    assert sum(p.numel() for p in li.adapter_parameters(model).values()) == plan.parameters


def test_the_table_shows_what_people_look_for():
    text = str(li.plan(mlp(), "*", rank=2, exclude="2"))
    for part in ("path", "module", "shape", "adapter", "rank", "parameters", "Linear", "16 x 8", "linear", "48"):
        assert part in text
    assert "ReLU" in text and "excluded" in text, "what was skipped, and why"
    assert "1 sites" in text or "1 site" in text


def test_a_plan_is_a_value_for_json_too():
    found = json.loads(json.dumps(li.plan(mlp(), "*", rank=2).to_dict()))
    assert [site["path"] for site in found["sites"]] == ["0", "2"]
    assert found["hits"] == {"*": 2}


def test_a_model_on_the_meta_device_can_be_planned_and_injected():
    with torch.device("meta"):
        model = mlp()
    assert li.plan(model, "*", rank=2).parameters == 2 * (8 + 16 + 16 + 4)
    li.inject(model, "*", rank=2)
    assert all(p.is_meta for p in li.adapter_parameters(model).values())
    li.uninject(model)


def test_a_plan_does_not_keep_the_order_of_the_targets_but_of_the_modules():
    assert [site.path for site in li.plan(mlp(), ["2", "0"])] == ["0", "2"]


class Undrawn(nn.Linear):
    """A linear that is made quickly."""

    def reset_parameters(self):
        pass


@pytest.mark.slow
def test_fifty_thousand_modules_against_ten_patterns():
    layer = [f"{kind}_proj" for kind in "qkvo"] + ["norm1", "norm2", "up", "down", "gate"]
    model = nn.ModuleList(nn.ModuleDict({n: Undrawn(2, 2) for n in layer}) for _ in range(5000))
    assert len(list(model.modules())) > 50_000
    patterns = [f"*.{name}" for name in layer] + [r"re:\d+\.(q|v)_proj"]
    gc.collect()
    start = time.perf_counter()
    plan = li.plan(model, patterns)
    assert time.perf_counter() - start < 20
    assert len(plan) == 45_000


class Shared(nn.Module):
    """One linear at three paths, one of them in a branch of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.deep = nn.ModuleDict({"third": self.first})
        self.other = nn.Linear(4, 4)


@pytest.mark.parametrize("pattern", ["first", "second", "deep.third", "re:.*third", "*"])
def test_a_shared_module_is_one_site_under_each_of_its_paths(pattern):
    plan = li.plan(Shared(), pattern)
    assert plan.sites[0].path == "first"
    assert plan.sites[0].aliases == ("second", "deep.third")


@pytest.mark.parametrize("pattern", ["first", "second", "deep.*"])
def test_excluding_any_alias_excludes_the_module(pattern):
    assert [site.path for site in li.plan(Shared(), "*", exclude=pattern)] == ["other"]


def test_patterns_see_clean_paths_through_wrappers():
    model = mlp()
    model[0] = torch.compile(model[0], backend="eager")
    model[2] = checkpoint_wrapper(model[2])
    assert [site.path for site in li.plan(torch.compile(model, backend="eager"), "?")] == ["0", "2"]
    with pytest.raises(li.TargetError):
        li.plan(model, "*_orig_mod*")


@pytest.mark.parametrize("pattern", ["", "re:", "*"])
def test_the_root_module_has_the_empty_path(pattern):
    assert [site.path for site in li.plan(nn.Linear(3, 3), pattern)] == [""]


class OwnAdapters(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.adapters = nn.ModuleList()


def scripted() -> nn.Module:
    return torch.jit.script(nn.Linear(4, 4))


def integer() -> nn.Module:
    made = nn.Linear(4, 4)
    made._parameters["weight"] = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return made


class Final(nn.Linear):
    def __init_subclass__(cls):
        raise TypeError("Final is final")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.LazyLinear(4), "shape"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (OwnAdapters, "adapters"),
        (scripted, "TorchScript"),
        (integer, "int8"),
        (lambda: nn.BatchNorm1d(4), "BatchNorm1d"),
        (lambda: Final(4, 4), "Final"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_changes(make, why):
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": make(), "late": nn.Linear(4, 4)})
    before = [(id(m), type(m), [n for n, _ in m.named_children()]) for m in model.modules()]
    with pytest.raises(li.LoraInjectError, match=f"bad.*{why}"):
        li.inject(model, ["good", "bad", "late"])
    assert [(id(m), type(m), [n for n, _ in m.named_children()]) for m in model.modules()] == before
    assert all(p.requires_grad for p in model["good"].parameters())


@pytest.mark.parametrize(
    "options",
    [
        *({"rank": value} for value in (0, -1, 1.5, "8", True)),
        *({"alpha": value} for value in (0, -1, float("inf"), float("nan"), "1")),
        *({"dropout": value} for value in (1, -0.1, float("nan"))),
        *({"seed": value} for value in (-1, 1.0, 2**64)),
        *({"init": "ones"}, {"dtype": torch.int32}, {"freeze": 1}, {"exclude": 3}, {"exclude": [3]}),
        *({"factorization": "tucker"}, {"rslora": None}, {"bias": "all"}, {"dense": 1}),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_used_is_named(options):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(li.ConfigError, match=next(iter(options))):
        li.inject(model, "*", **options)
    assert_same(before, model)


LEGAL = ["default", "a", "A-1", "_x", "0", "v2_final", "-"]
ILLEGAL = ["", "a.b", "a b", "a/b", "ä", "keys", "items", "pop", "training", "forward", "a\n", None, 3, "_modules"]


@pytest.mark.parametrize("name", LEGAL)
def test_legal_names(name):
    model = mlp()
    li.inject(model, "*", name=name)
    assert {ref.name for ref in li.adapters(model)} == {name}


@pytest.mark.parametrize("name", ILLEGAL, ids=repr)
def test_names_that_would_confuse_are_refused(name):
    with pytest.raises(li.ConfigError, match="name"):
        li.inject(mlp(), "*", name=name)


def test_the_same_name_at_the_same_site_is_an_error_and_at_another_is_not():
    model = mlp()
    li.inject(model, "0")
    before = snapshot(model)
    with pytest.raises(li.StateError, match=r"0.*default"):
        li.inject(model, "*")
    assert_same(before, model)
    li.inject(model, "2")
    assert [ref.path for ref in li.adapters(model)] == ["0", "2"]


def test_several_problems_are_listed_together():
    model = nn.ModuleDict({f"e{i}": nn.Embedding(4, 4, max_norm=1.0) for i in range(3)})
    with pytest.raises(li.UnsupportedError) as caught:
        li.plan(model, "*")
    assert all(f"e{i}" in str(caught.value) for i in range(3))
