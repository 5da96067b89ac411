"""Adapter files: what they hold, what is refused and why, and that a failure leaves model and file as they were."""

from __future__ import annotations

import errno
import json
import os
import struct

import pytest
import torch
from models import TOKENS, Text, fill, text
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from snapshot import assert_same, raw, snapshot
from torch import nn

import lora_inject as li


def trained(base: torch.dtype = torch.float32, **options) -> Text:
    model = text(dtype=base).eval()
    li.inject(model, ["up", "down", "embed"], rank=2, alpha=3, seed=0, **options)
    fill(model)
    return model


@pytest.fixture
def path(tmp_path):
    return li.export(trained(), tmp_path / "adapter.safetensors")


def rewrite(path, change) -> None:
    """Saves the file anew after a change of its tensors and metadata."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def edit(metadata: dict[str, str], key: str, change) -> None:
    value = json.loads(metadata[key])
    change(value)
    metadata[key] = json.dumps(value)


def refused(path, kind=li.LoraInjectError, match: str | None = None, **options) -> str:
    """Asserts that loading is refused, names the file, and changes nothing; returns the message."""
    model = text().eval()
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(kind, match=match) as caught:
        li.load(model, path, **options)
    assert_same(before, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_the_file_holds_the_tensors_and_the_metadata_of_version_1(path):
    with safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert shapes == {
        "embed.lora_A": (2, 8),
        "embed.lora_B": (11, 2),
        "up.lora_A": (2, 8),
        "up.lora_B": (16, 2),
        "down.lora_A": (2, 16),
        "down.lora_B": (8, 2),
    }
    assert metadata["format"] == "lora_inject" and metadata["format_version"] == "1"
    assert metadata["lora_inject_version"] == li.__version__
    adapter = json.loads(metadata["adapter"])
    assert adapter["name"] == "default"
    assert {site["path"]: (site["adapter"], site["rank"], site["alpha"]) for site in adapter["sites"]} == {
        "embed": ("embedding", 2, 3),
        "up": ("linear", 2, 3),
        "down": ("linear", 2, 3),
    }
    assert "base" in metadata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"rslora": True, "dropout": 0.2}, {"dtype": torch.bfloat16}])
def test_load_gives_the_same_model_again(tmp_path, dtype, options):
    model = trained(dtype, **options)
    path = li.export(model, tmp_path / "a.safetensors")
    fresh = text(dtype=dtype).eval()
    plan = li.load(fresh, path)
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    assert {k: raw(v) for k, v in fresh.state_dict().items()} == {k: raw(v) for k, v in model.state_dict().items()}
    assert [site.path for site in plan] == ["embed", "up", "down"]
    assert [ref.adapter.config for ref in li.adapters(fresh)] == [ref.adapter.config for ref in li.adapters(model)]
    assert not any(p.requires_grad for k, p in fresh.named_parameters() if ".adapters." not in k)


def contents(path) -> tuple[dict[str, bytes], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: raw(tensor) for key, tensor in load_file(path).items()}, file.metadata()


def test_exporting_twice_and_again_after_loading_gives_the_same_contents(tmp_path):
    model, fresh = trained(), text()
    paths = [li.export(model, tmp_path / name) for name in "ab"]
    li.load(fresh, paths[0])
    paths.append(li.export(fresh, tmp_path / "c"))
    first, *others = map(contents, paths)
    assert others == [first, first]


def test_load_leaves_training_flags_and_other_adapters_alone(path):
    model = text()
    model.up.eval()
    li.inject(model, ["up", "head"], name="other", rank=3)
    fill(model)
    other = {k: raw(v) for k, v in li.adapter_state(model, "other").items()}
    li.load(model, path)
    assert {k: raw(v) for k, v in li.adapter_state(model, "other").items()} == other
    assert not model.up.training and not model.up.adapters["default"].training and model.down.training


def test_a_file_can_be_loaded_under_another_name_and_twice(path):
    model = text()
    li.load(model, path, "one")
    li.load(model, path, "two")
    assert {ref.name for ref in li.adapters(model)} == {"one", "two"}
    with pytest.raises(li.StateError, match="one"):
        li.load(model, path, "one")
    with pytest.raises(li.ConfigError, match="name"):
        li.load(model, path, "not.legal")


def test_exporting_while_merged_disabled_or_scaled_gives_the_same_file(tmp_path):
    model = trained()
    wanted = contents(li.export(model, tmp_path / "plain"))
    with li.disabled(model), li.scaled(model, 3.0):
        assert contents(li.export(model, tmp_path / "inside")) == wanted
    li.merge(model)
    path = li.export(model, tmp_path / "merged")
    assert contents(path) == wanted, "the fingerprint is that of the original base"
    li.load(text(), path)


def test_a_float32_and_a_bfloat16_copy_of_one_base_agree(tmp_path):
    path = li.export(trained(torch.float32), tmp_path / "a")
    half = text(dtype=torch.bfloat16)
    li.load(half, path)
    other = li.export(trained(torch.bfloat16), tmp_path / "b")
    li.load(text(), other)


def test_another_base_is_refused_by_the_names_of_its_sites(path, tmp_path):
    model = text()
    with torch.no_grad():
        model.up.weight.mul_(1.5)
        model.norm.weight.mul_(2)
    before = snapshot(model)
    with pytest.raises(li.MismatchError, match="check_base=False") as caught:
        li.load(model, path)
    assert "up" in str(caught.value) and "down" not in str(caught.value)
    assert_same(before, model)
    li.load(model, path, check_base=False)


def test_every_single_changed_sample_is_seen_where_all_elements_are_sampled(tmp_path):
    layer = nn.Linear(8, 8, bias=False)
    li.inject(layer, "")
    path = li.export(layer, tmp_path / "a")
    for i in range(64):
        other = nn.Linear(8, 8, bias=False)
        other.weight.data = layer._parameters["weight"].detach().clone()
        other.weight.data.view(-1)[i] += 1
        with pytest.raises(li.MismatchError):
            li.load(other, path)


def test_the_root_and_shared_modules_have_keys_that_load_again(tmp_path):
    layer = nn.Linear(3, 3)
    li.inject(layer, "")
    path = li.export(layer, tmp_path / "root")
    assert set(load_file(path)) == {"lora_A", "lora_B"}
    twin = nn.Linear(3, 3)
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if "adapters" not in k})
    li.load(twin, path)

    shared = nn.ModuleDict({"one": nn.Linear(3, 3)})
    shared["two"] = shared["one"]
    li.inject(shared, "two")
    path = li.export(shared, tmp_path / "shared")
    assert set(load_file(path)) == {"one.lora_A", "one.lora_B"}
    renamed = nn.ModuleDict({"two": shared["one"]})
    li.uninject(shared)
    li.load(renamed, path)
    assert [ref.path for ref in li.adapters(renamed)] == ["two"]


def test_a_file_cut_anywhere_is_refused(path):
    whole = path.read_bytes()
    for size in sorted({0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1}):
        path.write_bytes(whole[:size])
        refused(path, li.FormatError)
    path.write_bytes(whole + b"\0")
    refused(path, li.FormatError)
    path.unlink()
    refused(path, li.FormatError)
    path.mkdir()
    refused(path, li.FormatError)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04" + bytes(60),
        b"\x80\x02}q\x00.",
        b"GGUF" + bytes(60),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 2) + b"\xff\xfe",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
    ids=["zip", "pickle", "gguf", "huge-header", "list", "not-json", "not-utf8", "deep"],
)
def test_files_of_another_format_are_refused(path, content):
    path.write_bytes(content)
    refused(path, li.FormatError)


def with_header(path, text_: str) -> None:
    header = text_.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', "twice"),
        ('{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', "twice"),
        ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', "does not fill"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,80]}}', "does not fill"),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', "shape"),
        ('{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}', "dtype"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "gap"),
        ('{"__metadata__":{"format":3},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "metadata"),
    ],
)
def test_headers_that_contradict_themselves(path, header, why):
    with_header(path, header)
    refused(path, li.FormatError, why)


def test_tensors_without_our_metadata_are_another_format(path):
    save_file(load_file(path), path)
    refused(path, li.FormatError, "not an adapter of a known format")


def test_tensors_that_are_missing_unexpected_or_mis_shaped_are_all_listed(path):
    def change(tensors, metadata):
        del tensors["up.lora_A"]
        tensors["down.lora_C"] = torch.zeros(2)
        tensors["embed.lora_B"] = torch.zeros(12, 2)

    rewrite(path, change)
    message = refused(path, li.MismatchError)
    for key in ("up.lora_A", "down.lora_C", "embed.lora_B"):
        assert key in message
    refused(path, li.MismatchError, strict=False)


def test_tensors_of_no_site_are_refused(path):
    rewrite(path, lambda tensors, metadata: tensors.update({"head.lora_A": torch.zeros(2, 8)}))
    assert "head" in refused(path)
    refused(path, strict=False)


def test_a_site_that_the_model_lacks_is_an_error_and_strict_false_leaves_it_out(path):
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            made = text()
            self.up, self.dwn = made.up, made.down

    with pytest.raises(li.MismatchError, match=r"down \(nearest: dwn") as caught:
        li.load(Short(), path)
    assert "embed" in str(caught.value)
    model = Short()
    assert [site.path for site in li.load(model, path, strict=False)] == ["up"]


def test_not_one_site_in_the_model_is_an_error_however_loose(path):
    with pytest.raises(li.MismatchError):
        li.load(nn.ModuleDict({"other": nn.Linear(8, 16)}), path, strict=False)


def test_a_model_of_another_size_is_an_error_that_names_shapes(path):
    model = text()
    model.up = nn.Linear(8, 20)
    with pytest.raises(li.MismatchError, match=r"up\.lora_B.*16.*20"):
        li.load(model, path, check_base=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(path, value):
    rewrite(path, lambda tensors, metadata: tensors["up.lora_B"].__setitem__((3, 1), value))
    assert "up.lora_B" in refused(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float64])
def test_tensors_of_another_dtype_are_refused(path, dtype):
    rewrite(path, lambda tensors, metadata: tensors.update({"up.lora_B": tensors["up.lora_B"].to(dtype)}))
    assert "up.lora_B" in refused(path)


CHANGES = {
    "no-version": lambda m: m.pop("format_version"),
    "later-version": lambda m: m.update(format_version="2"),
    "odd-version": lambda m: m.update(format_version="1.0"),
    "no-format": lambda m: m.pop("format"),
    "no-adapter": lambda m: m.pop("adapter"),
    "no-base": lambda m: m.pop("base"),
    "adapter-not-json": lambda m: m.update(adapter="{"),
    "adapter-twice": lambda m: m.update(adapter=m["adapter"].replace('{"name"', '{"name": "x", "name"', 1)),
    "adapter-nan": lambda m: m.update(adapter=m["adapter"].replace('"alpha": 3', '"alpha": NaN', 1)),
    "bad-name": lambda m: edit(m, "adapter", lambda v: v.update(name="a.b")),
    "name-number": lambda m: edit(m, "adapter", lambda v: v.update(name=3)),
    "no-sites": lambda m: edit(m, "adapter", lambda v: v.update(sites=[])),
    "site-twice": lambda m: edit(m, "adapter", lambda v: v["sites"].append(v["sites"][0])),
    "site-missing": lambda m: edit(m, "adapter", lambda v: v["sites"].pop()),
    "site-extra-key": lambda m: edit(m, "adapter", lambda v: v["sites"][0].update(more=1)),
    "site-no-rank": lambda m: edit(m, "adapter", lambda v: v["sites"][0].pop("rank")),
    "rank-contradicts": lambda m: edit(m, "adapter", lambda v: v["sites"][0].update(rank=3)),
    "rank-zero": lambda m: edit(m, "adapter", lambda v: v["sites"][0].update(rank=0)),
    "rank-huge": lambda m: edit(m, "adapter", lambda v: v["sites"][0].update(rank=10**15)),
    "alpha-text": lambda m: edit(m, "adapter", lambda v: v["sites"][0].update(alpha="3")),
    "dtype-unknown": lambda m: edit(m, "adapter", lambda v: v["sites"][0].update(dtype="float8")),
    "kind-unknown": lambda m: edit(m, "adapter", lambda v: v["sites"][0].update(adapter="liner")),
    "kind-wrong": lambda m: edit(m, "adapter", lambda v: v["sites"][0].update(adapter="conv")),
    "options-unknown": lambda m: edit(m, "adapter", lambda v: v["sites"][0].update(options={"x": 1})),
    "init-unknown": lambda m: edit(m, "adapter", lambda v: v["sites"][0].update(init="pissa")),
    "base-missing-site": lambda m: edit(m, "base", lambda v: v["sites"].pop("up")),
    "base-odd": lambda m: edit(m, "base", lambda v: v["sites"].update(up=3)),
    "base-list": lambda m: m.update(base="[]"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_metadata_that_are_wrong_in_one_place_are_refused(path, change):
    rewrite(path, lambda tensors, metadata: change(metadata))
    refused(path, li.FormatError)


def test_nothing_is_unpickled(path, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    torch.save({"up.lora_A": Bomb()}, path)
    refused(path, li.FormatError)
    assert not tmp_path.joinpath("exploded").exists()


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_file_and_no_other(path, monkeypatch, step):
    old, model = path.read_bytes(), trained(bias=True)
    before = snapshot(model)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(li.LoraInjectError, match=r"adapter\.safetensors.*No space left on device"):
        li.export(model, path)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]
    assert_same(before, model)


def test_ctrl_c_while_writing_leaves_the_old_file_and_no_other(path, monkeypatch):
    old = path.read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        li.export(trained(bias=True), path)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(li.LoraInjectError, match="nowhere"):
        li.export(trained(), tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(li.LoraInjectError, match="cannot be written"):
        li.export(trained(), tmp_path)


@pytest.mark.parametrize("format", ["lora_inject", "peft"])
@pytest.mark.parametrize("name", ["", ".", "..", "/", "file/x", "a" * 250, "a" * 300, "a\0b", "loop", "none/x"])
def test_paths_that_cannot_be_written_are_errors_that_name_them(name, format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(li.FormatError, match="cannot be written") as error:
        li.export(trained(), name, format=format)
    assert str(name) in str(error.value) or repr(name) in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["file/x", "a" * 300, "a\0b"])
def test_converting_and_adding_to_such_paths_name_them_too(name, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    (path.parent / "file").write_text("mine")
    for write in (lambda: li.convert(path, name, "lora_inject"), lambda: li.add([path], name)):
        with pytest.raises(li.FormatError, match="cannot be written") as error:
            write()
        assert str(name) in str(error.value) or repr(name) in str(error.value)
    assert sorted(os.listdir(path.parent)) == [path.name, "file"]


@pytest.mark.parametrize("name", ["", "gone", "file/x", "a" * 300, "a\0b", "loop"])
def test_paths_that_cannot_be_read_are_errors_that_name_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(li.FormatError) as error:
        li.load(text(), name)
    assert name in str(error.value)


def test_a_link_is_kept_and_what_it_leads_to_is_replaced(path, tmp_path):
    link, folder = tmp_path / "link.safetensors", tmp_path / "elsewhere"
    folder.mkdir()
    target = path.rename(folder / "kept.safetensors")
    link.symlink_to(target)
    li.export(trained(bias=True), link)
    assert link.is_symlink() and not target.is_symlink()
    assert "up.lora_A_bias" in load_file(target)
    assert os.listdir(folder) == [target.name] and sorted(os.listdir(tmp_path)) == ["elsewhere", link.name]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_kept_and_the_folder_is_replaced(there, tmp_path):
    link, folder = tmp_path / "link", tmp_path / "inner" / "folder"
    folder.parent.mkdir()
    link.symlink_to(folder)
    if there:
        li.export(trained(), folder, format="peft")
    li.export(trained(rslora=True), link, format="peft")
    assert link.is_symlink() and folder.is_dir() and not folder.is_symlink()
    assert json.loads((folder / "adapter_config.json").read_text())["use_rslora"]
    assert os.listdir(folder.parent) == ["folder"] and sorted(os.listdir(tmp_path)) == ["inner", "link"]
    li.load(text(), link)


def test_paths_may_be_text_and_the_final_path_comes_back(tmp_path):
    path = li.export(trained(), str(tmp_path / "näme.safetensors"))
    assert path.is_file()
    li.load(text(), str(path))


def test_meta_adapters_cannot_be_exported(tmp_path):
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    li.inject(model, "")
    with pytest.raises(li.LoraInjectError, match="meta"):
        li.export(model, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []
