"""Which projections are one in some models and several in others, and in which the order of the rows is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import MismatchError, listing
from ..factored import FactoredAdapter
from ..host import base_class
from ..registry import adapter_for
from ..tree import Node

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Fusion:
    """One projection and its parts.

    Attributes:
        whole: name of the projection, or of the parameter.
        parts: names of its parts, in the order of their rows.
        owners: classes of the module that holds the projection, in which its rows are those of the parts, one part
            after the other; read from the code of transformers 5.23 and torch.
        equal: whether all parts have equally many rows; else the second and the third have.
        parameter: whether the whole is a parameter of its owner, not a module.
    """

    whole: str
    parts: tuple[str, ...]
    owners: frozenset[str]
    equal: bool = True
    parameter: bool = False


FUSIONS = (
    Fusion("qkv_proj", QKV, frozenset({"Phi3Attention", "Phi4MultimodalAttention"}), equal=False),
    Fusion(
        "gate_up_proj",
        ("gate_proj", "up_proj"),
        frozenset({"Phi3MLP", "Phi4MultimodalMLP", "GlmMLP", "Glm4MLP", "Glm4vTextMLP", "DiaMLP"}),
    ),
    Fusion("c_attn", QKV, frozenset({"GPT2Attention", "DecisionTransformerGPT2Attention", "ImageGPTAttention"})),
    Fusion("Wqkv", QKV, frozenset({"ModernBertAttention", "MptAttention"})),
    Fusion("in_proj_weight", QKV, frozenset({"MultiheadAttention"}), parameter=True),
)
"""What is rewritten. A file's fused projection is split for a model that has the parts by the same table."""

UNKNOWN = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "gate_up_proj")
"""Names of fused projections whose rows, in owners that the table does not list, may be in any order."""


@dataclass(frozen=True)
class StandIn:
    """A path that the model lacks, because it has the parts, or the whole, in its place.

    Attributes:
        fusion: which projection.
        owner: path of the module that holds it.
        module: that module.
        part: name of the part that the path means; None for the whole.
    """

    fusion: Fusion
    owner: str
    module: nn.Module
    part: str | None


def stand_ins(nodes: Mapping[str, Node]) -> dict[str, StandIn]:
    """Returns the paths that files may have beside the model's own."""
    found: dict[str, StandIn] = {}
    for path, node in nodes.items():
        module = node.module
        names = {known.__name__ for known in base_class(module).__mro__}
        for fusion in FUSIONS:
            if not fusion.parameter and set(fusion.parts) <= set(module._modules):
                found[under(path, fusion.whole)] = StandIn(fusion, path, module, None)
            elif fusion.owners & names and whole_of(module, fusion) is not None:
                found |= {under(path, part): StandIn(fusion, path, module, part) for part in fusion.parts}
    return {path: stand_in for path, stand_in in found.items() if path not in nodes}


def whole_of(module: nn.Module, fusion: Fusion) -> Tensor | nn.Module | None:
    """Returns the fused projection of its owner, None where that has it not."""
    return (module._parameters if fusion.parameter else module._modules).get(fusion.whole)


def under(path: str, name: str) -> str:
    """Returns the path of what a module holds under a name."""
    return f"{path}.{name}".lstrip(".")


def rows_of(whole: Tensor | nn.Module | None) -> int:
    """Returns how many rows a parameter has, or how many outputs a linear layer; 0 for what is neither."""
    if isinstance(whole, Tensor):
        return int(whole.shape[0])
    kind = None if whole is None else adapter_for(whole)
    if whole is None or kind is None or not issubclass(kind, FactoredAdapter):
        return 0
    return int(kind.shape(whole, {})[1 if kind.transposed else 0])


def check_rows(paths: Iterable[str], nodes: Mapping[str, Node], where: object) -> None:
    """Refuses projections that only one of file and model has fused, in an order of rows that the table lacks.

    Raises:
        MismatchError: there are some.
    """
    parts = {name for fusion in FUSIONS for name in fusion.parts}
    problems = []
    for path in paths:
        owner, _, name = path.rpartition(".")
        if path in nodes or owner not in nodes:
            continue
        here = nodes[owner].module._modules
        there = [other for other in (UNKNOWN if name in parts else QKV if name in UNKNOWN else ()) if other in here]
        if there:
            problems.append(f"{path}: the model has {', '.join(there)}")
    if problems:
        raise MismatchError(
            f"{where}: one of file and model has projections in one piece, the other in parts, and nothing says how "
            f"the rows of these lie (some are interleaved by head):\n{listing(problems)}\n"
            "Convert the base too, or the adapter with the program that converted the base."
        )
