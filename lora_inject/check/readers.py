"""The readers: which formats each takes, and its rules, a row each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoraInjectError
from ..formats import FORMATS
from ..formats.format import format_named
from ..formats.native import LoraInject
from .facts import Facts
from .rules import (
    Rule,
    biases,
    expression,
    features,
    gaps,
    not_of,
    part_of_a_stack,
    rank_above,
    ranks_differ,
    scale_by_own_rank,
    scale_of_header,
    scale_without_root,
    unreadable,
    unselected,
    whole,
    wide,
)

SERVE = "write it with format='peft', profile='serve' (lora-inject convert --to peft --profile serve --model DIR)"
MERGE = "merge these into the base, or leave them out"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Reader:
    """A program that reads adapters.

    Attributes:
        name: its name.
        formats: the formats that it takes, the one to convert to first.
        rules: given the highest rank that it is started with, what it asks of an adapter.
    """

    name: str
    formats: tuple[str, ...]
    rules: Callable[[int], tuple[Rule, ...]]


def foreign(formats: Sequence[str], *, ours: bool) -> Rule:
    """Returns the rule that an adapter must be in one of these formats.

    A file of ours is made to be converted: it is judged by what it will be then.
    """

    def finds(facts: Facts) -> list[str]:
        other = facts.format not in formats and (facts.format == LoraInject.name) == ours
        return [f"{facts.path}: format {facts.format}"] if other else []

    return Rule(
        "format",
        "fine" if ours else "refused",
        finds,
        f"it reads {' and '.join(formats)} alone",
        f"convert it: lora-inject convert ADAPTER OUT --to {formats[0]}",
    )


def unwritable(formats: Sequence[str]) -> Rule:
    """Returns the rule that an adapter of another format must be one that the first of these can hold."""
    name = formats[0]

    def finds(facts: Facts) -> list[str]:
        if facts.format in formats or facts.bundle is None or name not in [one.name for one in FORMATS]:
            return []
        with tempfile.TemporaryDirectory() as folder:
            try:
                format_named(FORMATS, name).write(facts.bundle, Path(folder) / "adapter", facts.model)
            except LoraInjectError as error:
                return [str(error)]
        return []

    return Rule(
        "conversion", "refused", finds, f"the format {name} cannot hold it as it is", "do what the message says"
    )


COMMON = (
    Rule("more than low rank", "refused", features, "it knows low-rank pairs alone", "train without, or merge"),
    Rule("unreadable", "refused", unreadable, "lora_inject cannot tell what it does", "do what the message says"),
)
LINEAR = Rule(
    "no linear layer", "refused", not_of("linear", "transposed_linear"), "it adapts linear layers alone", MERGE
)
BIASES = Rule("biases", "refused", biases, "it has no biases in adapters", MERGE)
WHOLE = Rule("whole parameters", "refused", whole, "it takes nothing but low-rank pairs", MERGE)
ROUNDED = Rule("precision", "fine", wide, "they are rounded to the base's half precision", "nothing, or " + SERVE)
HEADER = Rule(
    "scale", "mis-scaled", scale_of_header, "rank_pattern and alpha_pattern are ignored: one alpha / r for all", SERVE
)


def _vllm(limit: int) -> tuple[Rule, ...]:
    start = f"start vLLM with a larger --max-lora-rank (of {', '.join(map(str, VLLM_RANKS))}), or resize the adapter"
    rank = Rule("rank", "refused", rank_above(limit), f"the rank must be at most {limit}", start)
    return (rank, LINEAR, BIASES, WHOLE, HEADER, ROUNDED)


def _sglang(limit: int) -> tuple[Rule, ...]:
    return (
        Rule("targets", "refused", expression, "target_modules must be a list", SERVE),
        LINEAR,
        BIASES,
        WHOLE,
        Rule("stacks", "refused", part_of_a_stack, "older ones fail where part of a stack has no adapter", SERVE),
        Rule("scale", "mis-scaled", scale_without_root, "older ones scale all by lora_alpha / r", SERVE),
        ROUNDED,
    )


def _tgi(limit: int) -> tuple[Rule, ...]:
    return (
        LINEAR,
        BIASES,
        WHOLE,
        Rule("ranks", "refused", ranks_differ, "all layers of a kind must have one rank", SERVE),
        Rule("gaps", "dropped", gaps, "a kind of layer is dropped as a whole where one layer has no adapter", SERVE),
        HEADER,
        ROUNDED,
    )


def _llama_cpp(limit: int) -> tuple[Rule, ...]:
    def converted(facts: Facts) -> list[str]:
        return scale_by_own_rank(facts) if facts.format == "peft" else []

    return (
        Rule(
            "kinds", "refused", not_of("linear", "transposed_linear", "embedding", "parameter"), "no such tensor", MERGE
        ),
        BIASES,
        WHOLE,
        Rule("scale", "mis-scaled", converted, "its converter of PEFT's files takes lora_alpha / rank for all", SERVE),
    )


def _diffusers(limit: int) -> tuple[Rule, ...]:
    return (
        Rule("kinds", "refused", not_of("linear", "conv"), "it adapts linear layers and convolutions", MERGE),
        WHOLE,
    )


def _peft(limit: int) -> tuple[Rule, ...]:
    fix = "correct target_modules, or load it here and export it again"
    return (
        Rule("targets", "dropped", unselected, "the config does not select these, and their tensors are left out", fix),
    )


def _mlx(limit: int) -> tuple[Rule, ...]:
    kinds = not_of("linear", "embedding", "parameter")
    return (Rule("kinds", "refused", kinds, "it adapts linear layers, embeddings and experts", MERGE), BIASES, WHOLE)


READERS: tuple[Reader, ...] = (
    Reader("vllm", ("peft",), _vllm),
    Reader("sglang", ("peft",), _sglang),
    Reader("tgi", ("peft",), _tgi),
    Reader("llama.cpp", ("gguf", "peft"), _llama_cpp),
    Reader("diffusers", ("diffusers", "kohya", "peft"), _diffusers),
    Reader("peft", ("peft",), _peft),
    Reader("mlx", ("mlx",), _mlx),
)
"""All readers that `check_adapter` knows."""
