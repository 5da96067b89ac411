"""Inputs of text models, and of others without images and sound, that cannot be guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .inputs import GRID, ROWS, TOKENS, Inputs, integers, random

Makers = Mapping[str, Callable[[Any], Inputs]]


def ones(*shape: int) -> Tensor:
    """Returns a mask that leaves all in."""
    return torch.ones(shape, dtype=torch.long)


def tokens(*shape: int) -> Tensor:
    """Returns tokens, none of them special."""
    return integers(3, 96, *shape)


def text() -> Inputs:
    return {"input_ids": tokens(ROWS, TOKENS)}


def grid(images: int = ROWS, frames: int = 1) -> Tensor:
    """Returns frames, height and width of each image in patches."""
    return torch.tensor([[frames, GRID, GRID]] * images)


def blt_decoder(config: Any) -> Inputs:
    return {
        "inputs_embeds": random(ROWS, TOKENS, config.hidden_size),
        "patch_embeds": random(ROWS, 3, config.hidden_size_global),
    }


def blt_encoder(config: Any) -> Inputs:
    return text() | {"num_patches": 2, "patch_ids": torch.tensor([[0] * 3 + [1] * (TOKENS - 3)] * ROWS)}


def decision_transformer(config: Any) -> Inputs:
    return {
        "states": random(ROWS, TOKENS, config.state_dim),
        "actions": random(ROWS, TOKENS, config.act_dim),
        "rewards": random(ROWS, TOKENS, 1),
        "returns_to_go": random(ROWS, TOKENS, 1),
        "timesteps": torch.arange(TOKENS).repeat(ROWS, 1),
        "attention_mask": ones(ROWS, TOKENS),
    }


def rag(config: Any) -> Inputs:
    documents = config.n_docs * ROWS
    return text() | {
        "decoder_input_ids": tokens(ROWS, TOKENS),
        "context_input_ids": tokens(documents, TOKENS),
        "context_attention_mask": ones(documents, TOKENS),
        "doc_scores": random(ROWS, config.n_docs),
    }


def without_cache(config: Any) -> Inputs:
    return text() | {"use_cache": False}


def long_text(config: Any) -> Inputs:
    return {"input_ids": tokens(ROWS, math.prod(config.axial_pos_shape)), "use_cache": False}


TEXT: Makers = {
    "blt_local_decoder": blt_decoder,
    "blt_local_encoder": blt_encoder,
    "decision_transformer": decision_transformer,
    "rag": rag,
    "reformer": long_text,
    "rwkv": without_cache,
    "xlstm": without_cache,
}
