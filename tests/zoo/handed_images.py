"""Inputs, by class of the model, for models of images and videos."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from .given_text import Makers
from .inputs import GRID, ROWS, TOKENS, Inputs, integers, random


def _instruct(config: Any) -> Inputs:
    """Returns an image, or a video, a question to the query transformer, and a prompt with places for its answers."""
    side, frames = config.vision_config.image_size, 2
    moves = hasattr(config, "video_token_index")
    token = config.video_token_index if moves else config.image_token_index
    places = torch.full((ROWS, config.num_query_tokens * (frames if moves else 1)), 255 if token is None else token)
    text = integers(3, 96, ROWS, TOKENS)
    prompt = torch.cat([places, text], 1)
    return {
        "pixel_values": random(ROWS, *([frames] if moves else []), 3, side, side),
        "qformer_input_ids": text,
        "qformer_attention_mask": torch.ones_like(text),
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
    }


def _shaped(config: Any) -> Inputs:
    """Returns images as rows of patches, with the size of each image in patches."""
    rows = GRID * GRID
    return {
        "pixel_values": random(ROWS, rows, config.num_channels * config.patch_size**2),
        "pixel_attention_mask": torch.ones(ROWS, rows, dtype=torch.long),
        "spatial_shapes": torch.tensor([[GRID, GRID]] * ROWS),
    }


def _placed(config: Any) -> Inputs:
    """Returns images as rows of patches, with the place of each patch."""
    side = 2 * config.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(ROWS, -1, -1)
    rows = torch.rand(ROWS, side * side, 3 * config.patch_size**2, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": rows, "pixel_position_ids": places}


def _example(config: Any) -> Inputs:
    """Returns an image, and a prompt: another image and its mask; the config has the size of both together."""
    shape = (1, config.num_channels, config.image_size[0] // 2, config.image_size[1])
    prompt = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": random(*shape), "prompt_pixel_values": prompt, "prompt_masks": prompt.flip(-1)}


def _task(config: Any) -> Inputs:
    return {
        "pixel_values": random(1, 3, 64, 64),
        "task_inputs": integers(1, 96, 1, config.task_seq_len),
    }


def _robot(config: Any) -> Inputs:
    vlm = config.vlm_config
    side = vlm.vision_config.image_size
    places = (side // vlm.vision_config.patch_size) ** 2
    text = integers(3, 96, ROWS, TOKENS)
    prompt = torch.cat([torch.full((ROWS, places), vlm.image_token_index), text], 1)
    return {
        "state": random(ROWS, config.max_state_dim),
        "noise": random(ROWS, config.chunk_size, config.max_action_dim),
        "timestep": torch.full((ROWS,), 0.5),
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "pixel_values": random(ROWS, 1, 3, side, side),
        "pixel_attention_mask": torch.ones(ROWS, 1, dtype=torch.bool),
    }


def _pooled(config: Any) -> Inputs:
    features = random(1, GRID * GRID, config.hidden_size * len(config.vision_feature_layer))
    return {"image_features": features, "pooled_patches_idx": torch.arange(GRID * GRID).view(-1, 4)}


def _pictured(config: Any) -> Inputs:
    """Returns a picture and a prompt with a place for each token that it becomes."""
    side = 32
    scale = 2 ** (len(config.vq_config.channel_multiplier) - 1)
    places = torch.full((1, (side // scale) ** 2 + side // scale), config.image_token_id)
    prompt = torch.cat([places, integers(3, 96, 1, TOKENS)], 1)
    size = torch.tensor([[side, side]])
    return {"input_ids": prompt, "pixel_values": random(1, 3, side, side), "image_sizes": size}


def _sought(config: Any) -> Inputs:
    """Returns two images, a task for each, and two classes to look for in each."""
    classes, tasks = integers(3, 96, 4, TOKENS), integers(3, 96, 2, TOKENS)
    return {
        "pixel_values": random(2, 3, config.image_size, config.image_size),
        "classes_input_ids": classes,
        "classes_attention_mask": torch.ones_like(classes),
        "tasks_input_ids": tasks,
        "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.tensor([2, 2]),
    }


def _session(name: str) -> Callable[[Any], Inputs]:
    """Returns a maker of a session with a video of two frames and a point on an object in the first."""

    def make(config: Any) -> Inputs:
        side = config.prompt_encoder_config.image_size
        module = importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
        frames = random(2, 3, side, side)
        session = getattr(module, name)(frames, video_height=side, video_width=side, dtype=frames.dtype)
        point = {"point_coords": torch.full((1, 1, 1, 2), side / 2), "point_labels": torch.ones(1, 1, 1).int()}
        session.add_point_inputs(session.obj_id_to_idx(1), 0, point)
        session.obj_with_new_inputs = [1]
        return {"inference_session": session}

    return make


def _clip(config: Any) -> Inputs:
    """Returns two videos with their sound, and a text for each."""
    text = integers(3, 96, 2, TOKENS)
    return {
        "input_ids": text,
        "pixel_values_videos": random(2, 4, 3, 64, 64),
        "input_values": random(2, 1, 6400),
    }


def _clip_alone(config: Any) -> Inputs:
    return {name: value for name, value in _clip(config).items() if name != "input_ids"}


IMAGES: Makers = {
    "EdgeTamVideoModel": _session("EdgeTamVideoInferenceSession"),
    "Emu3(Model|ForConditionalGeneration)": _pictured,
    "Gemma4VisionModel": _placed,
    "InstructBlip(Video)?(Model|ForConditionalGeneration)": _instruct,
    "Molmo2Adapter": _pooled,
    "OmDetTurboForObjectDetection": _sought,
    "OneFormer.*": _task,
    "PI0ForConditionalGeneration": _robot,
    "PeAudioVideoEncoder": _clip_alone,
    "PeAudioVideoModel": _clip,
    "Sam2VideoModel": _session("Sam2VideoInferenceSession"),
    "Sam3TrackerVideoModel": _session("Sam3TrackerVideoInferenceSession"),
    "SegGpt.*": _example,
    "Siglip2VisionModel": _shaped,
}
