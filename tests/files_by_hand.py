"""Adapter files made by hand, without a model, and their updates in float64."""

from __future__ import annotations

import json

import torch
from reference import scaling, update_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

OPTIONS = {"dropout": 0.0, "bias": False, "rslora": False, "dense": False, "init": "kaiming"}


def linear_site(rows: int, columns: int, rank: int, seed: int = 0, dtype=torch.float32, **options) -> dict:
    """Returns a site of kind linear with random factors; options go into its metadata."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, columns, generator=generator).to(dtype)
    b = torch.randn(rows, rank, generator=generator).to(dtype)
    return {"shape": [rows, columns], "rank": rank, "tensors": {"lora_A": a, "lora_B": b}, "dtype": dtype} | options


def write_file(path, sites: dict[str, dict]):
    """Writes sites as the documentation of the format says, with no code of the package."""
    listed, bases, tensors = [], {}, {}
    for where, site in sites.items():
        own = {key: site.get(key, value) for key, value in OPTIONS.items()}
        listed.append(
            {
                "path": where,
                "aliases": site.get("aliases", []),
                "adapter": site.get("adapter", "linear"),
                "rank": site["rank"],
                "alpha": site.get("alpha"),
                "factorization": site.get("factorization", "pointwise"),
                "dtype": str(site["dtype"]).removeprefix("torch."),
                "options": site.get("options", {}),
            }
            | own
        )
        bases[where] = {"shape": site["shape"], "hash": site.get("hash", "00")}
        tensors |= {f"{where}.{key}": tensor.contiguous() for key, tensor in site["tensors"].items()}
    metadata = {"format": "lora_inject", "format_version": "1", "lora_inject_version": "0"}
    metadata |= {"adapter": json.dumps({"name": "default", "sites": listed}), "base": json.dumps({"sites": bases})}
    save_file(tensors, path, metadata)
    return path


def read_file(path) -> dict[str, dict]:
    """Returns the sites of a file by path: metadata, and tensors under "tensors"."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        listed = json.loads(file.metadata()["adapter"])["sites"]
        bases = json.loads(file.metadata()["base"])["sites"]
    found = {}
    for site in listed:
        prefix = f"{site['path']}."
        own = {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.rpartition(".")[0] == site["path"]
        }
        found[site["path"]] = site | bases[site["path"]] | {"tensors": own}
    return found


def strength_of(site: dict) -> float:
    return scaling(site["rank"], site.get("alpha"), site.get("rslora", False))


def update_in(site: dict, base=None, absolute: bool = False) -> dict[str, Tensor]:
    """Returns the updates that a site makes, in float64 and by hand; of absolute values for bounds of rounding."""
    tensors = {name: tensor.double() for name, tensor in site["tensors"].items()}
    if absolute:
        tensors = {name: tensor.abs() for name, tensor in tensors.items()}
    return update_of(site.get("adapter", "linear"), base, tensors, strength_of(site))
