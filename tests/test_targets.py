"""Which paths a pattern selects, as tables; and that a miss names what was near."""

from __future__ import annotations

import fnmatch
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_inject as li
from lora_inject.targets import matcher

GLOBS = [
    ("*.q_proj", "layers.0.attn.q_proj", True),
    ("*.q_proj", "q_proj", False),
    ("q_proj", "layers.0.q_proj", False),
    ("*q_proj", "q_proj", True),
    ("*q_proj", "layers.0.not_q_proj", True),
    ("layers.?.q", "layers.3.q", True),
    ("layers.?.q", "layers.13.q", False),
    ("layers.[01].q", "layers.1.q", True),
    ("layers.[!01].q", "layers.1.q", False),
    ("layers.*.q", "layers.0.attn.self.q", True),
    ("Layers.*", "layers.0", False),
    ("*", "", True),
    ("", "", True),
    ("layers", "layers.0", False),
    ("layers*", "layers.0", True),
    ("a/b", "a/b", True),
    ("a/*", "a/b", True),
    ("a/*", "a/b/c", True),
    ("*", "a/b", True),
    ("a", "a/b", False),
    ("b", "a/b", False),
    ("*/b", "x.a/b", True),
    ("a\\b", "a\\b", True),
    ("a\\*", "a\\b.c", True),
    ("a", "a\\b", False),
    ("a/b", "a\\b", False),
    ("*.a", "x.a/b", False),
    ("*.w\n", "x.w\n", True),
    ("*.w", "x.w\n", False),
    ("ünï.*", "ünï.cödé", True),
    ("a.b", "aXb", False),
    ("a+", "aa", False),
    ("(a|b)", "a", False),
]
REGEXES = [
    (r"re:.*\.(q|v)_proj", "layers.0.q_proj", True),
    (r"re:.*\.(q|v)_proj", "layers.0.k_proj", False),
    (r"re:layers\.\d+", "layers.12", True),
    (r"re:layers\.\d+", "layers.12.q", False),
    (r"re:layers", "layers.12", False),
    (r"re:a/b", "a/b", True),
    (r"re:a|b", "b", True),
    (r"re:a|b", "bc", False),
    (r"re:", "", True),
    (r"re:.*w", "x\nw", False),
]


@pytest.mark.parametrize(("pattern", "path", "expected"), GLOBS + REGEXES)
def test_what_a_pattern_selects(pattern, path, expected):
    assert matcher(pattern)(path) is expected


TEXT = st.text("ab.*?[]!-^/\\_0", max_size=8)


def _separator_in_a_set(pattern: str) -> bool:
    return any(set("/\\") & set(inside) for inside in re.findall(r"\[.*?\]", pattern))


@given(TEXT.filter(lambda pattern: not _separator_in_a_set(pattern)), TEXT)
def test_globs_are_those_of_the_standard_library(pattern, path):
    assert matcher(pattern)(path) is fnmatch.fnmatchcase(path, pattern)


@given(TEXT)
def test_every_path_without_wildcards_selects_itself_and_not_what_it_begins(path):
    path = re.sub(r"[*?\[\]]", "x", path)
    assert matcher(path)(path)
    assert not matcher(path)(path + "/b") and not matcher(path)("b\\" + path)


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        inner = nn.ModuleDict({"a/b": nn.Linear(4, 4), "a\\b": nn.Linear(4, 4), "a": nn.Linear(4, 4)})
        self.blocks = nn.ModuleDict({"down/0": inner, "down": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("*.a", ["blocks.down/0.a"]),
        ("blocks.down", ["blocks.down"]),
        ("*/b", ["blocks.down/0.a/b"]),
        ("*a\\b", ["blocks.down/0.a\\b"]),
        ("blocks.down/*", ["blocks.down/0.a/b", "blocks.down/0.a\\b", "blocks.down/0.a"]),
        ("re:.*/b", ["blocks.down/0.a/b"]),
    ],
)
def test_names_with_separators_are_one_name(pattern, paths):
    assert [site.path for site in li.plan(Strange(), pattern)] == paths


def test_names_with_separators_survive_the_whole_way(tmp_path):
    model, x = Strange(), torch.randn(2, 4)
    li.inject(model, "*a*b", seed=0, init="gaussian")
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.add_(0.1)
    site = model.blocks["down/0"]["a\\b"]
    wanted = site(x)
    path = li.export(model, tmp_path / "a.safetensors")
    state = {k: v.clone() for k, v in model.state_dict().items() if ".adapters." not in k}
    fresh = Strange()
    fresh.load_state_dict(state)
    li.load(fresh, path)
    assert torch.equal(fresh.blocks["down/0"]["a\\b"](x), wanted)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)


def tower(depth: int = 3) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(depth)), "head": nn.Linear(4, 9)})


def test_the_last_match_wins_for_each_option_on_its_own():
    targets = [
        li.Target("*_proj", rank=2, alpha=6, dropout=0.5),
        li.Target("*.q_proj", rank=4),
        li.Target("layers.0.*_proj", dropout=0.1),
    ]
    found = {site.path: site.config for site in li.plan(tower(2), targets, rank=16, alpha=1)}
    assert {path: (c.rank, c.alpha, c.dropout) for path, c in found.items()} == {
        "layers.0.q_proj": (4, 6, 0.1),
        "layers.0.v_proj": (2, 6, 0.1),
        "layers.1.q_proj": (4, 6, 0.5),
        "layers.1.v_proj": (2, 6, 0.5),
    }


def test_hits_are_counted_per_pattern_and_a_site_selected_twice_is_one_site():
    plan = li.plan(tower(), ["*_proj", "*.q_proj", "head"])
    assert len(plan) == 7
    assert dict(plan.hits) == {"*_proj": 6, "*.q_proj": 3, "head": 1}


def test_a_pattern_without_a_hit_is_an_error_even_beside_one_that_hits():
    with pytest.raises(li.TargetError, match=r"'\*\.k_proj'.*") as caught:
        li.plan(tower(), ["*.q_proj", "*.k_proj"])
    assert "layers.0.q_proj" in str(caught.value), "the nearest path is named"


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.qproj", "layers.0.q_proj"),
        ("layer.0.q_proj", "layers.0.q_proj"),
        ("q_proj", "q_proj"),
        ("hed", "head"),
        (r"re:.*\.v_prj", "layers.0.v_proj"),
    ],
)
def test_a_miss_names_the_nearest_paths(pattern, near):
    with pytest.raises(li.TargetError) as caught:
        li.plan(tower(), pattern)
    assert repr(pattern) in str(caught.value)
    assert near in str(caught.value)


def test_type_filters():
    assert len(li.plan(tower(), li.Target("*", type=nn.Linear))) == 7
    assert len(li.plan(tower(), li.Target("*", type="Linear"))) == 7
    with pytest.raises(li.TargetError, match="LayerNorm"):
        li.plan(tower(), li.Target("*.norm", type=nn.Linear))


def test_a_glob_lists_what_it_skipped_and_a_name_that_cannot_be_served_is_an_error():
    plan = li.plan(tower(1), "layers.0.*")
    assert [site.path for site in plan] == ["layers.0.q_proj", "layers.0.v_proj"]
    assert [(skip.path, skip.kind) for skip in plan.skipped] == [("layers.0.norm", "LayerNorm")]
    assert "LayerNorm" in plan.skipped[0].why
    with pytest.raises(li.UnsupportedError, match=r"layers\.0\.norm.*LayerNorm"):
        li.plan(tower(1), "layers.0.norm")
    with pytest.raises(li.LoraInjectError, match=r"layers\.0\.norm"):
        li.plan(tower(1), ["*_proj", "*.norm"])


def test_exclude_takes_patterns_of_both_kinds_and_says_what_it_took():
    plan = li.plan(tower(3), "*_proj", exclude=["layers.0.*", r"re:.*\.2\.v_proj"])
    assert [site.path for site in plan] == ["layers.1.q_proj", "layers.1.v_proj", "layers.2.q_proj"]
    assert {skip.path for skip in plan.skipped} == {"layers.0.q_proj", "layers.0.v_proj", "layers.2.v_proj"}
    with pytest.raises(li.TargetError, match="exclude"):
        li.plan(tower(3), "*_proj", exclude="*")


@pytest.mark.parametrize(
    "targets",
    ["re:(", [], None, 3, [3], [None], {}, li.Target],
)
def test_targets_that_are_none(targets):
    with pytest.raises(li.LoraInjectError):
        li.plan(tower(1), targets)


@pytest.mark.parametrize(
    "options",
    [
        *({"rnk": 3}, {"rank": 0}, {"rank": 2.0}, {"rank": True}, {"alpha": 0}, {"alpha": float("nan")}),
        *({"dropout": 1.0}, {"dropout": -0.1}, {"init": "zeros"}, {"bias": 1}),
        *({"dtype": torch.int8}, {"dtype": "int8"}, {"type": 3}),
    ],
    ids=str,
)
def test_a_target_checks_its_options_when_it_is_made(options):
    with pytest.raises(li.ConfigError, match=next(iter(options))):
        li.Target("*", **options)


def test_a_misspelt_option_names_the_nearest():
    with pytest.raises(li.ConfigError, match="alpha"):
        li.Target("*", alhpa=3)
    with pytest.raises(li.ConfigError, match="dropout"):
        li.plan(tower(1), "*", drop_out=0.1)


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), float("inf"), float("nan")], ids=["huge", "-huge", "inf", "nan"]
)
@pytest.mark.parametrize("option", ["alpha", "dropout"])
def test_a_number_that_no_float_holds_is_refused_as_a_value(option, value):
    with pytest.raises(li.ConfigError, match=option):
        li.Target("*", **{option: value})
    with pytest.raises(li.ConfigError, match=option):
        li.plan(torch.nn.Sequential(torch.nn.Linear(2, 2)), "*", **{option: value})
