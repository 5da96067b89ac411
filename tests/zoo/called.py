"""What users call of models whose class has no forward, or one for a part alone: the forward that they get here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def bark(self: Any, input_ids: Tensor, codes: Tensor) -> dict[str, Any]:
    """The four stages of `generate`: text to meaning, to coarse codes, to fine codes, to sound."""
    return {
        "semantic": self.semantic(input_ids=input_ids).logits,
        "coarse": self.coarse_acoustics(input_ids=input_ids).logits,
        "fine": [self.fine_acoustics(codebook, input_ids=codes).logits for codebook in range(1, codes.shape[-1])],
        "sound": self.codec_decode(codes.transpose(1, 2)),
    }


def encode(self: Any, hidden_states: Tensor) -> Any:
    """The only method of a quantizer."""
    return self.encode(hidden_states)


def to_codes(self: Any, pixel_values: Tensor) -> Any:
    """The only method of an encoder of pictures."""
    return self.encode(pixel_values)


def to_codes_and_back(self: Any, pixel_values: Tensor, image_sizes: Tensor) -> dict[str, Any]:
    """Both methods of an encoder and decoder of pictures."""
    seen = self.encode(pixel_values, image_sizes)
    return {"seen": seen.last_hidden_state, "drawn": self.decode(torch.stack(seen.image_tokens))}


def omni(self: Any, input_ids: Tensor, code: Tensor, conditioning: Tensor, reference_mel: Tensor) -> dict[str, Any]:
    """One step of each of the three stages of `generate`: text, to codes of speech, to sound."""
    thought = self.thinker(input_ids=input_ids, output_hidden_states=True)
    spoken = self.talker(
        input_text_ids=input_ids,
        inputs_embeds=thought.hidden_states[0] + thought.hidden_states[-1],
        attention_mask=torch.ones_like(input_ids),
    )
    sound = self.token2wav(code, conditioning=conditioning, reference_mel=reference_mel)
    return {"text": thought.logits, "codes": spoken.logits, "sound": sound}


def omni_moe(self: Any, input_ids: Tensor, codes: Tensor) -> dict[str, Any]:
    """One step of each of the four stages of `generate`: text, to first codes of speech, to all codes, to sound."""
    talker = self.talker
    thought = self.thinker(input_ids=input_ids, output_hidden_states=True)
    text = talker.text_projection(thought.hidden_states[0])
    heard = talker.hidden_projection(thought.hidden_states[talker.config.accept_hidden_layer])
    spoken = talker(inputs_embeds=text + heard, output_hidden_states=True)
    first = talker.get_input_embeddings()(codes[:, 0, :1])
    residual = talker.code_predictor(inputs_embeds=torch.cat([spoken.hidden_states[0][-1][:, -1:], first], 1))
    sound = self.code2wav(codes)
    return {"text": thought.logits, "codes": spoken.logits, "residual": residual.logits, "sound": sound}


def spoken_text(
    self: Any, input_ids: Tensor, input_values: Tensor, padding_mask: Tensor, noisy: Tensor, times: Tensor
) -> dict[str, Any]:
    """A step of `generate`: the next token, and a step of the diffusion that makes sound out of the last state."""
    read = self.model(input_ids=input_ids, input_values=input_values, padding_mask=padding_mask, sample=False)
    last = read.last_hidden_state[:, -1]
    return {"logits": self.lm_head(last), "noise": self.model.diffusion_head(noisy, times, last)}


def fold(self: Any, **features: Any) -> Any:
    """The way to a structure, with gradients, and how sure it is, without: what that reads is overwritten in place.

    What users call calls the model in turn, for its trunk alone.
    """
    if "atom_inputs" in features:
        return _beyond(self, fold)(self, **features)
    found = type(self).fold.__wrapped__(self, **features)
    learnt = ("distogram_logits", "sample_atom_coords")
    return {name: value if name in learnt else value.detach() for name, value in found.items()}


def _beyond(self: Any, forward: Any) -> Any:
    """Returns the forward that a class would have without this one."""
    forwards = [vars(cls)["forward"] for cls in type(self).__mro__ if "forward" in vars(cls)]
    return forwards[forwards.index(forward) + 1]


def track(self: Any, inference_session: Any) -> list[Any]:
    """Follows what is marked in the first frame into the second, which remembers the first; gradients are on."""
    forward = _with_gradients(self)
    return [forward(self, inference_session, frame_idx=frame) for frame in (0, 1)]


def find_and_track(self: Any, inference_session: Any) -> list[Any]:
    """Finds in both frames what a text describes, and follows it, with gradients in the tracker within, too."""
    tracker = self.tracker_model
    with mock.patch.object(type(tracker), "forward", _with_gradients(tracker)):
        return track(self, inference_session)


def _with_gradients(model: Any) -> Any:
    """Returns the forward within a decorator that switches gradients off."""
    forwards = [vars(cls).get("forward") for cls in type(model).__mro__]
    return next(found.__wrapped__ for found in forwards if hasattr(found, "__wrapped__"))


CALLED: dict[str, Callable[..., Any]] = {
    "bark": bark,
    "chameleon_vqgan": to_codes,
    "emu3_vqgan": to_codes_and_back,
    "esmfold2": fold,
    "glm_image_vqmodel": encode,
    "qwen2_5_omni": omni,
    "qwen3_omni_moe": omni_moe,
    "sam3_video": find_and_track,
    "vibevoice": spoken_text,
}
CALLED |= dict.fromkeys(("edgetam_video", "sam2_video", "sam3_tracker_video"), track)


def with_forward(name: str, model_class: Any) -> Any:
    """Returns the model class of the architecture of this name, with a forward where it has none."""
    forward = CALLED.get(name)
    return type(model_class.__name__, (model_class,), {"forward": forward}) if forward else model_class
