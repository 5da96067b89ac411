"""Inputs that a transformers model accepts, made from its config: enough to run it, not to get sense out of it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError

Inputs = dict[str, Tensor]


def example_inputs(model: Any) -> Inputs:
    """Returns keyword inputs with which the model runs: random tokens, images, sound, by what its forward takes.

    Everything that the forward takes is tried together first, so that both towers of a two-tower model run, then its
    main input alone. The same model always gets the same numbers.

    Args:
        model: a transformers model with weights, in eval mode.

    Raises:
        UnsupportedError: inputs of a kind that cannot be made from a config, or a forward that fails on all of them.
    """
    problem = f"its main input {model.main_input_name!r} is none that can be made from a config"
    for inputs in _candidates(model):
        try:
            check_inputs(model, inputs)
        except UnsupportedError as error:
            problem = str(error)
        else:
            return inputs
    raise UnsupportedError(
        f"no inputs found for {type(model).__name__}: {problem}. Give tensors of your own (command line: --inputs)"
    )


def check_inputs(model: Any, inputs: Mapping[str, Tensor]) -> None:
    """Runs the model once on keyword inputs.

    Raises:
        UnsupportedError: its forward fails; names the inputs, their shapes and the reason.
    """
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        raise UnsupportedError(f"its forward fails on {shapes}: {type(error).__name__}: {error}") from error


def _candidates(model: Any) -> Iterator[Inputs]:
    """Yields the inputs to try, most complete first."""
    takes = inspect.signature(model.forward).parameters
    names = [name for name in _MAKERS if name in takes]
    main = model.main_input_name
    seen: list[list[str]] = []
    for group in (names, [n for n in names if n in (main, "decoder_input_ids")], [main]):
        if main in group and set(group) <= set(_MAKERS) and group not in seen:
            seen.append(group)
            generator = torch.Generator().manual_seed(0)
            ways = [[(name, made) for made in _MAKERS[name](model, generator)] for name in group]
            yield from map(dict, itertools.product(*ways))


def _tokens(model: Any, generator: torch.Generator) -> list[Tensor]:
    """One row of plain tokens with the end token last, which some heads look for: 32 of them, or 4."""
    config = model.config.get_text_config()
    special = {token for name, value in config.to_dict().items() if name.endswith("_token_id") for token in _ids(value)}
    vocabulary = range(config.vocab_size)
    plain = torch.tensor([token for token in vocabulary if token not in special] or list(vocabulary))
    longest = min(32, getattr(config, "max_position_embeddings", None) or 32)
    row = plain[torch.randint(len(plain), (1, longest), generator=generator)]
    for end in _ids(getattr(config, "eos_token_id", None))[:1]:
        row[:, -1] = end if end in vocabulary else row[:, -1]
    return [row, row[:, -4:]]


def _ids(value: Any) -> list[int]:
    """Returns the ids that a setting holds: one, several or none."""
    return [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]


def _images(model: Any, generator: torch.Generator) -> list[Tensor]:
    """One image, or one clip, with the size and channels of the config."""
    size = _setting(model, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    shape = (_setting(model, "num_channels", 3), height, width)
    still = torch.randn(1, *shape, generator=generator)
    clip = torch.randn(1, _setting(model, "num_frames", 8), *shape, generator=generator)
    return [_cast(model, pixels) for pixels in (still, clip)]


def _spectrum(model: Any, generator: torch.Generator) -> list[Tensor]:
    """One spectrogram: bands first and of the full length, as Whisper has it, or frames first."""
    bands = _setting(model, "num_mel_bins", _setting(model, "input_feat_per_channel", 80))
    frames = 2 * _setting(model, "max_source_positions", 50)
    first = torch.randn(1, bands, frames, generator=generator)
    return [_cast(model, sound) for sound in (first, first[..., :100].transpose(1, 2).contiguous())]


def _sound(model: Any, generator: torch.Generator) -> list[Tensor]:
    """Half a second at 16 kHz, or the frames and bands of a spectrogram."""
    frames, bands = _setting(model, "max_length", 100), _setting(model, "num_mel_bins", 128)
    wave = torch.randn(1, 8000, generator=generator)
    return [_cast(model, sound) for sound in (wave, torch.randn(1, frames, bands, generator=generator))]


_MAKERS: Mapping[str, Callable[[Any, torch.Generator], list[Tensor]]] = {
    "input_ids": _tokens,
    "pixel_values": _images,
    "input_features": _spectrum,
    "input_values": _sound,
    "decoder_input_ids": _tokens,
}


def _setting(model: Any, name: str, default: Any) -> Any:
    """Returns a setting of the config, or of the first part of it (vision_config, ...) that has it."""
    config = model.config
    parts = [config, *(getattr(config, part, None) for part in ("vision_config", "audio_config", "encoder"))]
    return next((getattr(part, name) for part in parts if getattr(part, name, None) is not None), default)


def _cast(model: Any, tensor: Tensor) -> Tensor:
    return tensor.to(model.dtype)
