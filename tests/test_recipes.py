"""Recipes: what a file may say, and file, line and reason of everything that it may not."""

import json

import pytest
import torch
from torch import nn

import lora_inject as li
from lora_inject.config import SITE_OPTIONS, as_dtype, check_option


@pytest.fixture
def recipe(tmp_path):
    """Writes a text, or bytes, to a recipe's file and returns its path."""

    def write(text):
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def read(path):
    """A recipe as plain values: its patterns with all that they carry, and the options of the injection."""
    found = li.load_recipe(path)
    targets = [
        (target.pattern, target.type, target.adapter, dict(target.options) | dict(target.extras))
        for target in found.targets
    ]
    site = {name: getattr(found.injection.site, name) for name in SITE_OPTIONS}
    rest = {name: getattr(found.injection, name) for name in ("name", "exclude", "freeze", "seed", "share_tied")}
    return targets, site | rest


DEFAULTS = {
    "rank": 8,
    "alpha": None,
    "dropout": 0.0,
    "bias": False,
    "rslora": False,
    "dense": False,
    "init": "kaiming",
    "factorization": "pointwise",
    "dtype": None,
    "train_a": True,
    "name": "default",
    "exclude": (),
    "freeze": True,
    "seed": None,
    "share_tied": False,
}
EVERYTHING = """\
name: my-adapter
description: all keys at once
rank: 4
alpha: 6.5
dropout: 0.25
bias: true
rslora: True
dense: TRUE
train_a: false
init: orthogonal
factorization: balanced
dtype: bfloat16
freeze: false
seed: 7
share_tied: true
exclude: ["*.head", 're:.*\\.5\\..*']
targets:
  - "*.q_proj"
  - {pattern: "*", type: Linear, rank: 2, alpha: 3, dropout: 0, bias: false, init: gaussian, dtype: float16}
  - pattern: mlp
    adapter: block
    in_features: 5
    out_features: 6
"""
GOOD = [
    ('targets: "*.q"', [("*.q", None, None, {})], {}),
    ("targets: [a, b]", [("a", None, None, {}), ("b", None, None, {})], {}),
    ("targets:\n- pattern: a\n", [("a", None, None, {})], {}),
    ('targets: [""]', [("", None, None, {})], {}),
    ("targets: ['0', \"1.5\", 'on', 'null']", [(p, None, None, {}) for p in ("0", "1.5", "on", "null")], {}),
    ("targets: a\nexclude: b", [("a", None, None, {})], {"exclude": ("b",)}),
    ("targets: a\nexclude: []", [("a", None, None, {})], {}),
    ("targets: a\nalpha: null\ndtype: ~\nseed:", [("a", None, None, {})], {}),
    ("targets: a\ndropout: 1e-3", [("a", None, None, {})], {"dropout": 0.001}),
    ("targets: a\ndropout: .5\nalpha: +1.5E+1", [("a", None, None, {})], {"dropout": 0.5, "alpha": 15.0}),
    ("targets: a\nalpha: 100000000000000000000", [("a", None, None, {})], {"alpha": 1e20}),
    ("targets: a\nname: 2001-01-01", [("a", None, None, {})], {"name": "2001-01-01"}),
    ("targets: a\ndescription: |\n  two\n  lines", [("a", None, None, {})], {}),
    ("\ufeff# mark\r\n---\r\ntargets: a\r\n...\r\n", [("a", None, None, {})], {}),
    ('{"targets": ["é"], "rank": 3}', [("é", None, None, {})], {"rank": 3}),
    (f"targets: a\nseed: {2**63 - 1}", [("a", None, None, {})], {"seed": 2**63 - 1}),
    (
        EVERYTHING,
        [
            ("*.q_proj", None, None, {}),
            (
                "*",
                "Linear",
                None,
                {
                    "rank": 2,
                    "alpha": 3.0,
                    "dropout": 0.0,
                    "bias": False,
                    "init": "gaussian",
                    "dtype": torch.float16,
                },
            ),
            ("mlp", None, "block", {"in_features": 5, "out_features": 6}),
        ],
        {
            "name": "my-adapter",
            "rank": 4,
            "alpha": 6.5,
            "dropout": 0.25,
            "bias": True,
            "rslora": True,
            "dense": True,
            "init": "orthogonal",
            "factorization": "balanced",
            "dtype": torch.bfloat16,
            "train_a": False,
            "freeze": False,
            "share_tied": True,
            "seed": 7,
            "exclude": ("*.head", "re:.*\\.5\\..*"),
        },
    ),
]


@pytest.mark.parametrize(("text", "targets", "options"), GOOD)
def test_a_recipe_means_what_it_says(recipe, text, targets, options):
    assert read(recipe(text)) == (targets, DEFAULTS | options)


def test_the_description_is_kept(recipe):
    assert li.load_recipe(recipe(EVERYTHING)).description == "all keys at once"


T = "targets: a\n"
BAD = [
    # Keys.
    (T + "rnak: 8", 2, 1, "unknown key 'rnak': did you mean 'rank'"),
    (T + "lora_alpha: 8", 2, 1, "unknown key 'lora_alpha': did you mean 'alpha'"),
    (T + "Rank: 8", 2, 1, "unknown key 'Rank': did you mean 'rank'"),
    (T + "zzz: 8", 2, 1, "unknown key 'zzz': known: alpha, bias, dense, description, dropout, dtype, exclude, "),
    (T + "on: 8", 2, 1, "unknown key 'on'"),
    (T + "<<: {rank: 8}", 2, 1, "unknown key '<<'"),
    (T + "rank: 8\nalpha: 2\nrank: 8", 4, 1, "key 'rank' stands on line 2 already"),
    ("targets:\n- pattern: a\n  rank: 1\n  'rank': 1", 4, 3, "key 'rank' stands on line 3 already"),
    (T + "? [a]\n: b", 2, 3, "a key must be a word"),
    ("rank: 8", 1, 1, "key 'targets' is missing. Patterns, each as text"),
    ("targets:\n  - a\n  - rank: 4", 3, 5, "key 'pattern' is missing. Glob over the whole dotted path"),
    ("targets:\n  - {pattern: a,\n     rnak: 4}", 3, 6, "unknown key 'rnak': did you mean 'rank'?"),
    ("targets: [{pattern: a, in_features: 4}]", 1, 24, "unknown key 'in_features': known: adapter, alpha"),
    ("targets: [{pattern: a, adapter: block, in_featurs: 4}]", 1, 40, "'in_featurs': did you mean 'in_features'"),
    # Values.
    (T + "rank: 8.0", 2, 7, "rank: 8.0 will not do. Inner size of the factors: a whole number of at least 1."),
    (T + "rank: true", 2, 7, "rank: true will not do"),
    (T + "rank: '8'", 2, 7, 'rank: "8" will not do'),
    (T + "rank: 0", 2, 7, "rank: 0 will not do"),
    (T + "rank:", 2, 6, "rank: null will not do"),
    (T + "rank: [8]", 2, 7, "rank: a list will not do"),
    (T + "rank: {}", 2, 7, "rank: an empty mapping will not do"),
    (T + "rank: " + "9" * 5000, 2, 7, "rank: Infinity will not do"),
    (T + "alpha: 0", 2, 8, "alpha: 0 will not do. Numerator of the scaling alpha / rank: a number above 0"),
    (T + "alpha: false", 2, 8, "alpha: false will not do"),
    (T + "alpha: 1e999", 2, 8, "alpha: Infinity will not do"),
    (T + "dropout: 1", 2, 10, "dropout: 1 will not do"),
    (T + "bias: 1", 2, 7, "bias: 1 will not do"),
    (T + "bias: 'true'", 2, 7, 'bias: "true" will not do'),
    (T + "init: kaimin", 2, 7, 'init: "kaimin" will not do. How A is drawn: kaiming, gaussian, orthogonal.'),
    (T + "factorization: x", 2, 16, 'factorization: "x" will not do'),
    (T + "dtype: int8", 2, 8, 'dtype: "int8" will not do'),
    (T + "seed: -1", 2, 7, "seed: -1 will not do"),
    (T + f"seed: {2**63}", 2, 7, f"seed: {2**63} will not do"),
    (T + "name: a.b", 2, 7, 'name: "a.b" will not do'),
    (T + "name: 7", 2, 7, "name: 7 will not do"),
    (T + "name: adapters", 2, 7, "adapter name 'adapters' is taken"),
    (T + "exclude:\n  - b\n  - 3", 4, 5, "exclude: 3 will not do. Patterns of paths to leave out, as text in quotes."),
    (T + "exclude: [b, 're:[']", 2, 14, "pattern 're:[': not a regular expression"),
    ("targets: []", 1, 10, "targets: an empty list will not do"),
    ("targets: 3", 1, 10, "targets: 3 will not do"),
    ("targets: {pattern: a}", 1, 10, "targets: a mapping will not do"),
    ("targets:\n  - 0.1", 2, 5, "targets: 0.1 will not do. Patterns, each as text in quotes"),
    ("targets:\n  - [a]", 2, 5, "targets: a list will not do"),
    ("targets:\n  - pattern: 're:('", 2, 14, "pattern 're:(': not a regular expression: missing )"),
    ("targets: ['re:(']", 1, 11, "pattern 're:(': not a regular expression"),
    ("targets: [{pattern: a, rank: 0}]", 1, 30, "rank: 0 will not do"),
    ("targets: [{pattern: a, alpha: null}]", 1, 31, "alpha: null will not do"),
    ("targets: [{pattern: a, type: 3}]", 1, 30, "type: 3 will not do"),
    ("targets: [{pattern: a, adapter: blok, x: 1}]", 1, 33, "adapter 'blok' is not registered: did you mean 'block'?"),
    # Words that YAML readers disagree on.
    (T + "bias: on", 2, 7, "on is true or false to some YAML readers and text to others: write true or false"),
    (T + "bias: Yes", 2, 7, "Yes is true or false to some"),
    ("targets: [off]", 1, 11, "off is true or false to some"),
    (T + "description: no", 2, 14, "no is true or false to some"),
    (T + "rank: 010", 2, 7, "010 is not a plain decimal number: write one such as 16"),
    (T + "rank: 0x10", 2, 7, "0x10 is not a plain decimal number"),
    (T + "rank: 1_000", 2, 7, "1_000 is not a plain decimal number"),
    (T + "rank: 1:30", 2, 7, "1:30 is not a plain decimal number"),
    (T + "alpha: .inf", 2, 8, ".inf is not a plain decimal number"),
    (T + "alpha: .nan", 2, 8, ".nan is not a plain decimal number"),
    # YAML itself.
    ("", 1, 1, "is empty, and a recipe is a mapping with the key targets"),
    ("# nothing\n", 1, 1, "is empty"),
    ("- a", 1, 1, "holds a list, and a recipe is a mapping"),
    ("\nllama", 2, 1, 'holds "llama"'),
    ("targets: [*.q_proj]", 1, 12, 'a pattern that starts with * needs quotes, as in "*.q_proj"'),
    ("targets:\n  - *q_proj", 2, 5, "*q_proj is a YAML alias, which recipes do not take; a pattern that starts with *"),
    ('targets: ["re:.*\\.q"]', 1, 18, "a pattern with backslashes needs single quotes"),
    ("targets: &x [a]", 1, 10, "&x is a YAML anchor"),
    ("targets: !!str a", 1, 10, "is a YAML tag, which recipes do not take"),
    ("targets: ! a", 1, 10, "'!' is a YAML tag"),
    ("!!python/object/new:os.system [id]", 1, 1, "'tag:yaml.org,2002:python/object/new:os.system' is a YAML tag"),
    ("targets:\n\t- a", 2, 1, "indent with spaces instead of tabs"),
    ("a: b: c", 1, 5, "not YAML: mapping values are not allowed here"),
    ("targets: 'a", 1, 12, "not YAML: found unexpected end of stream"),
    ("targets: [a", 1, 12, "not YAML: expected ',' or ']'"),
    ("targets: a\n---\ntargets: b", 2, 1, "keep one recipe per file"),
    ("targets: a\n\n #\x07", 3, 3, "character U+0007 cannot be in a YAML file"),
    (b"targets: a\n\nname: caf\xe9\n", 3, 10, "not UTF-8 text"),
    (b"\xff\xfet\x00", 1, 1, "not UTF-8 text"),
    ("targets: a\r\nrnak: 8\r\n", 2, 1, "unknown key 'rnak'"),
    ("targets: " + "[" * 9 + "]" * 9, 1, 17, "lists and mappings nest deeper than 8 levels"),
]


@pytest.mark.parametrize(("text", "line", "column", "message"), BAD)
def test_a_mistake_is_reported_with_its_place_and_the_way_out(recipe, text, line, column, message):
    path = recipe(text)
    with pytest.raises(li.RecipeError) as caught:
        li.load_recipe(path)
    found = str(caught.value)
    assert found.startswith(f"{path}:{line}:{column}: ")
    assert message in found
    assert isinstance(caught.value, li.ConfigError)


def test_all_mistakes_are_reported_together_in_the_order_of_the_file(recipe):
    path = recipe("rank: 0\ntargets:\n- {pattern: a, rnak: 1}\n- {pattern: b, rank: 0}\nseed: x\nzzz: 1\n")
    with pytest.raises(li.RecipeError) as caught:
        li.load_recipe(path)
    head, *lines = str(caught.value).splitlines()
    assert head == f"{path}: several problems:"
    places = ["1:7: rank", "3:16: unknown key 'rnak'", "4:22: rank", "5:7: seed", "6:1: unknown key 'zzz'"]
    assert len(lines) == len(places)
    for line, place in zip(lines, places, strict=True):
        assert line.startswith(f"  {path}:{place}")


VALUES = [0, 1, 8, -1, 2**63, 0.5, 1.0, 8.0, -0.5, True, False, None, "", "8", "kaiming", "orthogonal", "balanced"]
VALUES += ["pointwise", "float32", "float16", "int8", [8], {}]


@pytest.mark.parametrize("option", [*SITE_OPTIONS, "freeze", "seed", "share_tied"])
def test_a_recipe_and_a_call_take_the_same_values(recipe, option):
    for value in VALUES:
        try:
            check_option(option, as_dtype(value) if option == "dtype" else value)
            fits = not isinstance(value, list | dict)
        except (li.ConfigError, TypeError):
            fits = False
        path = recipe(json.dumps({"targets": "a", option: value}))
        if fits:
            assert read(path)[1][option] == (as_dtype(value) if option == "dtype" else value)
        else:
            with pytest.raises(li.RecipeError, match=f": {option}: .* will not do"):
                li.load_recipe(path)


def test_a_recipe_adapts_a_whole_block_by_sizes(recipe):
    text = "rank: 2\ntargets: [{pattern: '1', adapter: block, in_features: 4, out_features: 6}]"
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6)))
    (site,) = li.inject(model, li.load_recipe(recipe(text)))
    assert site.adapter_class.kind == "block"
    assert site.layout["lora_A"] == (2, 4) and site.layout["lora_B"] == (6, 2)


def test_targets_override_and_the_last_that_matches_wins(recipe):
    text = """
        rank: 8
        alpha: 16
        exclude: "*.2"
        targets:
          - "body.*"
          - {pattern: "body.1", rank: 2}
          - {pattern: "re:body\\\\.[01]", alpha: 3}
    """
    model = nn.Module()
    model.body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    plan = li.plan(model, li.load_recipe(recipe(text)))
    sites = {site.path: (site.config.rank, site.config.alpha) for site in plan}
    assert sites == {"body.0": (8, 3.0), "body.1": (2, 3.0), "body.3": (8, 16.0)}
