"""Inputs that make every part of a whole run, where plainer ones leave some idle."""

from __future__ import annotations

from typing import Any

import torch

from .given_text import Makers, ones, tokens
from .inputs import GRID, TOKENS, Inputs, integers, random

PATCHES = GRID * GRID


def gemma4_unified(config: Any) -> Inputs:
    """Returns an image and sound, both without a tower, and a prompt with a place for each piece of them."""
    vision = config.vision_config
    places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))[None]
    marks = [config.image_token_id] * PATCHES + [config.audio_token_id] * TOKENS
    prompt = torch.cat([tokens(1, TOKENS), torch.tensor([marks])], 1)
    return {
        "input_ids": prompt,
        "mm_token_type_ids": (prompt == config.image_token_id).long(),
        "pixel_values": random(1, PATCHES, 3 * vision.model_patch_size**2),
        "image_position_ids": places,
        "input_features": random(1, TOKENS, config.audio_config.audio_embed_dim),
        "input_features_mask": ones(1, TOKENS).bool(),
    }


def qwen2_5_omni(config: Any) -> Inputs:
    dit = config.token2wav_config.dit_config
    return {
        "input_ids": tokens(1, TOKENS),
        "code": integers(0, dit.num_embeds, 1, TOKENS),
        "conditioning": random(1, dit.enc_emb_dim),
        "reference_mel": random(1, TOKENS * dit.repeats, dit.mel_dim),
    }


def qwen3_omni_moe(config: Any) -> Inputs:
    sound = config.code2wav_config
    return {"input_ids": tokens(1, TOKENS), "codes": tokens(1, sound.num_quantizers, TOKENS)}


def sam3_video(config: Any) -> Inputs:
    """Returns a session with a video of two frames, and a text that says what to look for in it."""
    from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

    side = config.tracker_config.image_size
    frames = random(2, 3, side, side)
    session = Sam3VideoInferenceSession(frames, video_height=side, video_width=side, dtype=frames.dtype)
    prompt = session.add_prompt("something")
    session.prompt_input_ids[prompt] = tokens(1, TOKENS)
    session.prompt_attention_masks[prompt] = ones(1, TOKENS)
    return {"inference_session": session}


def vibevoice(config: Any) -> Inputs:
    samples = TOKENS * config.audio_config.hop_length
    return {
        "input_ids": tokens(1, TOKENS),
        "input_values": random(1, 1, samples),
        "padding_mask": ones(1, samples).bool(),
        "noisy": random(1, config.diffusion_head_config.latent_size),
        "times": torch.tensor([5.0]),
    }


def esmfold2(config: Any) -> Inputs:
    """Returns a protein of one chain, two atoms to a residue, with two sequences aligned to it."""
    atoms = 2 * TOKENS
    place, owner = torch.arange(TOKENS)[None], torch.arange(atoms)[None] // 2
    zero = torch.zeros(1, TOKENS, dtype=torch.long)
    residues = integers(2, 20, 1, TOKENS)
    return {
        "token_index": place,
        "residue_index": place,
        **dict.fromkeys(("asym_id", "sym_id", "entity_id", "mol_type"), zero),
        "res_type": residues,
        "token_bonds": random(1, TOKENS, TOKENS, 1),  # where it is zero, adding nothing turns -0.0 into 0.0
        "attention_mask": ones(1, TOKENS).bool(),
        "ref_pos": random(1, atoms, 3),
        "ref_charge": random(1, atoms),
        "atom_attention_mask": ones(1, atoms).bool(),
        "ref_element": integers(1, 20, 1, atoms),
        "ref_atom_name_chars": integers(1, 40, 1, atoms, config.max_chars),
        "ref_space_uid": owner,
        "atom_to_token": owner,
        "distogram_atom_idx": 2 * place,
        "msa": torch.stack([residues, residues.flip(-1)], 1),
        "input_ids": integers(4, 24, 1, TOKENS),
        "num_loops": 1,
        "num_diffusion_samples": 1,
        "num_sampling_steps": 3,
    }


WHOLES: Makers = {
    "esmfold2": esmfold2,
    "gemma4_unified": gemma4_unified,
    "qwen2_5_omni": qwen2_5_omni,
    "qwen3_omni_moe": qwen3_omni_moe,
    "sam3_video": sam3_video,
    "vibevoice": vibevoice,
}
