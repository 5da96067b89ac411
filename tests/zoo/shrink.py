"""Makes a config small without breaking what its numbers have to do with each other.

Fields are known by their names. Equal names get equal values, so that sizes that must agree still do: every hidden
size becomes 64, every head count 4 and every head size 16. Lists with one entry per layer keep one layer of each kind.
"""

from __future__ import annotations

from typing import Any

from .fields import DERIVED, FIXED, LAYER_INDICES, LAYERS, PER_TOKEN, SMALL, TOKEN, VALUES, VOCABULARY

MOST_LAYERS = 5


def shrink(fields: dict[str, Any], narrow: bool = True) -> dict[str, Any]:
    """Returns the fields of a config, made small; sub-configs are dicts within.

    Args:
        fields: what `config.to_dict()` gives.
        narrow: also make layers thin; else only their number and the vocabulary shrink.
    """
    tokens: dict[int, int] = {}
    return _shrink(fields, narrow, tokens)


def _shrink(fields: dict[str, Any], narrow: bool, tokens: dict[int, int]) -> dict[str, Any]:
    fields = {str(name): value for name, value in fields.items() if name not in DERIVED}
    fields = _keep_stages(_cut_layers(fields)) if narrow else _cut_layers(fields)
    return {name: _value(name, value, fields, narrow, tokens) for name, value in fields.items()}


def _value(name: str, value: Any, fields: dict[str, Any], narrow: bool, tokens: dict[int, int]) -> Any:
    if isinstance(value, dict):
        return value if name in ("id2label", "label2id") else _shrink(value, narrow, tokens)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, list):
        return _list(name, value, fields, narrow)
    if not isinstance(value, int):
        return value
    if TOKEN.fullmatch(name) and value >= VOCABULARY // 2:
        return tokens.setdefault(value, VOCABULARY - 1 - len(tokens))
    if PER_TOKEN.fullmatch(name):
        return min(value, 2)
    return _sized(name, value, fields, narrow)


def _sized(name: str, value: int, fields: dict[str, Any], narrow: bool) -> int:
    if value < 0:  # settled by _keep_stages
        return -value if name in ("embed_dim", "hidden_size") else value
    group = next((key for key, names in FIXED.items() if name in names), None)
    if group == "kv" and narrow:
        return min(value, 4 if value in [fields.get(name) for name in FIXED["heads"]] else 2)
    if group == "layers":
        return value
    if group in ("vocabulary", "experts", "positions"):
        return min(value, VALUES[name])
    if group is not None and narrow:
        return min(value, VALUES[name])
    if name in ("image_size", "img_size", "resolution"):
        return _image(value, fields)
    return min(value, SMALL[name]) if name in SMALL else value


def _image(value: int, fields: dict[str, Any]) -> int:
    patch = fields.get("patch_size")
    return min(value, 4 * patch if isinstance(patch, int) and patch >= 8 else 64)


def _list(name: str, value: list[Any], fields: dict[str, Any], narrow: bool) -> list[Any]:
    if name in ("depths", "blocks_per_stage", "encoder_blocks", "decoder_blocks", "stage_num_blocks"):
        return [1 for _ in value]
    if name in ("image_size", "img_size") and all(isinstance(side, int) for side in value):
        return [_image(side, fields) for side in value]
    if LAYER_INDICES.fullmatch(name):
        return sorted({min(index, LAYERS - 1) for index in value})
    if name == "mrope_section" and narrow:
        return [2, 3, 3]
    if name == "conv_dim" and narrow:
        return [min(width, 32) for width in value]
    return value


def _cut_layers(fields: dict[str, Any]) -> dict[str, Any]:
    """Makes the model shallow; of lists with an entry per layer, one layer of every kind is left."""
    cut = dict(fields)
    for name in FIXED["layers"]:
        count = fields.get(name)
        if isinstance(count, int) and not isinstance(count, bool) and count > LAYERS:
            lists = [key for key, value in fields.items() if isinstance(value, list) and len(value) == count]
            dicts = [key for key, value in fields.items() if _by_layer(value, count)]
            columns = [fields[key] for key in lists]
            columns += [[_at(fields[key], index) for index in range(count)] for key in dicts]
            kept = _one_of_each(columns, count)
            cut |= {key: [fields[key][i] for i in kept] for key in lists} | {name: len(kept)}
            cut |= {key: _renumbered(fields[key], kept) for key in dicts}
    return cut


def _by_layer(value: Any, count: int) -> bool:
    """Says whether the value is a dict from the numbers of layers."""
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() and int(key) < count for key in value)


def _at(by_layer: dict[Any, Any], index: int) -> Any:
    return next((value for key, value in by_layer.items() if int(key) == index), None)


def _renumbered(by_layer: dict[Any, Any], kept: list[int]) -> dict[Any, Any]:
    found = {new: _at(by_layer, old) for new, old in enumerate(kept)}
    return {new: value for new, value in found.items() if value is not None}


def _keep_stages(fields: dict[str, Any]) -> dict[str, Any]:
    """Keeps the width of a model with stages, whose heads are listed by stage, a multiple of its heads."""
    heads = next((fields[name] for name in FIXED["heads"] if isinstance(fields.get(name), list)), None)
    width = fields.get("embed_dim")
    if heads is None or not isinstance(width, int):
        return fields
    thin = width * 16 // (width // heads[0]) if heads[0] else width
    return fields | {"embed_dim": -thin, "hidden_size": -thin * 2 ** (len(heads) - 1)}


def _one_of_each(columns: list[list[Any]], count: int) -> list[int]:
    """Returns the first layer of each kind, in order, and at least LAYERS of them."""
    kinds = [repr([column[index] for column in columns]) for index in range(count)]
    first = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())[:MOST_LAYERS]
    others = [index for index in range(count) if index not in first]
    return sorted(first + others[: max(0, LAYERS - len(first))])
