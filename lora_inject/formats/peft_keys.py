"""The names of the tensors in PEFT's files, taken apart: every tensor stands for one thing, or is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import FormatError, UnsupportedError, listing

PREFIX = "base_model.model."
"""What PEFT puts before every path of the wrapped model."""
BASE = ".base_layer"
"""The child under which PEFT keeps the module that it wrapped."""
PAIR = ("lora_A.weight", "lora_B.weight")
BIAS = "lora_B.bias"
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
SLOTS = (*PAIR, BIAS, *EMBEDDING)


@dataclass(frozen=True)
class Keys:
    """What the names say.

    Attributes:
        levels: per module, the tensors of its low-rank pairs by slot, the outermost wrapper first: a wrapped parameter
            has one each, all others one in all.
        projections: modules that are the output projection of an attention that PEFT adapts as a whole.
        full: tensors that replace a parameter, by its path.
        twins: further copies of those, by the path of the parameter.
        idle: tensors that PEFT uses only while the adapter is switched off.
    """

    levels: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    projections: set[str] = field(default_factory=set)
    full: dict[str, str] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)


def sort_keys(names: Iterable[str], where: object) -> Keys:
    """Returns what the names say.

    Raises:
        UnsupportedError: names that belong to something other than LoRA; lists them.
        FormatError: names that no version of PEFT reads, or pairs that are not whole; lists them.
    """
    names = list(names)
    prefix = PREFIX if all(name.startswith(PREFIX) for name in names) else ""
    found, pairs = Keys(), dict[str, dict[str, str]]()
    strange = [name for name in names if not _sort(name, name.removeprefix(prefix), pairs, found)]
    dora = [name for name in strange if "lora_magnitude_vector" in name]
    if dora:
        raise UnsupportedError(
            f"{where}: DoRA, which scales every output, is more than a low-rank pair:\n{listing(dora)}"
        )
    if strange:
        raise FormatError(
            f"{where}: {len(strange)} tensors that belong to no low-rank pair of PEFT:\n{listing(strange)}"
        )
    for path, slots in pairs.items():
        if tuple(sorted(slots.keys() - {BIAS})) not in (PAIR, EMBEDDING) or (BIAS in slots and PAIR[0] not in slots):
            raise FormatError(f"{where}: {path}: {', '.join(sorted(slots))} make no pair: one tensor of it is missing")
    _stack(pairs, found, where)
    return found


def _sort(name: str, bare: str, pairs: dict[str, dict[str, str]], found: Keys) -> bool:
    """Puts one name where it belongs and says whether there is such a place."""
    slot = next((slot for slot in SLOTS if bare.endswith(f".{slot}")), None)
    if slot is not None:
        pairs.setdefault(bare.removesuffix(f".{slot}"), {})[slot] = name
        return True
    if re.search(r"(^|\.)lora_", bare) or "." not in bare.replace(BASE, ""):
        return False
    owner, _, parameter = bare.rpartition(".")
    if ".original_module" in bare:
        found.idle.append(name)
    elif owner.endswith(".modules_to_save"):
        found.twins[f"{owner.removesuffix('.modules_to_save')}.{parameter}"] = name
    else:
        full = bare.replace(f"{BASE}.", ".")
        twice = full in found.full
        found.full[full] = name
        return not twice
    return True


def _stack(pairs: dict[str, dict[str, str]], found: Keys, where: object) -> None:
    """Puts the pairs of one module's wrappers into a row, the outermost first."""
    depths: dict[str, dict[int, dict[str, str]]] = {}
    for path, slots in pairs.items():
        owner = re.sub(rf"(?:{re.escape(BASE)})+$", "", path)
        depth = (len(path) - len(owner)) // len(BASE)
        inner = owner.replace(f"{BASE}.", ".")
        if inner != owner:
            found.projections.add(inner)
        depths.setdefault(inner, {})[depth] = slots
    for owner, levels in depths.items():
        if sorted(levels) != list(range(len(levels))):
            raise FormatError(f"{where}: {owner}: a low-rank pair of one of its wrapped parameters is missing")
        found.levels[owner] = [levels[depth] for depth in range(len(levels))]
