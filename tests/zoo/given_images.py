"""Inputs with images or videos that cannot be guessed."""

from __future__ import annotations

from typing import Any

import torch

from .given_text import Makers, grid, ones, text, tokens
from .inputs import GRID, ROWS, TOKENS, Inputs, patches, random, setting

PATCHES = GRID * GRID


def colqwen2(config: Any) -> Inputs:
    vision = config.vlm_config.vision_config
    pixels = patches(vision, ROWS).view(ROWS, PATCHES, -1)
    merged = PATCHES // vision.spatial_merge_size**2
    row = [5, 6, *[config.vlm_config.image_token_id] * merged, 7]
    return {"input_ids": torch.tensor([row] * ROWS), "pixel_values": pixels, "image_grid_thw": grid()}


def ernie_vl(config: Any) -> Inputs:
    vision = config.vision_config
    merged = PATCHES // vision.spatial_merge_size**2
    row = [5, *[config.image_token_id] * merged, 6, *[config.video_token_id] * merged, 7]
    kinds = [0, *[1] * merged, 0, *[2] * merged, 0]
    return {
        "input_ids": torch.tensor([row] * ROWS),
        "mm_token_type_ids": torch.tensor([kinds] * ROWS),
        "moe_mm_token_type_ids": torch.tensor([[int(kind > 0) for kind in kinds]] * ROWS),
        "pixel_values": patches(vision, ROWS),
        "pixel_values_videos": patches(vision, 2 * ROWS),
        "image_grid_thw": grid(),
        "video_grid_thw": grid(frames=vision.temporal_merge_size),
    }


def images(config: Any) -> Inputs:
    return {"hidden_states": random(ROWS, 3, 64, 64)}


def big_images(config: Any) -> Inputs:
    return {"pixel_values": random(ROWS, 3, 4 * config.patch_size, 4 * config.patch_size)}


def glm_codes(config: Any) -> Inputs:
    return {"hidden_states": random(ROWS, config.latent_channels, GRID, GRID)}


def idefics(config: Any) -> Inputs:
    side = config.vision_config.image_size
    return text() | {
        "pixel_values": random(ROWS, 1, 3, side, side),
        "image_attention_mask": ones(ROWS, TOKENS, 1),
    }


def inkling2(config: Any) -> Inputs:
    side = config.patch_size * config.spatial_merge_size
    return {"pixel_values": random(ROWS * PATCHES, side, side, config.num_channels), "image_grid_thw": grid()}


def inkling(config: Any) -> Inputs:
    side = config.patch_size
    return {"pixel_values": random(ROWS, config.temporal_patch_size, side, side, config.num_channels)}


def kimi(config: Any) -> Inputs:
    return {"pixel_values": random(ROWS * PATCHES, 3, config.patch_size, config.patch_size), "grid_thw": grid()}


def kosmos2(config: Any) -> Inputs:
    count = config.latent_query_num
    side = config.vision_config.image_size
    return {
        "pixel_values": random(ROWS, 3, side, side),
        "input_ids": tokens(ROWS, count + TOKENS),
        "image_embeds_position_mask": torch.tensor([[0, 0] + [1] * count + [0] * (TOKENS - 2)] * ROWS),
    }


def flat_patches(config: Any) -> Inputs:
    """Patches in rows that start with the place of the patch."""
    rows = torch.arange(PATCHES)
    places = torch.stack([rows // GRID + 1, rows % GRID + 1], dim=1).float().repeat(ROWS, 1, 1)
    width = setting(config, "patch_embed_hidden_size")
    return {"flattened_patches": torch.cat([places, random(ROWS, PATCHES, width)], dim=2)}


def lxmert(config: Any) -> Inputs:
    return text() | {
        "visual_feats": random(ROWS, 5, config.visual_feat_dim),
        "visual_pos": random(ROWS, 5, config.visual_pos_dim),
    }


def minicpm_vision(config: Any) -> Inputs:
    sizes = torch.tensor([[GRID, GRID]] * ROWS, dtype=torch.int32)
    return {
        "pixel_values": random(1, 3, config.patch_size, config.patch_size * ROWS * PATCHES),
        "target_sizes": sizes,
    }


def mllama_vision(config: Any) -> Inputs:
    """Returns an image of two by two tiles, and one of two tiles with padding behind."""
    kinds = [config.supported_aspect_ratios.index(shape) + 1 for shape in ([2, 2], [1, 2])]
    return {
        "pixel_values": random(2, 1, config.max_num_tiles, config.num_channels, config.image_size, config.image_size),
        "aspect_ratio_ids": torch.tensor(kinds).view(2, 1),
        "aspect_ratio_mask": torch.tensor([[[1, 1, 1, 1]], [[1, 1, 0, 0]]]),
    }


def molmo2_vision(config: Any) -> Inputs:
    count = config.image_size[0] // config.patch_size * (config.image_size[1] // config.patch_size)
    return {"pixel_values": random(ROWS, count, config.num_channels * config.patch_size**2)}


def muse_vision(config: Any) -> Inputs:
    width = 3 * config.patch_temporal * config.patch_size**2
    return {"pixel_values": random(ROWS * PATCHES, width), "grid_thw": grid()}


def paddle_vision(config: Any) -> Inputs:
    side = config.patch_size
    return {"pixel_values": random(1, ROWS * PATCHES, 3, side, side), "grid_thw": grid()}


def pix2struct(config: Any) -> Inputs:
    return flat_patches(config) | {"decoder_input_ids": tokens(ROWS, TOKENS)}


def siglip2(config: Any) -> Inputs:
    vision = config.vision_config
    return text() | {
        "pixel_values": random(ROWS, PATCHES, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": ones(ROWS, PATCHES),
        "spatial_shapes": torch.tensor([[GRID, GRID]] * ROWS),
    }


def tvp(config: Any) -> Inputs:
    # Its grid of positions has room for one row alone.
    side = config.max_img_size
    return {"input_ids": tokens(1, TOKENS), "pixel_values": random(1, config.num_frames, 3, side, side)}


def picture(config: Any) -> Inputs:
    return {"pixel_values": random(1, 3, 32, 32)}


def sized_picture(config: Any) -> Inputs:
    return picture(config) | {"image_sizes": torch.tensor([[32, 32]])}


def unlimited_ocr_encoder(config: Any) -> Inputs:
    """Returns what another encoder makes of images."""
    side = config.image_size // config.patch_size
    return {"patch_embeds": random(ROWS, config.hidden_size, side, side)}


def video_llama(config: Any) -> Inputs:
    """Returns an image whose patches stay as many, and one of whose patches four become one."""
    return {"pixel_values": patches(config, 2), "grid_thw": grid(2), "merge_sizes": torch.tensor([1, 2])}


def text_lines(config: Any) -> Inputs:
    return {"pixel_values": random(ROWS, 3, 96, 64)}


def frames(config: Any) -> Inputs:
    return {"pixel_values": random(config.num_frames, 3, config.image_size, config.image_size)}


IMAGES: Makers = {
    "chameleon_vqgan": picture,
    "colqwen2": colqwen2,
    "emu3_vqgan": sized_picture,
    "ernie4_5_vl_moe": ernie_vl,
    "depth_pro": big_images,
    "florence_vision": images,
    "glm_image_vqmodel": glm_codes,
    "idefics": idefics,
    "inkling2_vision": inkling2,
    "inkling_vision": inkling,
    "kimi_k25_vision": kimi,
    "kosmos-2": kosmos2,
    "kosmos_2_5_vision_model": flat_patches,
    "lxmert": lxmert,
    "minicpm_ocr_vision": minicpm_vision,
    "minicpmv4_6_vision": minicpm_vision,
    "minicpmv4_7_vision": minicpm_vision,
    "mllama_vision_model": mllama_vision,
    "molmo2_vision": molmo2_vision,
    "muse_glimmer_vision": muse_vision,
    "muse_spark_vision": muse_vision,
    "paddleocr_vl_vision": paddle_vision,
    "pix2struct": pix2struct,
    "pix2struct_vision_model": flat_patches,
    "pp_ocrv5_mobile_rec": text_lines,
    "siglip2": siglip2,
    "tvp": tvp,
    "unlimited_ocr_vision_encoder": unlimited_ocr_encoder,
    "video_llama_3_vision": video_llama,
    "xclip_vision_model": frames,
}
