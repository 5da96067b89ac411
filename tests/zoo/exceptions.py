"""Where automation does not find a small model that builds and runs: what to set, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
        skip: why there is nothing to build or to run; empty where there is.
    """

    start: Mapping[str, Any] = field(default_factory=dict)
    set: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    attention: str = "eager"
    sharp: bool = True
    train: bool = False
    skip: str = ""


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

EXCEPTIONS: dict[str, Exception_] = {
    "bamba": Exception_(start={"attn_layer_indices": [1]}),
    "chameleon": Exception_(start={"vocabulary_map": {"<image>": 250, "IMGIMGBZ": 4}}),
    "conditional_detr": ON_RESNET,
    "dab-detr": ON_RESNET,
    "deepseek_v2": Exception_(start={"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}),
    "deformable_detr": ON_RESNET,
    "depth_anything": FOUR_LAYERS,
    "detr": ON_RESNET,
    "dots1": Exception_(start={"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1}),
    "efficientnet": Exception_(start={"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}),
    "esm": Exception_(start={"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
    "gemma3n_text": Exception_(set={"num_kv_shared_layers": 0}),
    "glm5_next": Exception_(set={"text_config.index_topk": 16}),
    "glm5_next_text": Exception_(set={"index_topk": 16}),
    "granitemoehybrid": Exception_(start={"layer_types": MIXED_LAYERS}),
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS,
    "hunyuan_vl": Exception_(start={"text_config": {"head_dim": 128}}),
    "hunyuan_vl_text": HEADS,
    "jamba": Exception_(start={"attn_layer_period": 2, "attn_layer_offset": 1}),
    "led": WINDOW,
    "lfm2_moe": Exception_(start={"layer_types": ["conv", "full_attention"] * 16}),
    "longformer": WINDOW,
    "mamba2": Exception_(set={"num_heads": 8}),
    "ministral": HEADS,
    "nemotron": Exception_(start={"head_dim": 128, "num_key_value_heads": 8}),
    "nemotron3_5_asr": BOOLEAN_MASK,
    "nemotron_asr_streaming": BOOLEAN_MASK,
    "nemotron_asr_streaming_encoder": BOOLEAN_MASK,
    "neucodec": Exception_(sharp=False),
    "prompt_depth_anything": FOUR_LAYERS,
    "reformer": Exception_(train=True),
    "rf_detr": FEW_QUERIES,
    "rt_detr": RT_DETR,
    "rt_detr_v2": RT_DETR,
    "sam": Exception_(set={"prompt_encoder_config.image_embedding_size": 4, "prompt_encoder_config.image_size": 64}),
    "slanet": Exception_(classes=("SLANetForTableRecognition",)),
    "table-transformer": ON_RESNET,
    "xcodec2": Exception_(sharp=False),
}
