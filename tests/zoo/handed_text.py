"""Inputs, by class of the model, for models of text, and for others without images and sound."""

from __future__ import annotations

from typing import Any

import torch

from .given_text import Makers
from .inputs import ROWS, TOKENS, Inputs, integers, random


def _series(config: Any) -> Inputs:
    """Returns the past and the future of two series, with the time features that the config asks for."""
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    times = random(ROWS, past + future, config.num_time_features)
    return {
        "past_values": random(ROWS, past),
        "past_time_features": times[:, :past],
        "past_observed_mask": torch.ones(ROWS, past),
        "future_values": random(ROWS, future),
        "future_time_features": times[:, past:],
    }


def _channels(config: Any) -> Inputs:
    return {"past_values": random(ROWS, config.context_length, config.num_input_channels)}


def _windows(config: Any) -> Inputs:
    length = 4 * config.patch_length
    zeros = torch.zeros(ROWS, length, dtype=torch.long)
    found = {"past_values": random(ROWS, length), "past_values_padding": zeros}
    return found if config.model_type == "timesfm2_5" else found | {"freq": zeros[:, :1]}


def _question(config: Any) -> Inputs:
    """Returns one prompt with two questions of two options each."""
    two = torch.tensor([[2, 2]])
    marks, types = torch.tensor([[3, 6]]), torch.tensor([[0, 1]])
    return {"input_ids": integers(3, 96, 1, TOKENS), "marks": marks, "num_options": two, "question_type_ids": types}


def _drafted(config: Any) -> Inputs:
    accepted = random(ROWS, TOKENS, config.hidden_size * len(config.target_layer_ids))
    return {"noise_embeds": random(ROWS, config.block_size, config.hidden_size), "context_hidden_states": accepted}


def _queries(config: Any) -> Inputs:
    return {
        "query_embeds": random(ROWS, 4, config.hidden_size),
        "encoder_hidden_states": random(ROWS, TOKENS, config.encoder_hidden_size),
    }


def _embedded(config: Any) -> Inputs:
    return {"inputs_embeds": random(ROWS, TOKENS, config.hidden_size), "num_patches": TOKENS // 2}


def _uncached(config: Any) -> Inputs:
    return {"input_ids": integers(3, 96, ROWS, 4 * TOKENS), "use_cache": False}


def _shared(config: Any) -> Inputs:
    """Returns keys and values of the model that the assistant helps, one pair for each kind of layer."""
    text = config.text_config
    pair = random(ROWS, text.num_key_value_heads, TOKENS, text.head_dim)
    return {
        "inputs_embeds": random(ROWS, 1, 2 * config.backbone_hidden_size),
        "position_ids": torch.full((ROWS, 1), TOKENS),
        "shared_kv_states": {kind: (pair, pair.flip(-1)) for kind in set(text.layer_types)},
    }


TEXT: Makers = {
    "(Autoformer|Informer|TimeSeriesTransformer)Model": _series,
    "Blip2QFormerModel": _queries,
    "Blt(Model|ForCausalLM)": _uncached,
    "DeepseekOcr2VisionEncoder": _embedded,
    "Gemma4(Unified)?AssistantForCausalLM": _shared,
    "JevForDecision": _question,
    "MuseGlimmerAssistantModel": _drafted,
    "PatchTS.*Model": _channels,
    "TimesFm(2_5)?Model": _windows,
}
