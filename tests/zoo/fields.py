"""What the fields of config classes mean, by their names, and the small values that they get."""

from __future__ import annotations

import re

LAYERS = 2
VOCABULARY = 256


def names(value: int, text: str) -> dict[str, int]:
    """Returns the same value for every name in the text."""
    return dict.fromkeys(text.split(), value)


FIXED: dict[str, dict[str, int]] = {
    "layers": names(
        LAYERS,
        """num_hidden_layers num_layers n_layers n_layer encoder_layers decoder_layers num_encoder_layers depth
        num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers speech_encoder_layers
        text_encoder_layers speaker_encoder_layers resampler_depth num_blocks memory_attention_num_layers layers
        memory_fuser_num_layers t2u_encoder_layers t2u_decoder_layers conf_num_hidden_layers l_layers x_layers r_layers
        text_encoder_num_layers query_dec_layers decoder_num_layers num_mel_attn_blocks pred_num_hidden_layers
        num_pooler_layers num_encoder_blocks_per_stage encoder_blocks num_timestamp_prediction_layers resampler_layers
        num_auxiliary_layers num_self_attends_per_block mask_decoder_num_hidden_layers""",
    ),
    "width": names(
        64,
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
        iou_head_hidden_dim output_dim projection_size project_dim query_proj_size attention_hidden_size
        upsample_groups adapter_in_dim adapter_input_size""",
    ),
    "inner": names(
        128,
        """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim mlp_dim d_ff d_inner n_inner
        shared_intermediate_size decoder_intermediate_size encoder_intermediate_size feed_forward_size
        ffn_hidden_size encoder_dim_feedforward decoder_dim_feedforward linear_units encoder_linear_units
        decoder_linear_units memory_fuser_intermediate_dim memory_attention_feed_forward_hidden_size
        speech_encoder_intermediate_size dense_intermediate_size projection_intermediate_size
        intermediate_size_mlp""",
    ),
    "expert": names(
        32,
        """moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size expert_intermediate_size""",
    ),
    "heads": names(
        4,
        """num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads
        attention_heads encoder_num_attention_heads decoder_num_attention_heads num_encoder_attention_heads
        num_decoder_attention_heads decoder_num_heads speech_encoder_attention_heads cross_num_attention_heads
        conf_num_attention_heads swa_num_attention_heads pred_num_attention_heads num_self_attention_heads
        num_cross_attention_heads prompt_num_attention_heads encoder_heads decoder_heads resampler_n_heads
        resampler_heads linear_num_heads""",
    ),
    "kv": names(
        2,
        """num_key_value_heads num_kv_heads n_head_kv cross_num_key_value_heads swa_num_key_value_heads
        encoder_num_key_value_heads decoder_num_key_value_heads num_query_groups""",
    ),
    "head": names(
        16,
        """head_dim d_kv d_head attention_head_dim cross_head_dim swa_head_dim kv_channels v_head_dim qk_nope_head_dim
        qk_rope_head_dim resampler_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim dim_head
        resampler_dim_head attention_head_size global_head_dim index_head_dim rotary_dim""",
    ),
    "experts": names(4, "num_local_experts num_experts n_routed_experts moe_num_experts num_routed_experts"),
    "vocabulary": names(
        VOCABULARY,
        """vocab_size input_vocab_size output_vocab_size entity_vocab_size vocab_size_per_layer_input
        src_vocab_size tgt_vocab_size decoder_vocab_size encoder_vocab_size text_encoder_vocab_size t2u_vocab_size
        char_vocab_size mel_vocab_size vision_vocab_size text_vocab_size audio_vocab_size codec_vocab_size""",
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
    "positions": names(128, "max_position_embeddings n_positions max_sequence_length max_source_positions max_seq_len"),
}
SMALL = {"first_k_dense_replace": 1, "n_group": 2, "num_expert_group": 2, "topk_group": 1, "topk_groups": 1}
VALUES = {name: value for group in FIXED.values() for name, value in group.items()}
PER_TOKEN = re.compile("num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k|experts_top_k")
TOKEN = re.compile(r".*(_token_id|_token_index|_token_idx|_id|_idx)$|image_patch_id")
LAYER_INDICES = re.compile(".*(_layer_ids|_indexes|attn_indexes|_layer_indices|_block_indices|hidden_state_indices)$")
DERIVED = {"out_features", "out_indices", "stage_names", "transformers_version", "architectures", "torch_dtype"}
