"""Makes a config small without breaking what its numbers have to do with each other.

Fields are known by their names. Equal names get equal values, so that sizes that must agree still do: every hidden
size becomes 64, every head count 4 and every head size 16. Lists with one entry per layer keep one layer of each kind.
"""

from __future__ import annotations

import re
from typing import Any

LAYERS = 2
MOST_LAYERS = 5
VOCABULARY = 256

FIXED: dict[str, dict[str, int]] = {
    "layers": dict.fromkeys(
        """num_hidden_layers num_layers n_layers n_layer encoder_layers decoder_layers num_encoder_layers depth
        num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers speech_encoder_layers
        text_encoder_layers speaker_encoder_layers resampler_depth num_blocks memory_attention_num_layers layers
        memory_fuser_num_layers t2u_encoder_layers t2u_decoder_layers conf_num_hidden_layers l_layers x_layers r_layers
        text_encoder_num_layers query_dec_layers decoder_num_layers num_mel_attn_blocks pred_num_hidden_layers
        num_pooler_layers num_encoder_blocks_per_stage encoder_blocks num_timestamp_prediction_layers resampler_layers
        num_auxiliary_layers num_self_attends_per_block mask_decoder_num_hidden_layers""".split(),
        LAYERS,
    ),
    "width": dict.fromkeys(
        """hidden_size d_model n_embd embed_dim hidden_dim dim encoder_hidden_size decoder_hidden_size text_hidden_size
        projection_dim out_hidden_size embedding_size embedding_dim cross_attention_hidden_size vision_hidden_size
        audio_hidden_size output_hidden_size projector_hidden_size word_embed_proj_dim emb_dim cross_hidden_size
        backbone_hidden_size fpn_hidden_size encoder_hidden_dim decoder_hidden_dim d_embed adapter_out_dim
        lru_width image_text_hidden_size prompt_hidden_size decoder_dim thinker_hidden_size
        output_proj_dims pooler_hidden_size pooler_output_size pred_hidden_size entity_emb_size shared_hidden_size
        text_config_hidden_size true_hidden_size reassemble_hidden_size task_encoder_hidden_dim mask_dim
        class_embed_dim text_projection_in_dim text_projection_out_dim condition_dim hidden_size_global
        global_hidden_size encoder_embed_dim decoder_embed_dim patch_embed_hidden_size proj_dim
        memory_attention_hidden_size memory_encoder_hidden_size memory_fuser_embed_dim mask_downsampler_embed_dim
        iou_head_hidden_dim output_dim projection_size project_dim query_proj_size attention_hidden_size upsample_groups""".split(),
        64,
    ),
    "inner": dict.fromkeys(
        """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim mlp_dim d_ff d_inner n_inner
        shared_intermediate_size decoder_intermediate_size encoder_intermediate_size feed_forward_size
        ffn_hidden_size encoder_dim_feedforward decoder_dim_feedforward linear_units encoder_linear_units
        decoder_linear_units memory_fuser_intermediate_dim memory_attention_feed_forward_hidden_size
        speech_encoder_intermediate_size dense_intermediate_size projection_intermediate_size
        intermediate_size_mlp""".split(),
        128,
    ),
    "expert": dict.fromkeys(
        """moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size expert_intermediate_size""".split(),
        32,
    ),
    "heads": dict.fromkeys(
        """num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads
        attention_heads encoder_num_attention_heads decoder_num_attention_heads num_encoder_attention_heads
        num_decoder_attention_heads decoder_num_heads speech_encoder_attention_heads cross_num_attention_heads
        conf_num_attention_heads swa_num_attention_heads pred_num_attention_heads num_self_attention_heads
        num_cross_attention_heads prompt_num_attention_heads encoder_heads decoder_heads resampler_n_heads
        resampler_heads linear_num_heads""".split(),
        4,
    ),
    "kv": dict.fromkeys(
        """num_key_value_heads num_kv_heads n_head_kv cross_num_key_value_heads swa_num_key_value_heads
        encoder_num_key_value_heads decoder_num_key_value_heads num_query_groups""".split(),
        2,
    ),
    "head": dict.fromkeys(
        """head_dim d_kv d_head attention_head_dim cross_head_dim swa_head_dim kv_channels v_head_dim qk_nope_head_dim
        qk_rope_head_dim resampler_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim dim_head
        resampler_dim_head attention_head_size global_head_dim index_head_dim rotary_dim""".split(),
        16,
    ),
    "experts": dict.fromkeys(
        "num_local_experts num_experts n_routed_experts moe_num_experts num_routed_experts".split(), 4
    ),
    "vocabulary": dict.fromkeys(
        """vocab_size input_vocab_size output_vocab_size entity_vocab_size vocab_size_per_layer_input
        src_vocab_size tgt_vocab_size decoder_vocab_size encoder_vocab_size text_encoder_vocab_size t2u_vocab_size
        char_vocab_size mel_vocab_size vision_vocab_size text_vocab_size audio_vocab_size codec_vocab_size""".split(),
        VOCABULARY,
    ),
    "low rank": {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_head_dim": 32, "o_lora_rank": 16},
    "linear attention": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "index_n_heads": 4, "index_topk": 4},
    "state space": {
        "mamba_n_heads": 8,
        "mamba_num_heads": 8,
        "mamba_d_head": 16,
        "mamba_head_dim": 16,
        "mamba_headdim": 16,
        "mamba_d_state": 16,
        "state_size": 16,
        "ssm_state_size": 16,
        "time_step_rank": 8,
        "mamba_dt_rank": 8,
        "mamba_chunk_size": 8,
        "chunk_size": 8,
    },
    "positions": dict.fromkeys(
        "max_position_embeddings n_positions max_sequence_length max_source_positions max_seq_len".split(), 128
    ),
}
SMALL = {"first_k_dense_replace": 1, "n_group": 2, "num_expert_group": 2, "topk_group": 1, "topk_groups": 1}
VALUES = {name: value for group in FIXED.values() for name, value in group.items()}
PER_TOKEN = re.compile("num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k|experts_top_k")
TOKEN = re.compile(r".*(_token_id|_token_index|_token_idx|_id|_idx)$|image_patch_id")
LAYER_INDICES = re.compile(".*(_layer_ids|_indexes|attn_indexes|_layer_indices|_block_indices|hidden_state_indices)$")
DERIVED = {"out_features", "out_indices", "stage_names", "transformers_version", "architectures", "torch_dtype"}


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
    return by_layer.get(index, by_layer.get(str(index)))


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
