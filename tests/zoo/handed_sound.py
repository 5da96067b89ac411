"""Inputs, by class of the model, for models of sound."""

from __future__ import annotations

from typing import Any

import torch

from .given_text import Makers
from .inputs import ROWS, TOKENS, Inputs, integers, random, setting


def _spectrogram(config: Any) -> Inputs:
    return {"spectrogram": random(ROWS, TOKENS, config.model_in_dim)}


def _latents(config: Any) -> Inputs:
    return {"latents": random(ROWS, setting(config, "hidden_size"), TOKENS)}


def _wave(config: Any) -> Inputs:
    return {"hidden_states": random(ROWS, config.channels, 64)}


def _mel(config: Any) -> Inputs:
    return {"mel_spectrogram": random(1, config.mel_dim, TOKENS)}


def _diffused(config: Any) -> Inputs:
    """Returns a noisy spectrogram, and the speaker, the codes and the time under which its noise is told."""
    frames = TOKENS * config.repeats
    return {
        "hidden_states": random(ROWS, frames, config.mel_dim),
        "condition_vector": random(ROWS, frames, config.mel_dim),
        "speaker_embedding": random(ROWS, frames, config.enc_emb_dim),
        "quantized_code": integers(0, config.num_embeds, ROWS, TOKENS),
        "time_step": torch.tensor(0.5),
    }


def _voice(config: Any) -> Inputs:
    dit = config.dit_config
    return {
        "code": integers(0, dit.num_embeds, 1, TOKENS),
        "conditioning": random(1, dit.enc_emb_dim),
        "reference_mel": random(1, TOKENS * dit.repeats, dit.mel_dim),
    }


def _chunks(config: Any) -> Inputs:
    frames = 4 * config.n_window
    mask = torch.ones(ROWS, frames, dtype=torch.long)
    return {"input_features": random(ROWS, config.num_mel_bins, frames), "input_features_mask": mask}


def _stacked(config: Any) -> Inputs:
    width = config.num_mel_bins * config.num_stacked_frames
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    return {"input_features": random(ROWS, TOKENS, width), "input_features_mask": mask}


def _heard(config: Any) -> Inputs:
    frames = 16 * TOKENS
    return {
        "audio_mel": random(ROWS, frames, config.input_feat_size),
        "audio_mel_mask": torch.zeros(ROWS, frames, dtype=torch.bool),
    }


def _waves(config: Any) -> Inputs:
    lengths = torch.full((ROWS,), 8 * TOKENS * config.hop_length)
    return {"input_features": random(ROWS, config.feature_size, 8 * TOKENS), "chunk_sample_lengths": lengths}


def _spoken(config: Any) -> Inputs:
    return {"inputs_embeds": random(ROWS, TOKENS, config.hidden_size)}


SOUND: Makers = {
    "Dots3NoteAudioModel": _waves,
    "FunAsrNanoEncoder": _stacked,
    "Gemma3nAudioEncoder": _heard,
    "(Mimi|PocketTTSAudioTokenizer)DecoderModel": _latents,
    "Qwen2_5OmniToken2WavBigVGANModel": _mel,
    "Qwen2_5OmniToken2WavDiTModel": _diffused,
    "Qwen2_5OmniToken2WavModel": _voice,
    "Qwen3ASREncoder": _chunks,
    "Qwen3OmniMoeTalkerModel": _spoken,
    "(SpeechT5|FastSpeech2Conformer)HifiGan": _spectrogram,
    "VibeVoiceAcousticTokenizerEncoderModel": _wave,
}
