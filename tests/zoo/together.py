"""Inputs for wholes that read text together with images, videos or sound, which come with descriptions of them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .inputs import GRID, MAKERS, ROWS, TOKENS, Inputs, audio, patches, random, repaired, setting, vision


def mute(inputs: Inputs) -> bool:
    """Says whether the inputs are nothing but text."""
    return not any(isinstance(value, Tensor) and value.is_floating_point() for value in inputs.values())


def together(model: Any) -> Generator[Inputs, str, None]:
    """Yields text with all that the model can read besides, then with one kind alone; takes errors by `send`."""
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes:
        return
    text = {"input_ids": MAKERS["input_ids"](model)[0]}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in takes:
            text[name] = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    if "decoder_input_ids" in takes:
        text["decoder_input_ids"] = MAKERS["decoder_input_ids"](model)[0]
    kinds = [list(make(model)) for name, make in SENSES.items() if name in takes]
    groups = [kinds] if len(kinds) < 2 else [kinds, *([kind] for kind in kinds)]
    for group in groups:
        for way in itertools.product(*group):
            sensed = {name: value for sense in way for name, value in sense.items() if name in takes}
            yield from repaired(model, text | sensed)


def _images(model: Any) -> Iterator[Inputs]:
    """Yields whole images, images cut into patches in a row, and patches of each image apart."""
    for still in MAKERS["pixel_values"](model):
        if still.dim() == 4:
            yield {"pixel_values": still, **_described(still), "high_res_pixel_values": _finer(model)}
            for tiles in (1, 2):
                mask = torch.ones(ROWS, tiles, dtype=torch.bool)
                yield {
                    "pixel_values": torch.stack([still] * tiles, 1),
                    **_described(still),
                    "pixel_attention_mask": mask,
                    "aspect_ratio_mask": mask[:, None],
                }
    for flat in _flat(model):
        yield {"pixel_values": flat, **_gridded("image", model)}
    config = vision(model.config)
    side = setting(config, "patch_size", default=14)
    yield {
        "pixel_values": random(ROWS, GRID * GRID, 3 * side**2),
        "pixel_attention_mask": torch.ones(ROWS, GRID * GRID, dtype=torch.long),
        "spatial_shapes": torch.tensor([[GRID, GRID]] * ROWS),
    }


def _described(still: Tensor) -> Inputs:
    rows, _, height, width = still.shape
    return {
        "image_sizes": torch.tensor([[height, width]] * rows),
        "pixel_attention_mask": torch.ones(rows, 1, height, width, dtype=torch.bool),
    }


def _finer(model: Any) -> Tensor:
    side = setting(getattr(model.config, "high_res_vision_config", model.config), "image_size", default=64)
    return random(ROWS, 3, side, side)


def _flat(model: Any) -> Iterator[Tensor]:
    """Yields the patches of all images in a row: flat, for two frames at once, and as small images."""
    config = vision(model.config)
    rows = patches(config, ROWS)
    side = setting(config, "patch_size", default=14)
    yield rows
    yield torch.cat([rows, rows], 1)
    yield random(len(rows), 3, side, side)


def _gridded(kind: str, model: Any) -> Inputs:
    merge = setting(vision(model.config), "spatial_merge_size", default=1)
    return {
        f"{kind}_grid_thw": torch.tensor([[1, GRID, GRID]] * ROWS),
        f"{kind}_grid_hw": torch.tensor([[GRID, GRID]] * ROWS),
        f"{kind}_merge_sizes": torch.tensor([merge] * ROWS),
    }


def _videos(model: Any) -> Iterator[Inputs]:
    still = next(value for value in MAKERS["pixel_values"](model) if value.dim() == 4)
    frames = setting(vision(model.config), "num_frames", default=4)
    yield {"pixel_values_videos": torch.stack([still] * frames, 1)}
    for flat in _flat(model):
        yield {"pixel_values_videos": flat, **_gridded("video", model)}


def _spectra(model: Any) -> Iterator[Inputs]:
    """Yields sound as frames of bands and as bands of frames, as long as the tower can take, with masks."""
    for first in MAKERS["input_features"](model)[:2]:
        bands_first = first is MAKERS["input_features"](model)[0]
        yield from (_heard(first, 1 if not bands_first else 2), _heard(first, 1))
    config = audio(model.config)
    bands = setting(config, "input_size", "num_mel_bins", "input_dim", default=80)
    for frames in dict.fromkeys((2 * setting(config, "max_source_positions", default=100), 100, 256)):
        yield _heard(random(ROWS, bands, frames), 2)
        yield _heard(random(ROWS, frames, bands), 1)


def _heard(features: Tensor, time: int) -> Inputs:
    frames = features.shape[time]
    mask = torch.ones(ROWS, frames, dtype=torch.long)
    return {
        "input_features": features,
        "input_features_mask": mask,
        "feature_attention_mask": mask,
        "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
    }


SENSES: Mapping[str, Callable[[Any], Iterator[Inputs]]] = {
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "input_features": _spectra,
}
"""By the name of the main input of each."""
