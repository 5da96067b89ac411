"""Small language models from configs, with fewer key than query heads, and adapters on them that do something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lora_inject as li

SIZES = {
    "vocab_size": 29,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "phi3": ("Phi3", {}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"head_dim": 8, "decoder_sparse_step": 1}),
    "gpt_oss": ("GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "rope_parameters": ROPE}),
}
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
ATTENTION = ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"]
MLP = ["*.mlp.gate_proj", "*.mlp.up_proj", "*.mlp.down_proj"]
PACKED = ["*.experts.gate_up_proj", "*.experts.down_proj"]


def causal(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """Returns the same model at every call."""
    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES | dict(own) | options)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    if "experts" in str(own):
        model.config._experts_implementation = "eager"
    return model.to(dtype)


def adapted(model: nn.Module, targets: Sequence[Any], dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Injects adapters and fills both factors with random numbers."""
    li.inject(model, list(targets), **{"rank": 4, "alpha": 8, "dtype": dtype} | options)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.2)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits.double()


def changed(model: nn.Module, updates: Mapping[str, Tensor]) -> nn.Module:
    """Returns the model with updates added to parameters: the reference that knows of no adapter."""
    with torch.no_grad():
        for path, update in updates.items():
            weight = model.get_parameter(path)
            assert weight.shape == update.shape, path
            weight += update.to(weight.dtype)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in li.adapter_state(model).items()}


def assert_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype and torch.equal(tensor, right[key]), key


def turned(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns rows in transformers' order from Meta's: row 2 i of a head becomes row i, row 2 i + 1 row i + half."""
    size = rows.shape[0] // heads
    found = torch.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            found[head * size + i] = rows[head * size + 2 * i]
            found[head * size + size // 2 + i] = rows[head * size + 2 * i + 1]
    return found
