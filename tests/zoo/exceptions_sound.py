"""Exceptions among models of sound, with images and text or without."""

from __future__ import annotations

from .exceptional import Exception_, Exceptions

BOOLEAN_MASK = Exception_(attention="sdpa")
"""Its eager attention takes the mask of numbers that it gets for a mask of flags: what may be seen is left out."""
SHORT_CODEC = {"num_filters": 8, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}

SOUND: Exceptions = {
    "dots3_note": Exception_(set={"text_config.head_dim": 32}),
    "dots3_note_text": Exception_(set={"head_dim": 32}),
    "fun_asr_nano": Exception_(set={"adaptor_config.intermediate_size": 16}),
    "inkling_audio": Exception_(sharp=False),
    "moonshine_streaming": Exception_(start={"num_key_value_heads": 8}),
    "muse_spark": Exception_(set={"audio_config.hidden_sizes": [16, 32, 64, 64], "text_config.moe_hidden_size": 64}),
    "muse_spark_audio": Exception_(set={"hidden_sizes": [16, 32, 64, 64]}, sharp=False),
    "nemotron3_5_asr": BOOLEAN_MASK,
    "nemotron_asr_streaming": BOOLEAN_MASK,
    "nemotron_asr_streaming_encoder": BOOLEAN_MASK,
    "neucodec": Exception_(sharp=False),
    "qwen2_5_omni": Exception_(set={"token2wav_config.bigvgan_config.upsample_initial_channel": 128}),
    "qwen2_5_omni_bigvgan": Exception_(set={"upsample_initial_channel": 128}),
    "qwen2_5_omni_dit": Exception_(attention="sdpa"),
    "qwen2_5_omni_token2wav": Exception_(set={"bigvgan_config.upsample_initial_channel": 128}),
    "qwen3_omni_moe": Exception_(
        start={"talker_config": {"text_config": {"shared_expert_intermediate_size": 32}, "spatial_merge_size": 2}},
        set={"talker_config.accept_hidden_layer": 1},
    ),
    "qwen3_omni_moe_talker_text": Exception_(start={"shared_expert_intermediate_size": 32}),
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
}
