"""Fields that must agree with others in ways that their names do not tell, set after a config is made small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]


def stages(*numbers: int, at: str = "backbone_config") -> Fields:
    """Returns the stages that a backbone hands out, which automation drops since they change with its depth."""
    return {f"{at}.out_features": [f"stage{number}" for number in numbers]}


FOUR_LAYERS = {"backbone_config.num_hidden_layers": 4, **stages(1, 2, 3, 4)}
SMALL_NECK = {**FOUR_LAYERS, "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 32}
GROUNDING = {"num_queries": 10, **stages(2, 3, 4)}
LAYOUT = {"num_queries": 10, "decoder_in_channels": [64, 64, 64], **stages(2, 3, 4)}
MERGER = {"insert_layer_id": 0}
"""Behind the first of few layers, where the default is behind more layers than there are."""
HALVING: list[list[list[Any]]] = [
    [[3, 96, 96, 1, True]],
    [[3, 96, 96, 2, False]],
    [[3, 96, 192, 2, False]],
    [[3, 192, 384, 2, False]],
]
"""Every stage halves both sides, as the neck needs; the default backbone is that of another model."""

AGREEING: dict[str, Fields] = {
    "bark": {"codec_config.codebook_dim": 64, "codec_config.num_filters": 4},
    "blip-2": {"image_token_index": 255},
    "chmv2": {
        **FOUR_LAYERS,
        "post_process_channels": [16, 16, 32, 32],
        "fusion_hidden_size": 32,
        "head_hidden_size": 32,
        "number_output_channels": 32,
    },
    "clvp": {"text_config.num_attention_heads": 2, "speech_config.num_attention_heads": 2},
    "colqwen2": {"vlm_config.text_config.rope_parameters.mrope_section": [2, 3, 3]},
    "deepseek_ocr2_vision": {"sam_config.downsample_channels": [64, 64]},
    "depth_pro": {
        "patch_size": 32,
        "image_model_config.image_size": 32,
        "image_model_config.patch_size": 8,
        "patch_model_config.image_size": 32,
        "patch_model_config.patch_size": 8,
        "intermediate_hook_ids": [1, 0],
        "merge_padding_value": 0,
        "fusion_hidden_size": 64,
        "intermediate_feature_dims": [64, 64],
        "scaled_images_feature_dims": [64, 64, 64],
    },
    "donut-swin": {"window_size": 2},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "ernie4_5_vl_moe_text": {"rope_parameters.mrope_section": [3, 3, 2]},
    "florence_vision": {
        "embed_dim": [16, 32, 64, 128],
        "num_heads": [1, 2, 4, 8],
        "num_groups": [1, 2, 4, 8],
    },
    "glm46v": {"text_config.rope_parameters.mrope_section": [2, 3, 3]},
    "glmga": {"text_config.rope_parameters.mrope_section": [2, 3, 3]},
    "grounding-dino": GROUNDING,
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "llama4_vision_model": {"projector_input_dim": 64, "projector_output_dim": 64, "intermediate_size": 256},
    "lw_detr": {
        "num_queries": 10,
        "group_detr": 2,
        "backbone_config.image_size": 128,
        "projector_scale_factors": [1.0, 2.0],
        "projector_in_channels": [64, 64],
        "num_feature_levels": 2,
    },
    "mask2former": stages(1, 2, 3, 4),
    "minicpm_ocr_vision": MERGER,
    "minicpmv4_6_vision": MERGER,
    "minicpmv4_7_vision": MERGER,
    "mistral4": {"rope_parameters.partial_rotary_factor": 1.0},
    "mm-grounding-dino": GROUNDING,
    "molmo2_vision": {"num_position_embeddings": 16},
    "neucodec": {"quantization_dim": 128},
    "pp_doclayout_v2": {**LAYOUT, "class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
    "pp_doclayout_v3": {**LAYOUT, **stages(1, 2, 3, 4)},
    "pp_doclayout_v4": LAYOUT,
    "pp_ocrv5_mobile_det": stages(2, 3, 4, 5),
    "pp_ocrv6_small_det": {
        "backbone_config.block_configs": HALVING,
        "layer_list_out_channels": [96, 96, 192, 384],
        **stages(1, 2, 3, 4),
    },
    "reformer": {
        "is_decoder": True,
        "hidden_size": 64,
        "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [32, 32],
        "attention_head_size": 16,
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "num_buckets": 4,
        "hash_seed": 0,
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
    },
    "sam2": {
        "vision_config.backbone_config.hidden_size": 96,
        "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "sam3_tracker": {"vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam_hq": {
        "vision_config.output_channels": 64,
        "vision_config.num_pos_feats": 32,
        "mask_decoder_config.vit_dim": 64,
        "prompt_encoder_config.image_embedding_size": 4,
    },
    "sapiens2": {"num_key_value_heads_per_layer": [4, 4, 4, 2]},
    "slanet": {"max_text_length": 4, **stages(2, 3, 4, 5)},
    "step3p5": {"sliding_window": 4},
    "step3p7": {"text_config.sliding_window": 4},
    "swin2sr": {"image_size": 16},
    "tipsv2_dpt": SMALL_NECK,
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "unlimited_ocr_vision": {"sam_config.downsample_channels": [64, 64]},
    "uvdoc": stages(1, 2, 3, 4, 5, 6),
    "vjepa2": {"crop_size": 32, "frames_per_clip": 4},
    "xclip": {
        "vision_config.mit_hidden_size": 64,
        "vision_config.mit_intermediate_size": 128,
        "vision_config.mit_num_attention_heads": 4,
    },
    "xcodec": {"codebook_dim": 128},
    "xcodec2": {"quantization_dim": 128},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"hybrid_layer_ids": [3], "attention_hidden_size": 128, "attention_head_dim": 32},
    "zoedepth": {**SMALL_NECK, "bottleneck_features": 32},
}
