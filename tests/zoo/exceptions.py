"""Where automation does not find a small model that builds and runs: what to set, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .agreeing import HALVING


@dataclass(frozen=True)
class Exception_:
    """What an architecture needs beyond the automation.

    Attributes:
        start: arguments of the config class, before shrinking.
        set: fields to set after shrinking, by dotted path.
        classes: names of model classes to use instead of the automatic choice.
        attention: the implementation, where its eager one has a defect.
        sharp: False where its code rounds to float32 on the way, so that nothing is gained by float64.
        train: True where its backward pass works in training mode only, in which it then runs, without dropout.
        contradiction: a piece of the error that transformers raises for every config, and what contradicts what there.
    """

    start: Mapping[str, Any] = field(default_factory=dict)
    set: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    attention: str = "eager"
    sharp: bool = True
    train: bool = False
    contradiction: tuple[str, str] = ("", "")


RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
# Automation drops the stages that a backbone hands out, since they change with its depth.
ON_RESNET = Exception_(
    start={"backbone_config": RESNET, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
    set={"backbone_config.out_features": ["stage4"]},
)
WINDOW = Exception_(set={"attention_window": 8})
"""Without padding to a whole window, whose rows have no key to attend to, and so no finite gradient."""
FOUR_LAYERS = Exception_(
    set={"backbone_config.num_hidden_layers": 4, "backbone_config.out_features": [f"stage{n}" for n in (1, 2, 3, 4)]}
)
HEADS = Exception_(start={"head_dim": 128})
MIXED_LAYERS = ["mamba", "attention"] * 16

FEW_QUERIES = Exception_(set={"num_queries": 10})
"""A small image has fewer places than the model picks."""
RT_DETR = Exception_(set={"num_queries": 10, "backbone_config.out_features": ["stage2", "stage3", "stage4"]})

BOOLEAN_MASK = Exception_(attention="sdpa")
"""Its eager attention takes the mask of numbers that it gets for a mask of flags: what may be seen is left out."""
NARROW_NET = {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}
FORECAST = Exception_(start={"prediction_length": 4, "num_time_features": 2})
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SOME_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
SOME_SPARSE = {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"] * 16}
SHORT_CODEC = {"num_filters": 8, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
EMU_TOKENS = {"<image>": 250, "<|extra_200|>": 249} | {f"<|visual token {n:06}|>": 4 + n for n in range(4)}
ALL_SHARED = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}
POINTMAP = {
    "upsample_out_channels": [16, 16],
    "conv_out_channels": [16],
    "scale_conv_out_channels": [16],
    "scale_final_hidden_sizes": [16, 16],
}
DETECTOR_WIDTHS = ["vision_config.fpn_hidden_size"] + [
    f"{part}_config.hidden_size" for part in ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
]
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}


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

EXCEPTIONS: dict[str, Exception_] = {
    "align": Exception_(set={f"vision_config.{k}": v for k, v in NARROW_NET.items()} | {"projection_dim": 80}),
    "align_vision_model": Exception_(set=NARROW_NET),
    "autoformer": Exception_(start=FORECAST.start, set={"label_length": 2}),
    "bamba": Exception_(start={"attn_layer_indices": [1]}),
    "blt": Exception_(set={"encoder_hash_byte_group_vocab": 64}),
    "chameleon_vqgan": Exception_(set={"base_channels": 32, "resolution": 64}),
    "chameleon": Exception_(start={"vocabulary_map": {"<image>": 250, "IMGIMGBZ": 4}}),
    "cohere_compass": Exception_(
        start={"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}}
    ),
    "cohere_compass_text": Exception_(start={"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}),
    "conditional_detr": ON_RESNET,
    "d_fine": RT_DETR,
    "dab-detr": ON_RESNET,
    "dbrx": Exception_(start={"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}),
    "deepseek_ocr2": Exception_(start={"text_config": SOME_SPARSE}),
    "deepseek_ocr2_text": Exception_(start=SOME_SPARSE),
    "deepseek_v2": Exception_(start={"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}),
    "deformable_detr": ON_RESNET,
    "depth_anything": FOUR_LAYERS,
    "detr": ON_RESNET,
    "diffusion_gemma": Exception_(start={"text_config": SOME_EXPERTS}),
    "diffusion_gemma_text": Exception_(start=SOME_EXPERTS),
    "dots1": Exception_(start={"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1}),
    "dots3_note": Exception_(set={"text_config.head_dim": 32}),
    "dots3_note_text": Exception_(set={"head_dim": 32}),
    "edgetam": Exception_(set={f"vision_config.{k}": v for k, v in REPVIT.items()}),
    "edgetam_video": replace(HIERA_VIDEO, set={**HIERA_VIDEO.set, "perceiver_resampler_num_latents_2d": 4}),
    "edgetam_vision_model": Exception_(set=REPVIT),
    "efficientnet": Exception_(start={"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}),
    "emu3": Exception_(
        start={"vocabulary_map": EMU_TOKENS},
        set={"vq_config.base_channels": 32, "vq_config.hidden_size": 128, "vq_config.codebook_size": 4},
    ),
    "emu3_vqgan": Exception_(set={"base_channels": 32, "hidden_size": 128, "codebook_size": 4}),
    "esm": Exception_(start={"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
    "esmfold2": Exception_(
        set={
            "single_inputs_size": 131,
            "pairwise_hidden_size": 32,
            "pair_transition_intermediate_size": 64,
            "folding_trunk_num_hidden_layers": 2,
            "structure_head.diffusion_module.pair_intermediate_size": 64,
            "atom_encoder.output_dim": 64,
            "atom_encoder.head_dim": 32,
            "structure_head.diffusion_module.atom_encoder.head_dim": 32,
        }
    ),
    "falcon_h1": Exception_(set={"mamba_d_ssm": 64}),
    "fast_vlm": Exception_(set={"vision_config.architecture": "fastvit_mci0", "vision_config.hidden_size": 1024}),
    "florence2": Exception_(
        set={
            "vision_config.embed_dim": [16, 32, 64, 128],
            "vision_config.num_heads": [1, 2, 4, 8],
            "vision_config.num_groups": [1, 2, 4, 8],
        }
    ),
    "fun_asr_nano": Exception_(set={"adaptor_config.intermediate_size": 16}),
    "gemma3n": Exception_(
        set={
            "text_config.num_kv_shared_layers": 0,
            "vision_config.architecture": "test_efficientnet",
            "vision_config.hidden_size": 256,
        }
    ),
    "gemma3n_text": Exception_(set={"num_kv_shared_layers": 0}),
    "gemma3n_vision": Exception_(set={"architecture": "test_efficientnet"}),
    "gemma4_assistant": Exception_(
        start={"text_config": ALL_SHARED},
        set={"text_config.num_kv_shared_layers": 4},
        contradiction=(
            "The set of layer types producing a cache is different than the set of layer types using them",
            "its config demands that all layers of its text model take keys and values from others, and that text "
            "model demands that one layer of each kind does not",
        ),
    ),
    "gemma4_unified": Exception_(
        start={"vision_config": {}, "audio_config": {}},
        set={"vision_config.mm_embed_dim": 64, "vision_config.patch_size": 4, "audio_config.audio_embed_dim": 64},
    ),
    "gemma4_unified_assistant": Exception_(
        set={
            "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
            "text_config.num_kv_shared_layers": 2,
        }
    ),
    "glm5_next": Exception_(set={"text_config.index_topk": 16}),
    "glm5_next_text": Exception_(set={"index_topk": 16}),
    "granite4_vision": Exception_(
        start={"downsample_rate": "4/8", "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1]}
    ),
    "granitemoehybrid": Exception_(start={"layer_types": MIXED_LAYERS}),
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS,
    "hunyuan_vl": Exception_(start={"text_config": {"head_dim": 128}}),
    "hunyuan_vl_text": HEADS,
    "idefics": Exception_(start={"use_resampler": True}),
    "informer": FORECAST,
    "instructblip": Exception_(set={"image_token_index": 255}),
    "instructblipvideo": Exception_(set={"video_token_index": 255}),
    "jamba": Exception_(start={"attn_layer_period": 2, "attn_layer_offset": 1}),
    "janus": Exception_(set={"vq_config.base_channels": 32}),
    "janus_vqgan": Exception_(set={"base_channels": 32, "num_patches": 4}),
    "led": WINDOW,
    "lfm2_moe": Exception_(start={"layer_types": ["conv", "full_attention"] * 16}),
    "longformer": WINDOW,
    "mamba2": Exception_(set={"num_heads": 8}),
    "ministral": HEADS,
    "molmo2": Exception_(set={"adapter_config.vision_feature_layer": [1, 0]}),
    "moonshine_streaming": Exception_(start={"num_key_value_heads": 8}),
    "muse_spark": Exception_(set={"audio_config.hidden_sizes": [16, 32, 64, 64], "text_config.moe_hidden_size": 64}),
    "muse_spark_audio": Exception_(set={"hidden_sizes": [16, 32, 64, 64]}),
    "nemotron": Exception_(start={"head_dim": 128, "num_key_value_heads": 8}),
    "nemotron3_5_asr": BOOLEAN_MASK,
    "nemotron_asr_streaming": BOOLEAN_MASK,
    "nemotron_asr_streaming_encoder": BOOLEAN_MASK,
    "neucodec": Exception_(sharp=False),
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
    "qwen2_5_omni": Exception_(set={"token2wav_config.bigvgan_config.upsample_initial_channel": 128}),
    "qwen2_5_omni_bigvgan": Exception_(set={"upsample_initial_channel": 128}),
    "qwen2_5_omni_dit": Exception_(attention="sdpa"),
    "qwen2_5_omni_token2wav": Exception_(set={"bigvgan_config.upsample_initial_channel": 128}),
    "qwen3_omni_moe": Exception_(
        start={"talker_config": {"text_config": {"shared_expert_intermediate_size": 32}, "spatial_merge_size": 2}},
        set={"talker_config.accept_hidden_layer": 1},
    ),
    "qwen3_omni_moe_talker_text": Exception_(start={"shared_expert_intermediate_size": 32}),
    "qwen4_exp": Exception_(set={f"text_config.{k}": v for k, v in INDEXER.items()}),
    "qwen4_exp_text": Exception_(set=INDEXER),
    "reformer": Exception_(train=True),
    "rf_detr": FEW_QUERIES,
    "rt_detr": RT_DETR,
    "rt_detr_v2": RT_DETR,
    "sam": Exception_(set={"prompt_encoder_config.image_embedding_size": 4, "prompt_encoder_config.image_size": 64}),
    "sam2_video": HIERA_VIDEO,
    "sam3_tracker_video": Exception_(set={"image_size": 56, **SMALL_FRAMES}),
    "seggpt": Exception_(
        set={
            "num_hidden_layers": 4,
            "merge_index": 0,
            "intermediate_hidden_state_indices": [1, 2, 3],
            "image_size": [64, 32],
            "pretrain_image_size": 32,
        }
    ),
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
    "slanet": Exception_(classes=("SLANetForTableRecognition",)),
    "table-transformer": ON_RESNET,
    "time_series_transformer": FORECAST,
    "timm_backbone": Exception_(start={"backbone": "test_resnet"}),
    "timm_wrapper": Exception_(set={"architecture": "test_vit"}),
    "upernet": Exception_(set={"backbone_config.out_features": ["stage1", "stage2", "stage3", "stage4"]}),
    "vibevoice": Exception_(
        set={f"{part}.{k}": v for part in ("audio_config", "semantic_model_config") for k, v in SHORT_CODEC.items()}
    ),
    "vibevoice_acoustic_tokenizer": Exception_(set=SHORT_CODEC, sharp=False),
    "vibevoice_acoustic_tokenizer_decoder": Exception_(set=SHORT_CODEC),
    "vibevoice_acoustic_tokenizer_encoder": Exception_(set=SHORT_CODEC),
    "vibevoice_asr": Exception_(
        set={
            f"{part}_tokenizer_encoder_config.{k}": v
            for part in ("acoustic", "semantic")
            for k, v in SHORT_CODEC.items()
        }
    ),
    "xcodec2": Exception_(sharp=False),
    "zamba": Exception_(
        start={"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
        set={"attention_head_dim": 32, "attention_hidden_size": 128},
    ),
}
