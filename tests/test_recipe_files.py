"""Files of recipes: found by path or by preset, hostile ones refused, and the schema that describes them."""

import json
import os
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_inject as li
from lora_inject import recipe_file
from lora_inject.config import SITE_OPTIONS
from lora_inject.recipe_schema import RecipeKeys, TargetKeys, json_schema

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
K = 1024


@pytest.fixture
def recipe(tmp_path):
    """Writes a text to a recipe's file and returns its path."""

    def write(text):
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def patterns(path):
    return [target.pattern for target in li.load_recipe(path).targets]


LAUGHS = "a: &a [x,x,x]\n" + "".join(f"{k}: &{k} [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n" for k in "bcdefghij")
HOSTILE = [
    "[" * 32 * K,
    "{" * 32 * K,
    "- " * 16 * K,
    "? " * 16 * K,
    LAUGHS,
    "targets: [" + "a," * 15 * K + "1]",
    "k: 1\n" * 6 * K,
    "".join(f"k{i}: 1\n" for i in range(3 * K)),
    "targets: [" + "{pattern: a, b: 1}," * 1600 + "]",
    "rank: " + "9" * 32_000,
    f'"{"k" * 32_000}": 1',
    "k: " + "'" * 32_000,
    "targets: a\nrank: 8\n" * 100 * K,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12].strip())
def test_hostile_files_are_refused_quickly(recipe, text):
    path = recipe(text)
    start = time.process_time()
    with pytest.raises(li.RecipeError) as caught:
        li.load_recipe(path)
    # Half a second on an idle core.
    assert time.process_time() - start < 4
    assert len(str(caught.value)) < 6_000


@pytest.mark.parametrize("text", [HOSTILE[0], LAUGHS, HOSTILE[-1]], ids=["nested", "laughs", "large"])
def test_hostile_files_are_refused_in_little_memory(recipe, text):
    path = recipe(text)
    tracemalloc.start()
    with pytest.raises(li.RecipeError):
        li.load_recipe(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * K * K


def test_nothing_in_a_recipe_is_executed(recipe, tmp_path):
    mark = tmp_path / "made"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"):
        with pytest.raises(li.RecipeError, match="YAML tag"):
            li.load_recipe(recipe(f"targets: {tag} ['{mark}']"))
    assert not mark.exists()


@given(st.one_of(st.text(st.sampled_from("targesrnk:-[]{}\"'*&!|>#%@,.~ \t\n0179eé\x00"), max_size=60), st.binary()))
def test_any_bytes_give_a_recipe_or_a_recipe_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        assert isinstance(li.load_recipe(path), li.Recipe)
    except li.RecipeError as error:
        assert str(error).startswith(str(path))


def test_a_path_is_text_with_a_slash_or_an_ending_or_a_path(recipe, tmp_path, monkeypatch):
    path = recipe("targets: a")
    (tmp_path / "plain").write_bytes(path.read_bytes())
    (tmp_path / "r.YML").write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    for given_path in (path, str(path), "r.yaml", "r.YML", "./plain", Path("plain")):
        assert patterns(given_path) == ["a"]
    with pytest.raises(li.RecipeError, match=r"no preset is named 'plain'.*write a path with a slash"):
        li.load_recipe("plain")


def test_what_is_not_a_readable_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(li.RecipeError, match=r"nowhere\.yaml: no such file"):
        li.load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(li.RecipeError, match="not a file"):
        li.load_recipe(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(li.RecipeError, match="not a file"):
        li.load_recipe(tmp_path / "pipe.yaml")
    for nothing in (None, 3, b"llama", ["llama"]):
        with pytest.raises(li.RecipeError, match="give a path, or the name of a preset"):
            li.load_recipe(nothing)
    for odd in ("", "a\0.yaml", "\0", "x" * 9000, "/" + "x" * 9000):
        with pytest.raises(li.RecipeError):
            li.load_recipe(odd)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.yaml").write_text("targets: a")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(li.RecipeError, match=r"secret\.yaml: cannot be read: Permission denied"):
        li.load_recipe(tmp_path / "secret.yaml")


def test_the_size_limit_is_exact(recipe):
    text = "targets: a\n#"
    assert li.load_recipe(recipe(text.ljust(recipe_file.LIMIT, "#")))
    with pytest.raises(li.RecipeError, match=r"r\.yaml: larger than 32 KiB"):
        li.load_recipe(recipe(text.ljust(recipe_file.LIMIT + 1, "#")))


@pytest.mark.parametrize(
    ("name", "near"), [("lama", "'llama'"), ("GPT2", "'gpt2'"), ("stable_unet", "'sd_unet'"), ("mixtrall", "'mixtral'")]
)
def test_an_unknown_preset_names_the_nearest_and_all(name, near):
    with pytest.raises(li.RecipeError) as caught:
        li.load_recipe(name)
    message = str(caught.value)
    assert re.search(rf"no preset is named '{name}': did you mean .*{near}", message)
    for known in ("llama", "mistral", "qwen", "gemma", "phi", "gpt2", "gpt_neox", "bert", "roberta", "distilbert"):
        assert known in message
    for known in ("t5", "bart", "vit", "whisper", "wav2vec2", "clip", "mixtral", "sd_unet"):
        assert known in message


def test_a_preset_and_its_file_are_the_same_recipe(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    seven = [f"*.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert patterns("llama") == patterns("configs/llama.yaml") == patterns(CONFIGS / "llama.yaml") == seven


def test_an_installed_package_has_its_presets_inside(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "lora_inject"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "mine.yaml").write_text("targets: a")
    (package / "configs" / "recipe.schema.json").write_text("{}")
    (package.parent / "configs").mkdir()
    (package.parent / "configs" / "other.yaml").write_text("targets: b")
    monkeypatch.setattr(recipe_file, "__file__", str(package / "recipe_file.py"))
    assert list(recipe_file.presets()) == ["mine"]
    assert patterns("mine") == ["a"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_described_and_points_editors_to_the_schema(path):
    assert li.load_recipe(path).description.strip().endswith(".")
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert path.stem == path.stem.lower()
    assert re.fullmatch(r"[a-z0-9_]+", path.stem)


def test_the_committed_schema_is_up_to_date():
    committed = (CONFIGS / "recipe.schema.json").read_text(encoding="utf-8")
    assert committed == json_schema(), "run python -m lora_inject.recipe_schema > configs/recipe.schema.json"


def test_the_schema_says_what_the_reader_takes():
    schema = json.loads(json_schema())
    target = schema["$defs"]["TargetKeys"]
    rest = {"name", "description", "targets", "exclude", "freeze", "seed", "share_tied"}
    assert set(schema["properties"]) == {*SITE_OPTIONS} | rest
    assert set(target["properties"]) == {*SITE_OPTIONS, "pattern", "type", "adapter"}
    assert schema["additionalProperties"] is False
    assert set(target["else"]["propertyNames"]["enum"]) == set(target["properties"])
    assert schema["required"] == ["targets"] and target["required"] == ["pattern"]
    assert not any("default" in entry for part in (schema, target) for entry in part["properties"].values())
    assert all(field.description for model in (RecipeKeys, TargetKeys) for field in model.model_fields.values())
