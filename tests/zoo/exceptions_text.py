"""Exceptions in what models of text need, and others without images and sound, or the text within such."""

from __future__ import annotations

from .exceptional import Exception_, Exceptions

WINDOW = Exception_(set={"attention_window": 8})
"""Without padding to a whole window, whose rows have no key to attend to, and so no finite gradient."""
HEADS = Exception_(start={"head_dim": 128})
MIXED_LAYERS = ["mamba", "attention"] * 16
FORECAST = Exception_(start={"prediction_length": 4, "num_time_features": 2})
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SOME_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
SOME_SPARSE = {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"] * 16}
ALL_SHARED = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}

TEXT: Exceptions = {
    "autoformer": Exception_(start=FORECAST.start, set={"label_length": 2}),
    "bamba": Exception_(start={"attn_layer_indices": [1]}),
    "blt": Exception_(set={"encoder_hash_byte_group_vocab": 64}),
    "cohere_compass": Exception_(
        start={"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}}
    ),
    "cohere_compass_text": Exception_(start={"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}),
    "dbrx": Exception_(start={"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}),
    "deepseek_ocr2": Exception_(start={"text_config": SOME_SPARSE}),
    "deepseek_ocr2_text": Exception_(start=SOME_SPARSE),
    "deepseek_v2": Exception_(start={"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}),
    "diffusion_gemma": Exception_(start={"text_config": SOME_EXPERTS}),
    "diffusion_gemma_text": Exception_(start=SOME_EXPERTS),
    "dots1": Exception_(start={"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1}),
    "esm": Exception_(start={"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
    "esmfold2": Exception_(
        set={
            "single_inputs_size": 131,
            "pairwise_hidden_size": 32,
            "pair_transition_intermediate_size": 64,
            "folding_trunk_num_hidden_layers": 2,
            "structure_head.diffusion_module.pair_intermediate_size": 64,
            "atom_encoder.output_dim": 64,
            "atom_encoder.head_dim": 32,
            "structure_head.diffusion_module.atom_encoder.head_dim": 32,
        }
    ),
    "falcon_h1": Exception_(set={"mamba_d_ssm": 64}),
    "gemma3n_text": Exception_(set={"num_kv_shared_layers": 0}),
    "gemma4_assistant": Exception_(
        start={"text_config": ALL_SHARED},
        set={"text_config.num_kv_shared_layers": 4},
        contradiction=(
            "The set of layer types producing a cache is different than the set of layer types using them",
            "its config demands that all layers of its text model take keys and values from others, and that text "
            "model demands that one layer of each kind does not",
        ),
    ),
    # With all layers shared, as it asks for where nothing is said, it meets the contradiction above.
    "gemma4_unified_assistant": Exception_(
        set={
            "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
            "text_config.num_kv_shared_layers": 2,
        }
    ),
    "glm5_next_text": Exception_(set={"index_topk": 16}),
    "granitemoehybrid": Exception_(start={"layer_types": MIXED_LAYERS}),
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS,
    "hunyuan_vl_text": HEADS,
    "informer": FORECAST,
    "jamba": Exception_(start={"attn_layer_period": 2, "attn_layer_offset": 1}),
    "led": WINDOW,
    "lfm2_moe": Exception_(start={"layer_types": ["conv", "full_attention"] * 16}),
    "longformer": WINDOW,
    "mamba2": Exception_(set={"num_heads": 8}),
    "ministral": HEADS,
    "nemotron": Exception_(start={"head_dim": 128, "num_key_value_heads": 8}),
    "qwen4_exp": Exception_(set={f"text_config.{k}": v for k, v in INDEXER.items()}),
    "qwen4_exp_text": Exception_(set=INDEXER),
    "reformer": Exception_(train=True),
    "time_series_transformer": FORECAST,
    "zamba": Exception_(
        start={"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
        set={"attention_head_dim": 32, "attention_hidden_size": 128},
    ),
}
