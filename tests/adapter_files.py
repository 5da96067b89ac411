"""Adapter files of any size and content, written without a model."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from lora_inject.adapter_file import SiteRecord, metadata
from lora_inject.config import SiteConfig


def write_adapter(path, factors, alpha=None, kind="linear", extras=None, fingerprint="0" * 16):
    """Writes a file with these {path: (A, B)}; returns its path."""
    records, tensors = [], {}
    for site, (a, b) in factors.items():
        rank = a.shape[-2] if extras else a.shape[0]
        config = SiteConfig(rank=rank, alpha=alpha, dtype=torch.float32)
        base = {"shape": [*b.shape[:-1], a.shape[-1]], "hash": fingerprint}
        records.append(SiteRecord(site, (), kind, config, extras or {}, base))
        prefix = f"{site}." if site else ""
        tensors |= {f"{prefix}lora_A": a.contiguous(), f"{prefix}lora_B": b.contiguous()}
    save_file(tensors, str(path), metadata("default", records))
    return path


def decaying(paths, rank=8, size=32, seed=0):
    """Returns random factors whose spectra fall and whose norms grow with the place in the list."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for i, path in enumerate(paths):
        fall = torch.logspace(0, -1 - 2 * ((7 * i) % 5) / 5, rank)[:, None]
        a = torch.randn(rank, size, generator=generator) * fall
        made[path] = (a, torch.randn(size, rank, generator=generator) * (0.2 + i / len(paths)))
    return made
