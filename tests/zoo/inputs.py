"""Inputs with which a model runs, made from its config and the signature of its forward."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
ROWS = 2
TOKENS = 8
GRID = 4
"""Patches along each side of an image that is given as patches."""
MOST_WAYS = 12
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "decoder_input_ids")
MOST_REPAIRS = 5


def candidates(model: Any) -> Generator[Inputs, str, None]:
    """Yields inputs to try, the most complete first; takes the error message of the last try by `send`."""
    takes = inspect.signature(model.forward).parameters
    required = [
        name for name, p in takes.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    main = model.main_input_name
    mains = [main] if isinstance(main, str) else list(main)
    known = [name for name in takes if name in MAKERS and (name in required or name in mains or name not in OPTIONAL)]
    seen: set[tuple[str, ...]] = set()
    for group in _groups(known, [name for name in mains if name in takes], required):
        names = tuple(name for name in known if name in group)
        if names in seen or not set(required) <= set(names):
            continue
        seen.add(names)
        ways = [[(name, value) for value in MAKERS[name](model)] for name in names]
        for way in itertools.islice(itertools.product(*ways), MOST_WAYS):
            yield from repaired(model, dict(way))


def _groups(known: list[str], mains: list[str], required: list[str]) -> Iterable[list[str]]:
    """Yields sets of names: all, those without video, without sound, without both, and the least."""
    video = [name for name in known if "video" in name and name not in mains]
    still = [name for name in known if name not in video]
    decoder = [name for name in known if name.startswith("decoder_input")]
    yield known
    yield still
    yield [name for name in still if not name.startswith(("input_features", "audio"))]
    yield [name for name in still if not name.startswith(("pixel", "image"))]
    yield [*mains, *required, *decoder]
    yield [*mains, *required]
    yield [*required, *decoder]


def repaired(model: Any, inputs: Inputs) -> Generator[Inputs, str, None]:
    """Yields the inputs, then with as many placeholder tokens as the model says that it has features for."""
    wanted: dict[str, int] = {}
    plain = inputs
    for _ in range(MOST_REPAIRS):
        problem = yield inputs
        told = re.search(r"(\w+) features and (?:\w+ )?tokens do not match\D+(\d+)\D+(\d+)", problem or "")
        if told is None or "input_ids" not in inputs:
            return
        kind, count = told[1].lower(), int(told[3])
        if told[2] == told[3]:  # some count rows or elements there, and compare other numbers
            count = measured(model, kind, inputs)
        if wanted.get(kind) == count:
            return
        wanted[kind] = count
        inputs = placed(model, plain, wanted)


def measured(model: Any, kind: str, inputs: Inputs) -> int:
    """Returns how many tokens the features of all images, videos or sound take up, by running their tower."""
    name = f"get_{kind}_features"
    owner = next(module for module in model.modules() if hasattr(module, name))
    takes = inspect.signature(getattr(owner, name)).parameters
    hidden = "args" in takes  # behind a decorator
    sensed = {key: value for key, value in inputs.items() if key in takes or (hidden and key not in TEXT_INPUTS)}
    with torch.no_grad():
        features = getattr(owner, name)(**sensed)
    features = getattr(features, "pooler_output", features)
    pieces = [features] if isinstance(features, Tensor) else features
    return sum(piece.numel() for piece in pieces) // model.get_input_embeddings().weight.shape[1]


def placed(model: Any, inputs: Inputs, wanted: dict[str, int]) -> Inputs:
    """Returns the inputs with placeholder tokens for images, videos or sound in each row, text around them."""
    rows = []
    kinds = []
    plain = inputs["input_ids"]
    for kind in wanted:
        plain = torch.where(plain == placeholder(model.config, kind), 3, plain)
    for row in plain:
        pieces, types = [row[:2]], [torch.zeros(2)]
        for number, (kind, count) in enumerate(wanted.items()):
            token = placeholder(model.config, kind)
            share = -(-count // len(plain))
            pieces += [torch.full((share,), token), row[2 + number : 3 + number]]
            types += [torch.full((share,), {"image": 1, "video": 2, "audio": 3}.get(kind, 1)), torch.zeros(1)]
        rows.append(torch.cat([*pieces, row[-3:]]))
        kinds.append(torch.cat([*types, torch.zeros(3)]).long())
    found = inputs | {"input_ids": torch.stack(rows)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            found[name] = torch.stack(kinds)
    if "attention_mask" in inputs:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    return found


def placeholder(config: Any, kind: str) -> int:
    """Returns the token that stands for an image, a video or sound."""
    kinds = [kind, *(["image", "audio", "speech"] if kind == "multimodal" else [])]
    names = [f"{kind}_{suffix}" for kind in kinds for suffix in ("token_id", "token_index", "token_idx")]
    return int(setting(config, *names, default=1))


def setting(config: Any, *names: str, default: Any = None) -> Any:
    """Returns the first of the settings that the config, or one of its parts, has."""
    parts = [config]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
        parts += [value for value in vars(part).values() if hasattr(value, "model_type")]
    return default


def part(config: Any, *names: str) -> Any:
    """Returns the first of the sub-configs that there is, or the config itself."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), config)


def vision(config: Any) -> Any:
    """Returns the config of the vision tower."""
    return part(config, "vision_config", "vision_tower_config", "image_config", "backbone_config", "encoder")


def audio(config: Any) -> Any:
    """Returns the config of the audio tower."""
    return part(config, "audio_config", "audio_encoder_config", "encoder_config", "speech_config", "encoder")


def random(*shape: int) -> Tensor:
    """Returns fixed random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def integers(low: int, high: int, *shape: int) -> Tensor:
    """Returns fixed random integers from low to high - 1."""
    return torch.randint(low, max(high, low + 1), shape, generator=torch.Generator().manual_seed(0))


def _tokens(model: Any) -> list[Any]:
    vocabulary = setting(model.config, "vocab_size", "encoder_vocab_size", "src_vocab_size", default=32)
    return [integers(3, min(vocabulary, 96), ROWS, TOKENS)]


def _side(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[-2]), int(value[-1]))


def _images(model: Any) -> list[Any]:
    config = vision(model.config)
    names = ("image_size", "img_size", "resolution", "input_size", "crop_size")
    height, width = _side(setting(config, *names, default=64))
    channels = setting(config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
    channels = channels if isinstance(channels, int) else 3
    frames = setting(config, "num_frames", "frames_per_clip", default=4)
    still = random(ROWS, channels, height, width)
    found = [still, random(1, frames, channels, height, width), random(ROWS, 1, channels, height, width)]
    found.append(random(1, 2, channels, height, width))
    if "image_grid_thw" in _takes(model) or "grid_thw" in _takes(model):
        found.insert(0, patches(config, ROWS))
    return found


def patches(config: Any, images: int) -> Tensor:
    """Returns images as rows of flattened patches: (images * GRID * GRID, channels * frames * height * width)."""
    height, width = _side(setting(config, "patch_size", default=14))
    channels = setting(config, "in_channels", "num_channels", "in_chans", default=3)
    return random(images * GRID * GRID, channels * setting(config, "temporal_patch_size", default=1) * height * width)


def _videos(model: Any) -> list[Any]:
    still, clip, *_ = [value for value in _images(model) if value.dim() > 2]
    return [patches(vision(model.config), ROWS), clip] if "video_grid_thw" in _takes(model) else [clip, still]


def _takes(model: Any) -> Iterable[str]:
    return inspect.signature(model.forward).parameters


def _spectrum(model: Any) -> list[Any]:
    config = audio(model.config)
    names = ["num_mel_bins", "input_feat_per_channel", "input_feat_size", "feature_size", "n_mels", "input_dim"]
    bands = setting(config, *names, "n_mel_bins", default=80)
    frames = 2 * setting(config, "max_source_positions", default=32)
    first = random(ROWS, bands, frames)
    return [first, first.transpose(1, 2).contiguous(), first[:, None].transpose(2, 3).contiguous()]


def _sound(model: Any) -> list[Any]:
    wave = random(1, 6400)
    bands = setting(model.config, "num_mel_bins", default=128)
    return [wave, wave[:, None], random(1, setting(model.config, "max_length", default=100), bands)]


def _boxes(model: Any) -> list[Any]:
    corners = integers(0, 100, ROWS, TOKENS, 4).sort(-1).values
    return [corners, corners / 100, (corners / 100).repeat(1, 1, 2)]


def _hidden(model: Any) -> list[Any]:
    width = setting(model.config, "hidden_size", "d_model", "embed_dim", default=64)
    found = [random(ROWS, TOKENS, width), random(ROWS, width, TOKENS)]
    found.append(random(ROWS, TOKENS, setting(model.config, "input_dim", default=width)))
    return [patches(vision(model.config), ROWS), *found] if "grid_thw" in _takes(model) else found


def _grid(images: int) -> Callable[[Any], list[Any]]:
    return lambda model: [torch.tensor([[1, GRID, GRID]] * images)]


MAKERS: dict[str, Callable[[Any], list[Any]]] = {
    "input_ids": _tokens,
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "image_grid_thw": _grid(ROWS),
    "video_grid_thw": _grid(ROWS),
    "grid_thw": _grid(ROWS),
    "mm_token_type_ids": lambda model: [torch.zeros(ROWS, TOKENS, dtype=torch.long)],
    "input_features": _spectrum,
    "input_values": _sound,
    "decoder_input_ids": _tokens,
    "bbox": _boxes,
    "inputs_embeds": _hidden,
    "hidden_states": _hidden,
    "encoder_hidden_states": _hidden,
}
OPTIONAL = {"inputs_embeds", "hidden_states", "encoder_hidden_states"}
