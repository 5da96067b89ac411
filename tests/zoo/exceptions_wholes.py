"""Exceptions among wholes of text with images or sound: where the joints between their parts have to be cut to size."""

from __future__ import annotations

from dataclasses import replace

from .exceptional import Exception_, Exceptions
from .exceptions_images import IMAGES
from .exceptions_sound import SOUND
from .exceptions_text import TEXT

FOUR_TOKENS = Exception_(set={"mm_tokens_per_image": 4})
ONE_TILE = Exception_(set={"image_grid_pinpoints": [[56, 56]]})
"""An image as large as one tile, which comes with its overview as a second one."""
CODES = {f"IMGIMG{letter}Z": 4 + number for number, letter in enumerate("ABCD")}
THIN_SAM = Exception_(set={"vision_config.sam_config.downsample_channels": [32, 64]})

WHOLES: Exceptions = {
    "aria": Exception_(set={"projector_patch_to_query_dict": {16: 4}}),
    "chameleon": Exception_(
        start={"vocabulary_map": {"<image>": 250, **CODES}}, set={"vq_config.num_embeddings": 4, "image_token_id": 250}
    ),
    "deepseek_ocr2": replace(TEXT["deepseek_ocr2"], set=THIN_SAM.set),
    "emu3": replace(IMAGES["emu3"], set={**IMAGES["emu3"].set, "image_token_id": 250}),
    "gemma3": FOUR_TOKENS,
    "granite4_vision": replace(
        IMAGES["granite4_vision"], set={"image_grid_pinpoints": [[256, 256]], "vision_config.image_size": 256}
    ),
    "kosmos-2.5": Exception_(set={"latent_query_num": 4}),
    "kimi_k25": Exception_(set={"projection_hidden_size": 64}),
    "llama4": Exception_(
        set={
            "vision_config.intermediate_size": 256,
            "vision_config.projector_input_dim": 64,
            "vision_config.projector_output_dim": 64,
            "vision_config.vision_output_dim": 64,
        }
    ),
    "llava_next": ONE_TILE,
    "llava_next_video": ONE_TILE,
    "llava_onevision": ONE_TILE,
    "mllama": Exception_(
        set={
            "vision_config.intermediate_layers_indices": [0, 2],
            "vision_config.num_global_layers": 2,
            "vision_config.vision_output_dim": 192,
            "text_config.cross_attention_layers": [1],
        }
    ),
    "molmo2": replace(IMAGES["molmo2"], set={**IMAGES["molmo2"].set, "vision_config.num_position_embeddings": 16}),
    "muse_glimmer": Exception_(set={"out_hidden_size": 256}),
    "muse_spark": replace(SOUND["muse_spark"], set={**SOUND["muse_spark"].set, "out_hidden_size": 256}),
    "phi4_multimodal": Exception_(
        set={"audio_config.ext_pw_out_channel": 64, "audio_config.depthwise_separable_out_channel": 64}
    ),
    "shieldgemma2": FOUR_TOKENS,
    "t5gemma2": Exception_(set={"encoder.mm_tokens_per_image": 4}),
    "unlimited_ocr": THIN_SAM,
    "vipllava": Exception_(set={"vision_feature_layers": [-1, -2]}),
    "voxtral": Exception_(start={"audio_token_id": 250}),
}
