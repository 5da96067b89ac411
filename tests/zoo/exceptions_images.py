"""Exceptions among models of images and videos, with text or without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .agreeing import HALVING
from .exceptional import Exception_, Exceptions

RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
# Automation drops the stages that a backbone hands out, since they change with its depth.
ON_RESNET = Exception_(
    start={"backbone_config": RESNET, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
    set={"backbone_config.out_features": ["stage4"]},
)
FOUR_LAYERS = Exception_(
    set={"backbone_config.num_hidden_layers": 4, "backbone_config.out_features": [f"stage{n}" for n in (1, 2, 3, 4)]}
)
FEW_QUERIES = Exception_(set={"num_queries": 10})
"""A small image has fewer places than the model picks."""
RT_DETR = Exception_(set={"num_queries": 10, "backbone_config.out_features": ["stage2", "stage3", "stage4"]})
NARROW_NET = {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}
EMU_TOKENS = {"<image>": 250, "<|extra_200|>": 249} | {f"<|visual token {n:06}|>": 4 + n for n in range(4)}
POINTMAP = {
    "upsample_out_channels": [16, 16],
    "conv_out_channels": [16],
    "scale_conv_out_channels": [16],
    "scale_final_hidden_sizes": [16, 16],
}
DETECTOR_WIDTHS = ["vision_config.fpn_hidden_size"] + [
    f"{part}_config.hidden_size" for part in ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
]


def _lines() -> dict[str, Any]:
    """Returns kernel, stride and padding of each convolution of a block that looks along long lines of text."""
    found: dict[str, Any] = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for ratio, size in {"long": 7, "mid": 5, "short": 3}.items():
        pad = size // 2
        found[f"vertical_long_to_small_conv_{ratio}ratio"] = [[size, 1], [1, 1], [pad, 0]]
        found[f"horizontal_small_to_long_conv_{ratio}ratio"] = [[1, size], [1, 1], [0, pad]]
        found[f"symmetric_conv_long_{ratio}ratio"] = [[size, size], [1, 1], [pad, pad]]
    return found


TEXT_LINES = Exception_(
    start={"intraclass_block_config": _lines(), "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2]},
    set={"backbone_config.out_features": ["stage1", "stage2", "stage3", "stage4"]},
)
THIN_VIT = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 64, "patch_size": 16}
REPVIT = {
    "backbone_config.architecture": "repvit_m0_9",
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
SMALL_FRAMES = {
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_attention_rope_k_sizes": [4, 4],
    "memory_attention_hidden_size": 128,
    "memory_encoder_hidden_size": 128,
    "memory_fuser_embed_dim": 128,
    "mask_downsampler_embed_dim": 128,
    "vision_config.fpn_hidden_size": 128,
    "prompt_encoder_config.hidden_size": 128,
    "mask_decoder_config.hidden_size": 128,
}
"""A memory is 64 wide, whatever the config says, and pointers to objects are cut up only where they are wider."""
HIERA_VIDEO = Exception_(
    set={
        "vision_config.backbone_config.hidden_size": 96,
        "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        **SMALL_FRAMES,
    }
)

IMAGES: Exceptions = {
    "align": Exception_(set={f"vision_config.{k}": v for k, v in NARROW_NET.items()} | {"projection_dim": 80}),
    "align_vision_model": Exception_(set=NARROW_NET),
    "chameleon": Exception_(start={"vocabulary_map": {"<image>": 250, "IMGIMGBZ": 4}}),
    "chameleon_vqgan": Exception_(set={"base_channels": 32, "resolution": 64}),
    "conditional_detr": ON_RESNET,
    "d_fine": RT_DETR,
    "dab-detr": ON_RESNET,
    "deformable_detr": ON_RESNET,
    "depth_anything": FOUR_LAYERS,
    "detr": ON_RESNET,
    "edgetam": Exception_(set={f"vision_config.{k}": v for k, v in REPVIT.items()}),
    "edgetam_video": replace(HIERA_VIDEO, set={**HIERA_VIDEO.set, "perceiver_resampler_num_latents_2d": 4}),
    "edgetam_vision_model": Exception_(set=REPVIT),
    "efficientnet": Exception_(start={"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}),
    "emu3": Exception_(
        start={"vocabulary_map": EMU_TOKENS},
        set={"vq_config.base_channels": 32, "vq_config.hidden_size": 128, "vq_config.codebook_size": 4},
    ),
    "emu3_vqgan": Exception_(set={"base_channels": 32, "hidden_size": 128, "codebook_size": 4}),
    "fast_vlm": Exception_(set={"vision_config.architecture": "fastvit_mci0", "vision_config.hidden_size": 1024}),
    "florence2": Exception_(
        set={
            "vision_config.embed_dim": [16, 32, 64, 128],
            "vision_config.num_heads": [1, 2, 4, 8],
            "vision_config.num_groups": [1, 2, 4, 8],
        }
    ),
    "gemma3n": Exception_(
        set={
            "text_config.num_kv_shared_layers": 0,
            "vision_config.architecture": "test_efficientnet",
            "vision_config.hidden_size": 256,
        }
    ),
    "gemma3n_vision": Exception_(set={"architecture": "test_efficientnet"}),
    "gemma4_unified": Exception_(
        start={"vision_config": {}, "audio_config": {}},
        set={"vision_config.mm_embed_dim": 64, "vision_config.patch_size": 4, "audio_config.audio_embed_dim": 64},
    ),
    "glm5_next": Exception_(set={"text_config.index_topk": 16}),
    "granite4_vision": Exception_(
        start={"downsample_rate": "4/8", "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1]}
    ),
    "hunyuan_vl": Exception_(start={"text_config": {"head_dim": 128}}),
    "idefics": Exception_(start={"use_resampler": True}),
    "instructblip": Exception_(set={"image_token_index": 255}),
    "instructblipvideo": Exception_(set={"video_token_index": 255}),
    "janus": Exception_(set={"vq_config.base_channels": 32}),
    "janus_vqgan": Exception_(set={"base_channels": 32, "num_patches": 4}),
    "mllama_vision_model": Exception_(set={"intermediate_layers_indices": [0, 2], "num_global_layers": 2}),
    "molmo2": Exception_(set={"adapter_config.vision_feature_layer": [1, 0]}),
    "nougat": Exception_(
        contradiction=(
            "Unrecognized model type for subconfig: donut_swin",
            "its config names a part donut_swin that transformers knows as donut-swin, and so cannot be read back; "
            "VisionEncoderDecoderModel, for which it is documented, refuses all but VisionEncoderDecoderConfig",
        ),
    ),
    "omdet-turbo": Exception_(
        set={
            "backbone_config.out_indices": [1, 2, 3],
            "vision_features_channels": [32, 32, 32],
            "decoder_hidden_dim": 32,
            "d_model": 32,
            "num_queries": 4,
        }
    ),
    "oneformer": Exception_(set={"backbone_config.out_features": ["stage1", "stage2", "stage3", "stage4"]}),
    "pe_audio_video": Exception_(set={"audio_video_config.video_config.vision_config.model_args": THIN_VIT}),
    "pe_audio_video_encoder": Exception_(set={"video_config.vision_config.model_args": THIN_VIT}),
    "pe_video": Exception_(set={"video_config.vision_config.model_args": THIN_VIT}),
    "pe_video_encoder": Exception_(set={"vision_config.model_args": THIN_VIT}),
    "perception_lm": Exception_(
        set={"vision_config.architecture": "vit_pe_lang_large_patch14_448", "vision_config.model_args": THIN_VIT}
    ),
    "pp_ocrv5_server_det": TEXT_LINES,
    "pp_ocrv6_medium_det": replace(TEXT_LINES, set={**TEXT_LINES.set, "backbone_config.block_configs": HALVING}),
    "prompt_depth_anything": FOUR_LAYERS,
    "rf_detr": FEW_QUERIES,
    "rt_detr": RT_DETR,
    "rt_detr_v2": RT_DETR,
    "sam": Exception_(set={"prompt_encoder_config.image_embedding_size": 4, "prompt_encoder_config.image_size": 64}),
    "sam2_video": HIERA_VIDEO,
    "sam3_tracker_video": Exception_(set={"image_size": 56, **SMALL_FRAMES}),
    "sam3_video": Exception_(
        set={
            **{f"tracker_config.{k}": v for k, v in {"image_size": 56, **SMALL_FRAMES}.items()},
            **{f"detector_config.{k}": 128 for k in DETECTOR_WIDTHS},
            "low_res_mask_size": 16,
            "det_nms_thresh": 0.0,
            "score_threshold_detection": 0.0,
            "new_det_thresh": 0.0,
            "fill_hole_area": 0,
            "hotstart_delay": 0,
            "detector_config.detr_decoder_config.num_queries": 4,
        }
    ),
    "sapiens2": Exception_(set={"head_config": POINTMAP}, classes=("Sapiens2ForPointmapEstimation",)),
    "seggpt": Exception_(
        set={
            "num_hidden_layers": 4,
            "merge_index": 0,
            "intermediate_hidden_state_indices": [1, 2, 3],
            "image_size": [64, 32],
            "pretrain_image_size": 32,
        }
    ),
    "slanet": Exception_(classes=("SLANetForTableRecognition",)),
    # The config of the whole sets this in that of the text within, which has no such field and is read for it.
    "t5gemma2_encoder": Exception_(set={"text_config.dropout_rate": 0.0, "mm_tokens_per_image": 4}, sharp=False),
    "table-transformer": ON_RESNET,
    "timm_backbone": Exception_(start={"backbone": "test_resnet"}),
    "timm_wrapper": Exception_(set={"architecture": "test_vit"}),
    "upernet": Exception_(set={"backbone_config.out_features": ["stage1", "stage2", "stage3", "stage4"]}),
}
