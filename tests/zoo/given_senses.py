"""Inputs of wholes that call their images, sound or proteins by names of their own."""

from __future__ import annotations

from typing import Any

import torch

from .given_text import Makers, ones, text, tokens
from .inputs import GRID, ROWS, TOKENS, Inputs, integers, random

PATCHES = GRID * GRID


def marked(token: int, count: int) -> torch.Tensor:
    """Returns a prompt with a run of placeholders in each row: (ROWS, count + 4)."""
    marks = torch.full((ROWS, count), token)
    return torch.cat([tokens(ROWS, 2), marks, tokens(ROWS, 2)], 1)


def evolla(config: Any) -> Inputs:
    return text() | {
        "attention_mask": ones(ROWS, TOKENS),
        "protein_input_ids": integers(4, 24, ROWS, TOKENS),
        "protein_attention_mask": ones(ROWS, TOKENS),
    }


def kosmos_2_5(config: Any) -> Inputs:
    """Returns patches that begin with their row and column, and a mask of the places of their summary."""
    count = config.latent_query_num
    places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).expand(ROWS, -1, -1) + 1.0
    vision = config.vision_config
    patches = torch.cat([places, random(ROWS, PATCHES, vision.patch_embed_hidden_size)], 2)
    return {
        "input_ids": tokens(ROWS, count + TOKENS),
        "flattened_patches": patches,
        "image_embeds_position_mask": torch.tensor([[0, 0] + [1] * count + [0] * (TOKENS - 2)] * ROWS),
    }


def mllama(config: Any) -> Inputs:
    """Returns an image of two by two tiles, and one of two tiles with padding behind; all the text looks at them."""
    vision = config.vision_config
    kinds = [vision.supported_aspect_ratios.index(shape) + 1 for shape in ([2, 2], [1, 2])]
    tiles = torch.tensor([[[1, 1, 1, 1]], [[1, 1, 0, 0]]])
    side = vision.image_size
    return text() | {
        "pixel_values": random(ROWS, 1, vision.max_num_tiles, vision.num_channels, side, side),
        "aspect_ratio_ids": torch.tensor(kinds).view(ROWS, 1),
        "aspect_ratio_mask": tiles,
        "attention_mask": ones(ROWS, TOKENS),
        "cross_attention_mask": tiles[:, None].expand(-1, TOKENS, -1, -1),
    }


def molmo2(config: Any) -> Inputs:
    """Returns one crop for each image, whose patches are pooled two by two."""
    vision = config.vision_config
    high, wide = (side // vision.patch_size for side in vision.image_size)
    places = torch.arange(ROWS * high * wide).view(ROWS, high // 2, 2, wide // 2, 2)
    pooled = places.transpose(2, 3).reshape(-1, 4)
    prompt = marked(config.image_patch_id, high * wide // 4)
    return {
        "input_ids": prompt,
        "mm_token_type_ids": (prompt == config.image_patch_id).long(),
        "pixel_values": random(ROWS, high * wide, 3 * vision.patch_size**2),
        "image_token_pooling": pooled,
        "image_grids": torch.tensor([[high // 2, wide // 2, 0, 0]] * ROWS),
        "image_num_crops": torch.ones(ROWS, dtype=torch.long),
    }


def phi4_multimodal(config: Any) -> Inputs:
    """Returns an image of one tile behind its overview, and sound."""
    vision, audio = config.vision_config, config.audio_config
    side = vision.image_size
    grid = side // vision.patch_size
    half = -(-grid // 2)
    frames = 8 * audio.time_reduction
    seen = 2 * half * (half + 1) + 1
    pieces = [
        tokens(ROWS, 2),
        torch.full((ROWS, seen), vision.image_token_id),
        torch.full((ROWS, 8), audio.audio_token_id),
        tokens(ROWS, 2),
    ]
    return {
        "input_ids": torch.cat(pieces, 1),
        "image_pixel_values": random(ROWS, 2, 3, side, side),
        "image_sizes": torch.tensor([[vision.crop_size, vision.crop_size]] * ROWS),
        "image_attention_mask": ones(ROWS, 2, grid, grid),
        "audio_input_features": random(ROWS, frames, audio.input_size),
        "audio_embed_sizes": torch.tensor([8] * ROWS),
    }


def qwen2_audio(config: Any) -> Inputs:
    sound = config.audio_config
    frames = 2 * sound.max_source_positions
    prompt = marked(config.audio_token_index, frames // 4)
    return {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "input_features": random(ROWS, sound.num_mel_bins, frames),
        "feature_attention_mask": ones(ROWS, frames),
    }


SENSES: Makers = {
    "evolla": evolla,
    "kosmos-2.5": kosmos_2_5,
    "mllama": mllama,
    "molmo2": molmo2,
    "phi4_multimodal": phi4_multimodal,
    "qwen2_audio": qwen2_audio,
}
