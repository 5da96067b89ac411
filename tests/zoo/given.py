"""Inputs of models that cannot be guessed from the names of their arguments and the sizes in their config."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .inputs import GRID, ROWS, TOKENS, Inputs, integers, patches, placed, random, setting

PATCHES = GRID * GRID


def ones(*shape: int) -> Tensor:
    """Returns a mask that leaves all in."""
    return torch.ones(shape, dtype=torch.long)


def tokens(*shape: int) -> Tensor:
    """Returns tokens, none of them special."""
    return integers(3, 96, *shape)


def text() -> Inputs:
    return {"input_ids": tokens(ROWS, TOKENS)}


def grid(images: int = ROWS, frames: int = 1) -> Tensor:
    """Returns frames, height and width of each image in patches."""
    return torch.tensor([[frames, GRID, GRID]] * images)


def audioflamingo3(config: Any) -> Inputs:
    frames = 2 * config.max_source_positions
    return {
        "input_features": random(ROWS, config.num_mel_bins, frames),
        "input_features_mask": ones(ROWS, frames),
    }


def bark(config: Any) -> Inputs:
    codes = tokens(ROWS, TOKENS, config.fine_acoustics_config.n_codes_total)
    return text() | {"codes": codes}


def blt_decoder(config: Any) -> Inputs:
    return {
        "inputs_embeds": random(ROWS, TOKENS, config.hidden_size),
        "patch_embeds": random(ROWS, 3, config.hidden_size_global),
    }


def blt_encoder(config: Any) -> Inputs:
    return text() | {"num_patches": 2, "patch_ids": torch.tensor([[0] * 3 + [1] * (TOKENS - 3)] * ROWS)}


def colqwen2(config: Any) -> Inputs:
    vision = config.vlm_config.vision_config
    pixels = patches(vision, ROWS).view(ROWS, PATCHES, -1)
    merged = PATCHES // vision.spatial_merge_size**2
    row = [5, 6, *[config.vlm_config.image_token_id] * merged, 7]
    return {"input_ids": torch.tensor([row] * ROWS), "pixel_values": pixels, "image_grid_thw": grid()}


def decision_transformer(config: Any) -> Inputs:
    return {
        "states": random(ROWS, TOKENS, config.state_dim),
        "actions": random(ROWS, TOKENS, config.act_dim),
        "rewards": random(ROWS, TOKENS, 1),
        "returns_to_go": random(ROWS, TOKENS, 1),
        "timesteps": torch.arange(TOKENS).repeat(ROWS, 1),
        "attention_mask": ones(ROWS, TOKENS),
    }


def dia_decoder(config: Any) -> Inputs:
    return {
        "input_ids": tokens(ROWS, TOKENS, config.num_channels),
        "encoder_hidden_states": random(ROWS, TOKENS, config.cross_hidden_size),
    }


def ernie_vl(config: Any) -> Inputs:
    vision = config.vision_config
    image, video = PATCHES // vision.spatial_merge_size**2, PATCHES // vision.spatial_merge_size**2
    row = [5, *[config.image_token_id] * image, 6, *[config.video_token_id] * video, 7]
    kinds = [0, *[1] * image, 0, *[2] * video, 0]
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


def gemma4_audio(config: Any) -> Inputs:
    return {"input_features": random(ROWS, 48, 128)}


def big_images(config: Any) -> Inputs:
    return {"pixel_values": random(ROWS, 3, 4 * config.patch_size, 4 * config.patch_size)}


def glm_codes(config: Any) -> Inputs:
    return {"hidden_states": random(ROWS, config.latent_channels, GRID, GRID)}


def granite_speech(config: Any) -> Inputs:
    return {"input_features": random(ROWS, 64, 4 * setting(config, "num_mel_bins"))}


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


def kosmos2_5_vision(config: Any) -> Inputs:
    return flat_patches(config)


def kyutai(config: Any) -> Inputs:
    return {"input_ids": tokens(ROWS, TOKENS, config.num_codebooks + 1)}


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


def molmo2_vision(config: Any) -> Inputs:
    count = config.image_size[0] // config.patch_size * (config.image_size[1] // config.patch_size)
    return {"pixel_values": random(ROWS, count, config.num_channels * config.patch_size**2)}


def moshi_depth(config: Any) -> Inputs:
    codes = tokens(ROWS, config.num_codebooks)
    return {"input_ids": codes, "last_hidden_state": random(ROWS, 1, config.input_size)}


def muse_vision(config: Any) -> Inputs:
    width = 3 * config.patch_temporal * config.patch_size**2
    return {"pixel_values": random(ROWS * PATCHES, width), "grid_thw": grid()}


def codebooks(config: Any) -> Inputs:
    return {"input_ids": tokens(ROWS * config.num_codebooks, TOKENS)}


def musicgen(config: Any) -> Inputs:
    return text() | {"decoder_input_ids": codebooks(config.decoder)["input_ids"]}


def musicgen_melody(config: Any) -> Inputs:
    return musicgen(config) | {"input_features": random(ROWS, TOKENS, config.num_chroma)}


def semantic(config: Any) -> Inputs:
    return {"input_features": random(ROWS, 20, config.feature_projection_input_dim)}


def nemotron(config: Any) -> Inputs:
    features = {"input_features": random(ROWS, 64, 80), "attention_mask": ones(ROWS, 64)}
    return features | ({"decoder_input_ids": tokens(ROWS, TOKENS)} if config.is_encoder_decoder else {})


def two_towers(config: Any) -> Inputs:
    width = config.semantic_model_config.feature_projection_input_dim
    return {"input_values": random(1, 1, 6400), "input_features": random(1, 20, width)}


def paddle_vision(config: Any) -> Inputs:
    side = config.patch_size
    return {"pixel_values": random(1, ROWS * PATCHES, 3, side, side), "grid_thw": grid()}


def pix2struct(config: Any) -> Inputs:
    return flat_patches(config) | {"decoder_input_ids": tokens(ROWS, TOKENS)}


def qwen_audio(config: Any) -> Inputs:
    frames = 2 * config.n_window
    return {"input_features": random(config.num_mel_bins, frames + 40), "feature_lens": torch.tensor([frames, 40])}


def code_predictor(config: Any) -> Inputs:
    return {"inputs_embeds": random(ROWS, TOKENS, config.hidden_size)}


def rag(config: Any) -> Inputs:
    documents = config.n_docs * ROWS
    return text() | {
        "decoder_input_ids": tokens(ROWS, TOKENS),
        "context_input_ids": tokens(documents, TOKENS),
        "context_attention_mask": ones(documents, TOKENS),
        "doc_scores": random(ROWS, config.n_docs),
    }


def without_cache(config: Any) -> Inputs:
    return text() | {"use_cache": False}


def long_text(config: Any) -> Inputs:
    return {"input_ids": tokens(ROWS, math.prod(config.axial_pos_shape)), "use_cache": False}


def siglip2(config: Any) -> Inputs:
    vision = config.vision_config
    return text() | {
        "pixel_values": random(ROWS, PATCHES, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": ones(ROWS, PATCHES),
        "spatial_shapes": torch.tensor([[GRID, GRID]] * ROWS),
    }


def speecht5(config: Any) -> Inputs:
    return {"input_values": random(ROWS, 6400), "decoder_input_ids": integers(3, config.vocab_size, ROWS, TOKENS)}


def tvp(config: Any) -> Inputs:
    # Its grid of positions has room for one row alone.
    side = config.max_img_size
    return {"input_ids": tokens(1, TOKENS), "pixel_values": random(1, config.num_frames, 3, side, side)}


def text_lines(config: Any) -> Inputs:
    return {"pixel_values": random(ROWS, 3, 96, 64)}


def timed(config: Any) -> Inputs:
    return text() | {"t_cond": random(1, 1, config.hidden_size)}


def frames(config: Any) -> Inputs:
    return {"pixel_values": random(config.num_frames, 3, config.image_size, config.image_size)}


GIVEN: dict[str, Callable[[Any], Inputs]] = {
    "audioflamingo3_encoder": audioflamingo3,
    "bark": bark,
    "blt_local_decoder": blt_decoder,
    "blt_local_encoder": blt_encoder,
    "colqwen2": colqwen2,
    "decision_transformer": decision_transformer,
    "dia_decoder": dia_decoder,
    "ernie4_5_vl_moe": ernie_vl,
    "florence_vision": images,
    "gemma4_audio": gemma4_audio,
    "depth_pro": big_images,
    "glm_image_vqmodel": glm_codes,
    "granite_speech5_ctc": granite_speech,
    "granite_speech5_encoder": granite_speech,
    "idefics": idefics,
    "inkling2_vision": inkling2,
    "inkling_vision": inkling,
    "kimi_k25_vision": kimi,
    "kosmos-2": kosmos2,
    "kosmos_2_5_vision_model": flat_patches,
    "kyutai_speech_to_text": kyutai,
    "lxmert": lxmert,
    "minicpm_ocr_vision": minicpm_vision,
    "minicpmv4_6_vision": minicpm_vision,
    "minicpmv4_7_vision": minicpm_vision,
    "molmo2_vision": molmo2_vision,
    "moshi_depth": moshi_depth,
    "muse_glimmer_vision": muse_vision,
    "muse_spark_vision": muse_vision,
    "musicgen": musicgen,
    "musicgen_decoder": codebooks,
    "musicgen_melody": musicgen_melody,
    "musicgen_melody_decoder": codebooks,
    "nemotron3_5_asr": nemotron,
    "nemotron_asr_streaming": nemotron,
    "nemotron_asr_streaming_encoder": nemotron,
    "neucodec": two_towers,
    "paddleocr_vl_vision": paddle_vision,
    "pix2struct": pix2struct,
    "pix2struct_vision_model": flat_patches,
    "pp_ocrv5_mobile_rec": text_lines,
    "qwen2_5_omni_audio_encoder": qwen_audio,
    "qwen3_omni_moe_audio_encoder": qwen_audio,
    "qwen3_omni_moe_talker_code_predictor": code_predictor,
    "rag": rag,
    "reformer": long_text,
    "rwkv": without_cache,
    "siglip2": siglip2,
    "speecht5": speecht5,
    "tvp": tvp,
    "voxtral_realtime_text": timed,
    "wav2vec2-bert": semantic,
    "xclip_vision_model": frames,
    "xcodec2": two_towers,
    "xlstm": without_cache,
}
"""By name of the architecture: makes all inputs from the config of the model."""
