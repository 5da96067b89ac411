"""Inputs with sound, or codes of sound, that cannot be guessed."""

from __future__ import annotations

from typing import Any

import torch

from .given_text import Makers, ones, text, tokens
from .inputs import ROWS, TOKENS, Inputs, integers, random, setting


def audioflamingo3(config: Any) -> Inputs:
    frames = 2 * config.max_source_positions
    return {
        "input_features": random(ROWS, config.num_mel_bins, frames),
        "input_features_mask": ones(ROWS, frames),
    }


def bark(config: Any) -> Inputs:
    codes = tokens(ROWS, TOKENS, config.fine_acoustics_config.n_codes_total)
    return text() | {"codes": codes}


def dia_decoder(config: Any) -> Inputs:
    return {
        "input_ids": tokens(ROWS, TOKENS, config.num_channels),
        "encoder_hidden_states": random(ROWS, TOKENS, config.cross_hidden_size),
    }


def gemma4_audio(config: Any) -> Inputs:
    return {"input_features": random(ROWS, 48, 128)}


def granite_speech(config: Any) -> Inputs:
    return {"input_features": random(ROWS, 64, 4 * setting(config, "num_mel_bins"))}


def inkling(config: Any) -> Inputs:
    """Returns sound as the number of a level for each band of each frame."""
    return {"audio_input_ids": integers(0, config.mel_vocab_size, ROWS, TOKENS, config.n_mel_bins)}


def kyutai(config: Any) -> Inputs:
    return {"input_ids": tokens(ROWS, TOKENS, config.num_codebooks + 1)}


def moshi_depth(config: Any) -> Inputs:
    codes = tokens(ROWS, config.num_codebooks)
    return {"input_ids": codes, "last_hidden_state": random(ROWS, 1, config.input_size)}


def codebooks(config: Any) -> Inputs:
    return {"input_ids": tokens(ROWS * config.num_codebooks, TOKENS)}


def muse(config: Any) -> Inputs:
    return {"input_values": random(ROWS, 4 * config.samples_per_token)}


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


def qwen_audio(config: Any) -> Inputs:
    frames = 2 * config.n_window
    return {"input_features": random(config.num_mel_bins, frames + 40), "feature_lens": torch.tensor([frames, 40])}


def code_predictor(config: Any) -> Inputs:
    return {"inputs_embeds": random(ROWS, TOKENS, config.hidden_size)}


def speecht5(config: Any) -> Inputs:
    return {"input_values": random(ROWS, 6400), "decoder_input_ids": integers(3, config.vocab_size, ROWS, TOKENS)}


def timed(config: Any) -> Inputs:
    return text() | {"t_cond": random(1, 1, config.hidden_size)}


SOUND: Makers = {
    "audioflamingo3_encoder": audioflamingo3,
    "bark": bark,
    "dia_decoder": dia_decoder,
    "gemma4_audio": gemma4_audio,
    "granite_speech5_ctc": granite_speech,
    "granite_speech5_encoder": granite_speech,
    "inkling_audio": inkling,
    "kyutai_speech_to_text": kyutai,
    "moshi_depth": moshi_depth,
    "muse_spark_audio": muse,
    "musicgen": musicgen,
    "musicgen_decoder": codebooks,
    "musicgen_melody": musicgen_melody,
    "musicgen_melody_decoder": codebooks,
    "nemotron3_5_asr": nemotron,
    "nemotron_asr_streaming": nemotron,
    "nemotron_asr_streaming_encoder": nemotron,
    "neucodec": two_towers,
    "qwen2_5_omni_audio_encoder": qwen_audio,
    "qwen3_omni_moe_audio_encoder": qwen_audio,
    "qwen3_omni_moe_talker_code_predictor": code_predictor,
    "speecht5": speecht5,
    "voxtral_realtime_text": timed,
    "wav2vec2-bert": semantic,
    "xcodec2": two_towers,
}
