"""Inputs that follow from what a model is, rather than from the names of its inputs one by one."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .inputs import GRID, ROWS, TOKENS, Inputs, integers, random, setting


def handed(model: Any) -> Iterator[Inputs]:
    """Yields inputs for the models of which the table knows."""
    for pattern, make in TABLE.items():
        if re.fullmatch(pattern, type(model).__name__):
            yield make(model.config)


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


def _spectrogram(config: Any) -> Inputs:
    return {"spectrogram": random(ROWS, TOKENS, config.model_in_dim)}


def _windows(config: Any) -> Inputs:
    length = 4 * config.patch_length
    zeros = torch.zeros(ROWS, length, dtype=torch.long)
    found = {"past_values": random(ROWS, length), "past_values_padding": zeros}
    return found if config.model_type == "timesfm2_5" else found | {"freq": zeros[:, :1]}


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


def _question(config: Any) -> Inputs:
    """Returns one prompt with two questions of two options each."""
    two = torch.tensor([[2, 2]])
    marks, types = torch.tensor([[3, 6]]), torch.tensor([[0, 1]])
    return {"input_ids": integers(3, 96, 1, TOKENS), "marks": marks, "num_options": two, "question_type_ids": types}


def _drafted(config: Any) -> Inputs:
    accepted = random(ROWS, TOKENS, config.hidden_size * len(config.target_layer_ids))
    return {"noise_embeds": random(ROWS, config.block_size, config.hidden_size), "context_hidden_states": accepted}


def _chunks(config: Any) -> Inputs:
    frames = 4 * config.n_window
    mask = torch.ones(ROWS, frames, dtype=torch.long)
    return {"input_features": random(ROWS, config.num_mel_bins, frames), "input_features_mask": mask}


def _stacked(config: Any) -> Inputs:
    width = config.num_mel_bins * config.num_stacked_frames
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    return {"input_features": random(ROWS, TOKENS, width), "input_features_mask": mask}


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


def _queries(config: Any) -> Inputs:
    return {
        "query_embeds": random(ROWS, 4, config.hidden_size),
        "encoder_hidden_states": random(ROWS, TOKENS, config.encoder_hidden_size),
    }


def _embedded(config: Any) -> Inputs:
    return {"inputs_embeds": random(ROWS, TOKENS, config.hidden_size), "num_patches": TOKENS // 2}


def _uncached(config: Any) -> Inputs:
    return {"input_ids": integers(3, 96, ROWS, 4 * TOKENS), "use_cache": False}


def _heard(config: Any) -> Inputs:
    frames = 16 * TOKENS
    return {
        "audio_mel": random(ROWS, frames, config.input_feat_size),
        "audio_mel_mask": torch.zeros(ROWS, frames, dtype=torch.bool),
    }


def _waves(config: Any) -> Inputs:
    lengths = torch.full((ROWS,), 8 * TOKENS * config.hop_length)
    return {"input_features": random(ROWS, config.feature_size, 8 * TOKENS), "chunk_sample_lengths": lengths}


def _shared(config: Any) -> Inputs:
    """Returns keys and values of the model that the assistant helps, one pair for each kind of layer."""
    text = config.text_config
    pair = random(ROWS, text.num_key_value_heads, TOKENS, text.head_dim)
    return {
        "inputs_embeds": random(ROWS, 1, 2 * config.backbone_hidden_size),
        "position_ids": torch.full((ROWS, 1), TOKENS),
        "shared_kv_states": {kind: (pair, pair.flip(-1)) for kind in set(text.layer_types)},
    }


def _pictured(config: Any) -> Inputs:
    """Returns a picture and a prompt with a place for each token that it becomes."""
    side = 32
    scale = 2 ** (len(config.vq_config.channel_multiplier) - 1)
    places = torch.full((1, (side // scale) ** 2 + side // scale), config.image_token_id)
    prompt = torch.cat([places, integers(3, 96, 1, TOKENS)], 1)
    size = torch.tensor([[side, side]])
    return {"input_ids": prompt, "pixel_values": random(1, 3, side, side), "image_sizes": size}


def _spoken(config: Any) -> Inputs:
    return {"inputs_embeds": random(ROWS, TOKENS, config.hidden_size)}


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


TABLE: dict[str, Callable[[Any], Inputs]] = {
    "(Autoformer|Informer|TimeSeriesTransformer)Model": _series,
    "Blip2QFormerModel": _queries,
    "Blt(Model|ForCausalLM)": _uncached,
    "DeepseekOcr2VisionEncoder": _embedded,
    "Dots3NoteAudioModel": _waves,
    "Emu3(Model|ForConditionalGeneration)": _pictured,
    "FunAsrNanoEncoder": _stacked,
    "Gemma3nAudioEncoder": _heard,
    "Gemma4(Unified)?AssistantForCausalLM": _shared,
    "Gemma4VisionModel": _placed,
    "InstructBlip(Video)?(Model|ForConditionalGeneration)": _instruct,
    "JevForDecision": _question,
    "(Mimi|PocketTTSAudioTokenizer)DecoderModel": _latents,
    "Molmo2Adapter": _pooled,
    "MuseGlimmerAssistantModel": _drafted,
    "OmDetTurboForObjectDetection": _sought,
    "OneFormer.*": _task,
    "PatchTS.*Model": _channels,
    "PeAudioVideoModel": _clip,
    "PeAudioVideoEncoder": _clip_alone,
    "PI0ForConditionalGeneration": _robot,
    "Qwen2_5OmniToken2WavBigVGANModel": _mel,
    "Qwen2_5OmniToken2WavDiTModel": _diffused,
    "Qwen2_5OmniToken2WavModel": _voice,
    "Qwen3ASREncoder": _chunks,
    "Qwen3OmniMoeTalkerModel": _spoken,
    "SegGpt.*": _example,
    "Siglip2VisionModel": _shaped,
    "EdgeTamVideoModel": _session("EdgeTamVideoInferenceSession"),
    "Sam2VideoModel": _session("Sam2VideoInferenceSession"),
    "Sam3TrackerVideoModel": _session("Sam3TrackerVideoInferenceSession"),
    "(SpeechT5|FastSpeech2Conformer)HifiGan": _spectrogram,
    "TimesFm(2_5)?Model": _windows,
    "VibeVoiceAcousticTokenizerEncoderModel": _wave,
}
