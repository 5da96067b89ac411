"""The files of kohya's sd-scripts, and of LyCORIS in their style: one file, paths as one word behind a prefix."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import FormatError, MismatchError, UnsupportedError, listing
from ..host import base_tensor
from ..safewrite import write_tensors
from ..tree import walk
from .bundle import Bundle, Source
from .components import check_one
from .content import Content
from .factors import Factors
from .format import Format
from .kohya_names import Spelling, prefix_of
from .kohya_write import network, tensors_of
from .resolve import Parsed, resolve
from .trained import as_updates

DOWN, UP, MID, ALPHA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"
WHOLE = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
"""Updates of a whole parameter, added without any scale."""
FEATURES = {
    "dora_scale": "DoRA's magnitudes",
    "hada_": "LoHa's Hadamard products",
    "lokr_": "LoKr's Kronecker products",
    "oft_": "OFT's rotations",
    "a1.": "GLoRA",
    "a2.": "GLoRA",
    "b1.": "GLoRA",
    "b2.": "GLoRA",
    "on_input": "(IA)^3's factors",
}

ORIGINAL = re.compile(r"^lora_unet_(double_blocks|single_blocks|joint_blocks)_\d")

Modules = Mapping[str, Mapping[str, str]]
"""Keys of the file by the module's name in it, then by what they hold."""


class Kohya(Format):
    """Low-rank pairs `lora_down`, `lora_up` with an `alpha` each, LoCon's and LyCORIS' full updates beside them."""

    name = "kohya"

    def recognises(self, content: Content) -> bool:
        return any(prefix_of(name.partition(".")[0]) for name in content.names)

    def read(self, content: Content, model: nn.Module | None) -> Source:
        if model is None:
            raise UnsupportedError(
                f"{content.path}: kohya's files write paths as one word, in which '.' and '_' are the same: name the "
                "model that the file is for (--model), so that its own paths tell them apart"
            )
        modules = _by_module(content)
        numbers = content.numbers(keys[ALPHA] for keys in modules.values() if ALPHA in keys)
        tensors = content.read(model, [key for keys in modules.values() for what, key in keys.items() if what != ALPHA])
        pairs = {module: keys for module, keys in modules.items() if DOWN in keys}
        spelling = Spelling(model)
        hosts = {name: node.module for node in walk(model) for path in node.paths for name in spelling(path)}
        _check_names(content, modules, spelling, hosts)
        tensors |= {
            keys[DOWN]: _merged(content, module, [tensors[keys[part]] for part in (DOWN, MID, UP)], hosts.get(module))
            for module, keys in pairs.items()
            if MID in keys
        }
        factors = [_factors(content, module, keys, tensors, numbers) for module, keys in pairs.items()]
        parsed = Parsed(
            path=content.path,
            factors=factors,
            updates={
                f"{module}.{WHOLE[what]}": tensors[key]
                for module, keys in modules.items()
                for what, key in keys.items()
                if what in WHOLE
            },
            spell=spelling,
            notes=tuple(_notes(content, modules, tensors)),
        )
        return resolve(parsed, model)

    def write_sites(self, bundle: Bundle, path: Path, model: nn.Module | None) -> Path:
        if bundle.full and model is None:
            raise UnsupportedError(
                f"{bundle.path}: holds parameters that were trained as a whole, which this format stores as updates of "
                f"the base:\n{listing(list(bundle.full))}\nName the base with its weights (--model)."
            )
        bundle = bundle if model is None else as_updates(bundle, model)
        tensors = tensors_of(bundle, model)
        return write_tensors(path, tensors, network(tensors))


def _by_module(content: Content) -> Modules:
    """Returns the file's keys by module.

    Raises:
        FormatError: tensors of a feature that has no counterpart here, of no known meaning, or half a pair.
    """
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    stray: list[str] = []
    for key in content.names:
        module, _, what = key.partition(".")
        feature = next((said for start, said in FEATURES.items() if what.startswith(start)), None)
        if feature is not None and prefix_of(module):
            named = [name for name in content.names if name.partition(".")[2].startswith(what)]
            raise FormatError(
                f"{content.path}: {feature}, which have no counterpart here, in {len(named)} tensors:\n"
                f"{listing(named)}\nMerge the file into its base with the program that it comes from."
            )
        if prefix_of(module) and what in (DOWN, UP, MID, ALPHA, *WHOLE):
            modules[module][what] = key
        else:
            stray.append(key)
    halves = [module for module, keys in modules.items() if not _complete(keys)]
    stray += [key for module in halves for key in modules[module].values()]
    if stray:
        raise FormatError(
            f"{content.path}: {len(stray)} tensors of no known meaning, or without their other half:\n{listing(stray)}"
        )
    return modules


def _complete(keys: Mapping[str, str]) -> bool:
    pair = {DOWN, UP} <= keys.keys()
    return pair or not keys.keys() & {DOWN, UP, MID, ALPHA}


def _factors(
    content: Content, module: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
) -> Factors:
    down, up = tensors[keys[DOWN]], tensors[keys[UP]]
    if min(down.dim(), up.dim()) < 2:
        raise FormatError(f"{content.path}: {module}: lora_down and lora_up must have two axes or more")
    alpha = numbers[keys[ALPHA]] if ALPHA in keys else float(down.shape[0])
    if alpha == 0:
        raise FormatError(
            f"{content.path}: {module}: alpha is 0, which sd-scripts reads as alpha = rank and other programs as no "
            "update: write the alpha that is meant into the file"
        )
    return Factors(path=module, a=down, b=up, alpha=alpha, kind="linear" if down.dim() == 2 else "conv")


def _merged(content: Content, module: str, parts: Sequence[Tensor], host: nn.Module | None) -> Tensor:
    """Returns lora_mid times lora_down: Delta W[o, c, ...] = sum_ij up[o, i] mid[i, j, ...] down[j, c].

    Where the model has no such module, which is said later or not wanted, lora_down as it is. The product can be far
    larger than the file, so that its shape is compared with the weight's before it is taken.
    """
    down, mid, up = parts
    rank = down.shape[0] if down.dim() else 0
    fits = mid.dim() > 2 and tuple(mid.shape[:2]) == (rank, rank) and up.dim() > 1 and up.shape[1] == rank
    if not fits or down.dim() < 2 or down[0].numel() != down.shape[1]:
        raise FormatError(
            f"{content.path}: {module}: lora_down {tuple(down.shape)}, lora_mid {tuple(mid.shape)} and lora_up "
            f"{tuple(up.shape)} are no Tucker decomposition"
        )
    if host is None:
        return down
    weight, found = base_tensor(host, "weight"), (up.shape[0], down.shape[1], *mid.shape[2:])
    if weight is None or tuple(weight.shape) != found:
        raise MismatchError(
            f"{content.path}: {module}: a Tucker decomposition of shape {found} for {type(host).__name__} with "
            f"{'no weight' if weight is None else f'a weight of shape {tuple(weight.shape)}'}"
        )
    product = torch.einsum("ij...,jc->ic...", mid.double(), down.double().flatten(1))
    return product.to(torch.promote_types(mid.dtype, down.dtype))


def _notes(content: Content, modules: Modules, tensors: Mapping[str, Tensor]) -> Iterable[str]:
    """Yields what was rewritten, and where the metadata say another rank than the tensors; these are right."""
    tucker = sum(MID in keys for keys in modules.values())
    if tucker:
        yield (
            f"{tucker} Tucker decompositions were rewritten as pairs: lora_mid times lora_down, in float64 and rounded "
            "once"
        )
    said = content.metadata.get("ss_network_dim", "")
    linear = [tensors[keys[DOWN]] for keys in modules.values() if DOWN in keys and MID not in keys]
    ranks = sorted({tensor.shape[0] for tensor in linear if tensor[0].numel() == tensor.shape[1]})
    if said.isdecimal() and ranks and [int(said[:9])] != ranks:
        have = ", ".join(map(str, ranks[:8]))
        yield f"the metadata say rank {said[:9]} (ss_network_dim), the tensors have {have}"


def _check_names(content: Content, modules: Iterable[str], spelling: Spelling, known: Collection[str]) -> None:
    """Refuses names that fit by accident, and those of another code than the model's."""
    if not spelling.parts.several:
        check_one(content.path, {f"{prefix_of(module)}_..." for module in modules if module in known})
    original = [module for module in modules if ORIGINAL.search(module) and module not in known]
    if original:
        raise UnsupportedError(
            f"{content.path}: {len(original)} names are those of the original code of Flux or Stable Diffusion 3, "
            f"whose blocks are other ones than this model's:\n{listing(original)}\nLoad the file with diffusers "
            "(load_lora_weights), save it there (save_lora_weights), and read that file."
        )
