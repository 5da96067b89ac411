"""Files that are meant to do harm, by name: each function writes one and returns the path to load.

Run as a program it loads them all into a small model and prints, per file, the error, the seconds and the growth of the
process in bytes: python tests/hostile.py FOLDER.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

import lora_inject as li

CASES: dict[str, Callable[[Path], Path]] = {}
MiB = 2**20


def case(function: Callable[[Path], Path]) -> Callable[[Path], Path]:
    CASES[function.__name__] = function
    return function


def framed(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def header(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


@case
def header_length_of_2_to_the_60(folder: Path) -> Path:
    return framed(folder / "a.safetensors", b"{}", length=2**60)


@case
def header_as_long_as_a_sparse_file_of_a_terabyte(folder: Path) -> Path:
    path = framed(folder / "a.safetensors", b"{}", length=2**40 - 8)
    os.truncate(path, 2**40)
    return path


@case
def header_of_100_megabytes(folder: Path) -> Path:
    return framed(folder / "a.safetensors", b'{"a":"' + b"x" * (100 * MiB) + b'"}')


@case
def deep_header(folder: Path) -> Path:
    return framed(folder / "a.safetensors", b'{"a":' * 200_000 + b"1" + b"}" * 200_000)


@case
def deep_list_in_the_metadata(folder: Path) -> Path:
    text = json.dumps({"__metadata__": {"format": "lora_inject", "format_version": "1", "adapter": "[" * 100_000}})
    return framed(folder / "a.safetensors", text.encode())


@case
def number_of_a_million_digits(folder: Path) -> Path:
    return framed(folder / "a.safetensors", b'{"a":' + b"9" * 1_000_000 + b"}")


@case
def a_hundred_thousand_tensors(folder: Path) -> Path:
    tensors = {f"model.layers.{i}.q_proj.lora_A": entry([0], 0, 0) for i in range(100_000)}
    return framed(folder / "a.safetensors", header(**tensors))


@case
def overlapping_offsets(folder: Path) -> Path:
    return framed(folder / "a.safetensors", header(a=entry([4], 0, 16), b=entry([4], 8, 24)), bytes(24))


@case
def offsets_behind_the_end(folder: Path) -> Path:
    return framed(folder / "a.safetensors", header(a=entry([2**40], 0, 2**42)), bytes(16))


@case
def shape_whose_product_overflows(folder: Path) -> Path:
    return framed(folder / "a.safetensors", header(a=entry([2**33, 2**33], 0, 16)), bytes(16))


@case
def shape_that_is_zero_times_huge(folder: Path) -> Path:
    return framed(folder / "a.safetensors", header(a=entry([0, 2**62], 0, 0)))


@case
def duplicate_keys(folder: Path) -> Path:
    one = json.dumps(entry([4], 0, 16))
    return framed(folder / "a.safetensors", f'{{"a":{one},"a":{one}}}'.encode(), bytes(16))


@case
def a_pickle_called_safetensors(folder: Path) -> Path:
    path = folder / "a.safetensors"
    path.write_bytes(pickle.dumps(Harm(folder / "ran")))
    return path


@case
def a_pickle_in_a_peft_folder(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Harm(folder / "ran")))
    return folder


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def peft(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    """Writes a PEFT folder for the model's one linear layer, with parts of it replaced."""
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj"], "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(given))
    pair = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(6, 2)}
    held = {f"base_model.model.proj.{name}": tensor for name, tensor in pair.items()} if tensors is None else tensors
    (folder / "adapter_model.safetensors").write_bytes(save(held))
    return folder


@case
def peft_of_another_kind(folder: Path) -> Path:
    return peft(folder, peft_type="PREFIX_TUNING")


@case
def peft_that_asks_for_code(folder: Path) -> Path:
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(folder / 'ran')!r}).touch()")
    auto = {"base_model_class": "Evil", "parent_library": "evil", "trust_remote_code": True}
    return peft(folder, auto_mapping=auto, peft_type="evil.Evil")


@case
def peft_with_a_pattern_that_backtracks_for_ever(folder: Path) -> Path:
    name = "base_model.model." + "a" * 60 + "!"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(6, 2)}
    return peft(folder, tensors, alpha_pattern={"(a+)+$": 4}, rank_pattern={"(a|aa)+$": 2}, target_modules="(a+)+$")


@case
def peft_with_paths_out_of_the_folder(folder: Path) -> Path:
    tensors = {f"base_model.model.../../x.{name}.weight": torch.ones(2, 2) for name in ("lora_A", "lora_B")}
    return peft(folder, tensors)


@case
def rank_of_a_million(folder: Path) -> Path:
    tensors = {
        "base_model.model.proj.lora_A.weight": torch.ones(1_000_000, 0),
        "base_model.model.proj.lora_B.weight": torch.ones(0, 1_000_000),
    }
    return peft(folder, tensors, r=1_000_000)


@case
def rank_of_a_million_in_the_config_alone(folder: Path) -> Path:
    return peft(folder, r=1_000_000)


@case
def values_that_are_not_finite(folder: Path) -> Path:
    tensors = {
        "base_model.model.proj.lora_A.weight": torch.full((2, 8), torch.nan),
        "base_model.model.proj.lora_B.weight": torch.full((6, 2), torch.inf),
    }
    return peft(folder, tensors)


@case
def a_config_of_a_gigabyte(folder: Path) -> Path:
    peft(folder)
    os.truncate(folder / "adapter_config.json", 2**30)
    return folder


@case
def a_folder_of_links_to_elsewhere(folder: Path) -> Path:
    (folder / "adapter_config.json").symlink_to("/dev/zero")
    (folder / "adapter_model.safetensors").symlink_to("/dev/zero")
    return folder


@case
def gguf_with_counts_of_2_to_the_60(folder: Path) -> Path:
    path = folder / "a.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (2**60).to_bytes(8, "little") * 2 + bytes(64))
    return path


@case
def gguf_with_a_string_of_2_to_the_62(folder: Path) -> Path:
    path = folder / "a.gguf"
    counts = (1).to_bytes(8, "little") * 2
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + counts + (2**62).to_bytes(8, "little") + bytes(64))
    return path


@case
def a_named_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.safetensors")
    return folder / "a.safetensors"


@case
def a_device_that_never_ends(folder: Path) -> Path:
    return Path("/dev/zero")


@case
def a_folder_whose_config_is_a_named_pipe(folder: Path) -> Path:
    peft(folder)
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    return folder


@case
def alpha_that_no_float_holds(folder: Path) -> Path:
    return peft(folder, lora_alpha=10**400)


@case
def alpha_of_one_layer_that_no_float_holds(folder: Path) -> Path:
    return peft(folder, alpha_pattern={"proj": -(10**400)})


@case
def dropout_that_no_float_holds(folder: Path) -> Path:
    return peft(folder, lora_dropout=10**400)


@case
def our_own_alpha_that_no_float_holds(folder: Path) -> Path:
    path = folder / "a.safetensors"
    path.write_bytes((folder.parent / "warm.safetensors").read_bytes())
    length = int.from_bytes(path.read_bytes()[:8], "little")
    text = path.read_bytes()[8 : 8 + length]
    changed = text.replace(rb"\"alpha\": null", rb"\"alpha\": 1" + b"0" * 400)
    assert changed != text
    return framed(path, changed, path.read_bytes()[8 + length :])


def sparse(path: Path, **shapes: list[int]) -> Path:
    """Writes tensors of zeros that take no place on the disk, by names with "__" for the dot."""
    entries, place = {}, 0
    for name, shape in shapes.items():
        end = place + 4 * math.prod(shape)
        entries[name.replace("__", ".")] = entry(shape, place, end)
        place = end
    framed(path, header(**entries))
    os.truncate(path, path.stat().st_size + place)
    return path


HUGE = 2**26


@case
def peft_with_a_factor_far_larger_than_the_model(folder: Path) -> Path:
    peft(folder)
    pair = {"lora_A__weight": [2, HUGE], "lora_B__weight": [6, 2]}
    prefix = "base_model__model__proj__"
    sparse(folder / "adapter_model.safetensors", **{prefix + name: shape for name, shape in pair.items()})
    return folder


@case
def peft_with_many_layers_that_the_model_lacks(folder: Path) -> Path:
    peft(folder)
    pair = {"lora_A__weight": [2, 2**19], "lora_B__weight": [6, 2]}
    names = {f"base_model__model__m{i}__proj__{name}": shape for i in range(64) for name, shape in pair.items()}
    sparse(folder / "adapter_model.safetensors", **names)
    return folder


@case
def peft_with_tensors_of_a_rank_of_a_million(folder: Path) -> Path:
    peft(folder, r=1_000_000)
    prefix = "base_model__model__proj__"
    pair = {prefix + "lora_A__weight": [1_000_000, 8], prefix + "lora_B__weight": [6, 1_000_000]}
    sparse(folder / "adapter_model.safetensors", **pair)
    return folder


@case
def peft_with_a_whole_module_far_larger_than_the_model(folder: Path) -> Path:
    peft(folder, modules_to_save=["proj"])
    sparse(folder / "adapter_model.safetensors", base_model__model__proj__weight=[HUGE, 8])
    return folder


@case
def kohya_with_a_factor_far_larger_than_the_model(folder: Path) -> Path:
    pair = {"lora_unet_proj__lora_down__weight": [2, HUGE], "lora_unet_proj__lora_up__weight": [6, 2]}
    return sparse(folder / "a.safetensors", **pair)


@case
def kohya_with_an_alpha_of_many_numbers(folder: Path) -> Path:
    pair = {"lora_unet_proj__lora_down__weight": [2, 8], "lora_unet_proj__lora_up__weight": [6, 2]}
    return sparse(folder / "a.safetensors", **pair, lora_unet_proj__alpha=[HUGE])


@case
def kohya_with_an_update_far_larger_than_the_model(folder: Path) -> Path:
    return sparse(folder / "a.safetensors", lora_unet_proj__diff=[HUGE, 8])


@case
def kohya_with_a_tucker_core_far_larger_than_the_model(folder: Path) -> Path:
    parts = {"down": [4000, 8, 1, 1], "mid": [4000, 4000, 3, 3], "up": [6, 4000, 1, 1]}
    names = {f"lora_unet_proj__lora_{part}__weight": shape for part, shape in parts.items()}
    return sparse(folder / "a.safetensors", **names)


@case
def diffusers_with_a_factor_far_larger_than_the_model(folder: Path) -> Path:
    pair = {"unet__proj__lora_A__weight": [2, HUGE], "unet__proj__lora_B__weight": [6, 2]}
    return sparse(folder / "a.safetensors", **pair)


@case
def mlx_with_a_factor_far_larger_than_the_model(folder: Path) -> Path:
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    sparse(folder / "adapters.safetensors", proj__lora_a=[HUGE, 2], proj__lora_b=[2, 6])
    return folder


@case
def peft_with_a_hundred_thousand_patterns(folder: Path) -> Path:
    return peft(folder, rank_pattern={f"m{i}": 3 for i in range(100_000)} | {"proj": 4})


@case
def peft_with_a_hundred_thousand_expressions(folder: Path) -> Path:
    return peft(folder, rank_pattern={f"m{i}|n": 3 for i in range(100_000)})


@case
def gguf_with_arrays_of_empty_strings(folder: Path) -> Path:
    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little")

    path = folder / "a.gguf"
    array = number(9, 4) + number(8, 4) + number(2**16, 8) + bytes(8 * 2**16)
    fields = b"".join(number(1, 8) + bytes([65 + i]) + array for i in range(15))
    path.write_bytes(b"GGUF" + number(3, 4) + number(1, 8) + number(15, 8) + fields + bytes(64))
    return path


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 6)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    model = Model()
    li.inject(model, "proj", rank=2)
    li.export(model, root / "warm.safetensors")
    li.uninject(model)
    li.load(model, root / "warm.safetensors")
    li.uninject(model)
    for name, make in CASES.items():
        folder = root / name
        folder.mkdir()
        path = make(folder)
        files = sorted(p.name for p in folder.iterdir())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, error = time.process_time(), "loaded"
        try:
            li.load(model, path)
        except li.LoraInjectError as problem:
            error = f"{type(problem).__name__}: {problem}"
        except BaseException as problem:
            error = f"!{type(problem).__name__}: {problem}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        whole = type(model.proj) is nn.Linear and files == sorted(p.name for p in folder.iterdir())
        print(json.dumps([name, error[:2000], time.process_time() - began, grown, whole]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
