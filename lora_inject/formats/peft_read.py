"""Reading PEFT's folder: config and tensors to factors in the order of the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import FormatError, MismatchError, UnsupportedError
from ..tree import walk
from .content import CONFIG, Content
from .factors import Factors
from .peft_config import VERSION, PeftConfig, parse_config, version_of
from .peft_experts import from_peft, order
from .peft_keys import BIAS, EMBEDDING, PAIR, Keys, sort_keys
from .peft_layouts import OUTPUT_FACTOR
from .peft_limits import check_conv, check_padding
from .peft_patterns import ends
from .prefixes import aligned
from .resolve import Parsed

LAST_DOUBLED = version_of(VERSION)


class Reading:
    """One folder of PEFT while it is read."""

    def __init__(self, content: Content, model: nn.Module | None) -> None:
        """Reads config and tensors.

        Raises:
            FormatError: the config is missing, or one of both is broken.
            UnsupportedError: the adapter is more than low-rank pairs and trained parameters.
        """
        self.path = content.path
        file = content.file.parent / CONFIG
        if content.config is None:
            raise FormatError(f"{file}: missing: without it nobody knows alpha: put it beside {content.file.name}")
        self.config: PeftConfig = parse_config(content.config, file)
        self.keys: Keys = sort_keys(content.names, content.file)
        self.tensors: dict[str, Tensor] = content.read(model)
        self.modules = {path: node.module for node in walk(model) for path in node.paths} if model is not None else None
        found = None if self.modules is None else aligned(list(self.keys.levels), self.modules)
        self._place: Callable[[str], str] = found[0] if found else str

    def module(self, path: str) -> nn.Module | None:
        """Returns the model's module for a path as the file spells it, or None without one."""
        return None if self.modules is None else self.modules.get(self._place(path))

    def parsed(self) -> Parsed:
        """Returns all that the folder holds.

        Raises:
            FormatError: config and tensors contradict each other.
            MismatchError: a pair does not fit the model.
            UnsupportedError: a parameter's pair, and no model to say how it lies in there.
        """
        factors = [one for path, levels in self.keys.levels.items() for one in self._module(path, levels)]
        full = {path: self.tensors[name] for path, name in self.keys.full.items()}
        return Parsed(path=self.path, factors=factors, full=self._checked(full), notes=self._notes())

    def _module(self, path: str, levels: list[dict[str, str]]) -> list[Factors]:
        names = self._parameters(path, levels)
        if names == ["weight"] and isinstance(self.module(path), nn.Linear):
            return [self._pair(path, f"{path}.weight", levels[0])]
        if names:
            pairs = zip(names, levels, strict=True)
            return [self._parameter(path, name, slots) for name, slots in pairs]
        if self._attention(path):
            # PEFT adds no bias to the packed projection, whatever the file holds.
            packed = replace(self._pair(path, path, levels[0]), bias=None)
            return [replace(packed, kind="attention", parameter="in_proj_weight")]
        if path in self.keys.projections:
            return [self._projection(path, levels[0])]
        return [self._fitting(self._pair(path, path, levels[0]))]

    def _pair(self, path: str, key: str, slots: Mapping[str, str]) -> Factors:
        """Returns the pair of a module; `key` is the path by which the config knows it."""
        first, second = PAIR if PAIR[0] in slots else EMBEDDING
        a, b = self.tensors[slots[first]], self.tensors[slots[second]]
        self._check_rank(path, key, a, a.shape[0] if a.dim() else 0)
        linear = "transposed_linear" if self.config.fan_in_fan_out else "linear"
        return Factors(
            path=path,
            a=a,
            b=b,
            bias=self.tensors[slots[BIAS]] if BIAS in slots else None,
            alpha=self.config.alpha_of(key),
            rslora=self.config.rslora,
            dropout=self.config.dropout,
            kind="embedding" if first in EMBEDDING else linear if a.dim() == 2 else "conv",
        )

    def _fitting(self, factors: Factors) -> Factors:
        """Returns the factors after a look at what PEFT does otherwise in their module."""
        module = self.module(factors.path)
        if module is not None and factors.kind == "conv":
            check_conv(factors, module)
        return check_padding(factors, module) if module is not None and factors.kind == "embedding" else factors

    def _projection(self, path: str, slots: Mapping[str, str]) -> Factors:
        """Returns the pair of an attention's output projection, as large as PEFT makes it."""
        version = self.config.version
        if version is not None and LAST_DOUBLED is not None and version > LAST_DOUBLED:
            raise UnsupportedError(
                f"{self.path}: {path}: PEFT up to {VERSION} adds the update of an attention's output projection twice; "
                "a newer one wrote this adapter, and whether it still does is not known here: merge the adapter in PEFT"
            )
        output = self._pair(path, path.rpartition(".")[0], slots)
        bias = None if output.bias is None else output.bias / OUTPUT_FACTOR  # that, PEFT adds once
        return replace(output, alpha=output.alpha * OUTPUT_FACTOR, bias=bias)

    def _attention(self, path: str) -> bool:
        """Says whether the pair belongs to the packed input projection of an attention."""
        projected = f"{path}.out_proj" in self.keys.projections
        if isinstance(self.module(path), nn.MultiheadAttention) and not projected:
            raise FormatError(f"{self.path}: {path}: the pair of its out_proj is missing: PEFT always writes both")
        return projected

    def _parameters(self, path: str, levels: list[dict[str, str]]) -> list[str]:
        """Returns the parameters that the pairs of a module belong to, in the same order; none for the module's own."""
        module = self.module(path)
        if module is None:
            if len(levels) > 1 or ends(path, [name.rpartition(".")[0] for name in self.config.parameters]):
                raise UnsupportedError(
                    f"{self.path}: {path}: low-rank pairs of single parameters (target_parameters): only the model "
                    "tells which of them a pair belongs to, and how it lies in there: give one (--model DIR)"
                )
            return []
        wanted = [name for name in module._parameters if ends(f"{path}.{name}", self.config.parameters)]
        found = order(module, wanted)
        if len(found) != len(levels) and (found or len(levels) > 1):
            raise MismatchError(
                f"{self.path}: {path}: {len(levels)} low-rank pairs for the parameters "
                f"{', '.join(found) or '(none)'} that target_parameters selects"
            )
        return found

    def _parameter(self, path: str, name: str, slots: Mapping[str, str]) -> Factors:
        module = self.module(path)
        assert module is not None
        if set(slots) != set(PAIR):
            raise FormatError(f"{self.path}: {path}.{name}: {', '.join(sorted(slots))} are no pair of a parameter")
        pair = self.tensors[slots[PAIR[0]]], self.tensors[slots[PAIR[1]]]
        if any(tensor.dim() != 2 for tensor in pair):
            raise FormatError(f"{self.path}: {path}.{name}: the pair of a parameter must be two matrices")
        a, b = from_peft(path, name, pair, module, self.config.version, self.path)
        key = f"{path}.{name}"
        factors = Factors(
            path=path, a=a, b=b, alpha=self.config.alpha_of(key), rslora=self.config.rslora, parameter=name
        )
        self._check_rank(key, key, pair[0], factors.rank)
        return factors

    def _check_rank(self, path: str, key: str, a: Tensor, rank: int) -> None:
        wanted = self.config.rank_of(key)
        if rank != wanted:
            raise FormatError(
                f"{self.path}: {path}: A {tuple(a.shape)} has rank {rank}, and {self.config.file} says {wanted} "
                "(r, rank_pattern): which of both scales it, nobody knows"
            )

    def _checked(self, full: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the trained values after comparing those that the file holds twice."""
        differ = [
            path
            for path, name in self.keys.twins.items()
            if path not in full or not torch.equal(full[path], self.tensors[name])
        ]
        if differ:
            raise FormatError(f"{self.path}: {', '.join(differ[:3])}: the file holds two values that differ")
        return full

    def _notes(self) -> tuple[str, ...]:
        if not self.keys.idle:
            return ()
        return (f"{len(self.keys.idle)} tensors called original_module are the base's: they take no part",)
