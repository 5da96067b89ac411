"""Fields that must agree with others in ways that their names do not tell, set after a config is made small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]


def stages(*numbers: int, at: str = "backbone_config") -> Fields:
    """Returns the stages that a backbone hands out, which automation drops since they change with its depth."""
    return {f"{at}.out_features": [f"stage{number}" for number in numbers]}


FOUR_LAYERS = {"backbone_config.num_hidden_layers": 4, **stages(1, 2, 3, 4)}
GROUNDING = {"num_queries": 10, **stages(2, 3, 4)}
LAYOUT = {"num_queries": 10, **stages(2, 3, 4)}
MERGER = {"insert_layer_id": 0}
ONE_SIZE = {"projector_input_dim": 64, "projector_output_dim": 64, "intermediate_size": 256}
POOLED_HEADS = {"text_config.rope_parameters.mrope_section": [3, 3, 2]}

AGREEING: dict[str, Fields] = {
    "blip-2": {"image_token_index": 255},
    "chmv2": FOUR_LAYERS,
    "clvp": {"text_config.num_attention_heads": 2, "speech_config.num_attention_heads": 2},
    "deepseek_ocr2_vision": {"sam_config.downsample_channels": [64, 64]},
    "donut-swin": {"window_size": 2},
    "ernie4_5_vl_moe": POOLED_HEADS,
    "ernie4_5_vl_moe_text": {"rope_parameters.mrope_section": [3, 3, 2]},
    "grounding-dino": GROUNDING,
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "llama4_vision_model": ONE_SIZE,
    "lw_detr": {"num_queries": 10, "projector_scale_factors": [1.0, 2.0]},
    "mask2former": stages(1, 2, 3, 4),
    "minicpm_ocr_vision": MERGER,
    "minicpmv4_6_vision": MERGER,
    "minicpmv4_7_vision": MERGER,
    "mistral4": {"rope_parameters.partial_rotary_factor": 1.0},
    "mm-grounding-dino": GROUNDING,
    "pp_doclayout_v2": LAYOUT,
    "pp_doclayout_v3": {"num_queries": 10, **stages(1, 2, 3, 4)},
    "pp_doclayout_v4": LAYOUT,
    "pp_ocrv5_mobile_det": stages(2, 3, 4, 5),
    "pp_ocrv6_small_det": stages(1, 2, 3, 4),
    "sapiens2": {"num_key_value_heads_per_layer": [4, 4, 4, 2]},
    "step3p5": {"sliding_window": 4},
    "step3p7": {"text_config.sliding_window": 4},
    "tipsv2_dpt": FOUR_LAYERS,
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8},
    "unlimited_ocr_vision": {"sam_config.downsample_channels": [64, 64]},
    "uvdoc": stages(1, 2, 3, 4, 5, 6),
    "xclip": {
        "vision_config.mit_hidden_size": 64,
        "vision_config.mit_intermediate_size": 128,
        "vision_config.mit_num_attention_heads": 4,
    },
    "xcodec": {"codebook_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zoedepth": FOUR_LAYERS,
}
