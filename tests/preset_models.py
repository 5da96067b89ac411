"""Which small models each preset is tried on, what they are fed, and which sites they must give; all by hand."""

import torch
import transformers

VOCABULARY = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = WIDTHS | {"num_key_value_heads": 1}
HEADS = GROUPED | {"head_dim": 8}
MOE = HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MOE |= {"shared_expert_intermediate_size": 8}
MIXTRAL = GROUPED | {"num_local_experts": 4}
LATENT = WIDTHS | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2}
LATENT |= {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 2}
FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FALCON_2 = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 1}
OPT = WIDTHS | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 16}
MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
MAMBA_2 = MAMBA | {"num_heads": 4, "head_dim": 8, "n_groups": 1}
DISTIL = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
NARROW = WIDTHS | {"embedding_size": 8}
DEBERTA = WIDTHS | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
DEBERTA_2 = DEBERTA | {"position_buckets": 4}
DEBERTA_3 = DEBERTA_2 | {"share_att_key": True}
MODERN = WIDTHS | {"cls_token_id": 1, "sep_token_id": 2}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
GATED = T5 | {"feed_forward_proj": "gated-gelu"}
PAIR = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
BART = PAIR | {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 2}
WHISPER = BART | {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 8}
SPEECH = WIDTHS | {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
IMAGE = WIDTHS | {"image_size": 8, "patch_size": 4}
SWIGLU = IMAGE | {"use_swiglu_ffn": True}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 16, "patch_size": 2, "window_size": 2}
TOWERS = {
    "text_config": VOCABULARY | WIDTHS | {"max_position_embeddings": 16, "projection_size": 16},
    "vision_config": IMAGE,
    "projection_dim": 8,
}


def text(config):
    return {"input_ids": torch.arange(3, 9)[None]}


def pair(config):
    return {"input_ids": torch.arange(3, 9)[None], "decoder_input_ids": torch.arange(5, 9)[None]}


def image(config):
    return {"pixel_values": torch.randn(1, 3, config.image_size, config.image_size)}


def towers(config):
    return text(config) | image(config.vision_config)


def wave(config):
    return {"input_values": torch.randn(1, 200)}


def mel(config):
    return {"input_features": torch.randn(1, 4, 16), "decoder_input_ids": torch.arange(3, 7)[None]}


def each(count, parents, names):
    """Sites by the last two names of their paths, numbers apart: `count` of every parent.name."""
    return {f"{parent}.{name}": count for parent in parents.split() for name in names.split()}


QKVO = each(2, "self_attn", "q_proj k_proj v_proj o_proj")
GLU = each(2, "mlp", "gate_proj up_proj down_proj")
EXPERTS = QKVO | each(2, "experts", "gate_up_proj down_proj")
FC = each(2, "mlp", "fc1 fc2")
LLAMA = QKVO | GLU
BERT_MLP = each(2, "intermediate", "dense") | each(4, "output", "dense")
BERT = each(2, "self", "query key value") | BERT_MLP
FUSED_MLP = each(2, "mlp", "dense_h_to_4h dense_4h_to_h")
FUSED = each(2, "self_attention", "query_key_value dense") | FUSED_MLP
BARTS = each(4, "self_attn", "q_proj k_proj v_proj out_proj") | each(2, "encoder_attn", "q_proj k_proj v_proj out_proj")
BARTS |= each(4, "layers", "fc1 fc2")
T5S = each(4, "SelfAttention", "q k v o") | each(2, "EncDecAttention", "q k v o")
WAVES = each(2, "attention", "q_proj k_proj v_proj out_proj")
WAVES |= each(2, "feed_forward", "intermediate_dense output_dense")
VISION = each(2, "attention", "q_proj k_proj v_proj o_proj")
TWINS = each(4, "self_attn", "q_proj k_proj v_proj out_proj") | each(4, "mlp", "fc1 fc2")
SHARED = each(1, "mlp shared_experts", "gate_proj up_proj down_proj")
LATENTS = each(2, "self_attn", "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj") | SHARED
LITE = each(2, "self_attn", "q_proj kv_a_proj_with_mqa kv_b_proj o_proj") | SHARED

MODELS = [
    ("llama", "LlamaForCausalLM", GROUPED, text, LLAMA),
    ("llama", "LlamaModel", GROUPED, text, LLAMA),
    ("llama", "Olmo2ForCausalLM", GROUPED, text, LLAMA),
    ("mistral", "MistralForCausalLM", HEADS, text, LLAMA),
    ("mistral", "MinistralForCausalLM", HEADS, text, LLAMA),
    ("qwen", "Qwen2ForCausalLM", GROUPED, text, LLAMA),
    ("qwen", "Qwen3ForCausalLM", HEADS, text, LLAMA),
    ("gemma", "GemmaForCausalLM", HEADS, text, LLAMA),
    ("gemma", "Gemma2ForCausalLM", HEADS, text, LLAMA),
    ("gemma", "Gemma3ForCausalLM", HEADS, text, LLAMA),
    ("phi", "PhiForCausalLM", WIDTHS, text, each(2, "self_attn", "q_proj k_proj v_proj dense") | FC),
    (
        "phi",
        "Phi3ForCausalLM",
        WIDTHS,
        text,
        each(2, "self_attn", "qkv_proj o_proj") | each(2, "mlp", "gate_up_proj down_proj"),
    ),
    ("mixtral", "MixtralForCausalLM", MIXTRAL, text, QKVO),
    ("qwen_moe", "Qwen2MoeForCausalLM", MOE, text, QKVO),
    ("qwen_moe", "Qwen3MoeForCausalLM", MOE, text, QKVO),
    ("moe_experts", "MixtralForCausalLM", MIXTRAL, text, EXPERTS),
    ("moe_experts", "Qwen2MoeForCausalLM", MOE, text, EXPERTS),
    ("moe_experts", "Qwen3MoeForCausalLM", MOE, text, EXPERTS),
    ("deepseek", "DeepseekV2ForCausalLM", LATENT | {"q_lora_rank": None}, text, LITE),
    ("deepseek", "DeepseekV3ForCausalLM", LATENT, text, LATENTS),
    ("gpt2", "GPT2LMHeadModel", GPT2, text, each(2, "attn", "c_attn c_proj") | each(2, "mlp", "c_fc c_proj")),
    ("gpt_neox", "GPTNeoXForCausalLM", WIDTHS, text, each(2, "attention", "query_key_value dense") | FUSED_MLP),
    ("bloom", "BloomForCausalLM", BLOOM, text, FUSED),
    ("falcon", "FalconForCausalLM", FALCON, text, FUSED),
    ("falcon", "FalconForCausalLM", FALCON_2, text, FUSED),
    (
        "opt",
        "OPTForCausalLM",
        OPT,
        text,
        each(2, "self_attn", "q_proj k_proj v_proj out_proj") | each(2, "layers", "fc1 fc2"),
    ),
    ("starcoder2", "Starcoder2ForCausalLM", GROUPED, text, QKVO | each(2, "mlp", "c_fc c_proj")),
    ("mamba", "MambaForCausalLM", MAMBA, text, each(2, "mixer", "in_proj x_proj out_proj")),
    ("mamba", "Mamba2ForCausalLM", MAMBA_2, text, each(2, "mixer", "in_proj out_proj")),
    ("bert", "BertForSequenceClassification", WIDTHS, text, BERT),
    ("bert", "BertModel", WIDTHS, text, BERT),
    ("bert", "ElectraModel", WIDTHS, text, BERT),
    ("roberta", "RobertaForSequenceClassification", WIDTHS, text, BERT),
    ("roberta", "XLMRobertaForSequenceClassification", WIDTHS, text, BERT),
    ("roberta", "CamembertForTokenClassification", WIDTHS, text, BERT),
    (
        "distilbert",
        "DistilBertForSequenceClassification",
        DISTIL,
        text,
        each(2, "attention", "q_lin k_lin v_lin out_lin") | each(2, "ffn", "lin1 lin2"),
    ),
    (
        "albert",
        "AlbertForSequenceClassification",
        NARROW,
        text,
        each(1, "attention", "query key value dense") | each(1, "albert_layers", "ffn ffn_output"),
    ),
    (
        "deberta",
        "DebertaForSequenceClassification",
        DEBERTA,
        text,
        each(2, "self", "in_proj pos_proj pos_q_proj") | BERT_MLP,
    ),
    (
        "deberta",
        "DebertaV2ForSequenceClassification",
        DEBERTA_2,
        text,
        each(2, "self", "query_proj key_proj value_proj pos_key_proj pos_query_proj") | BERT_MLP,
    ),
    (
        "deberta",
        "DebertaV2ForSequenceClassification",
        DEBERTA_3,
        text,
        each(2, "self", "query_proj key_proj value_proj") | BERT_MLP,
    ),
    (
        "modernbert",
        "ModernBertForSequenceClassification",
        MODERN,
        text,
        each(2, "attn", "Wqkv Wo") | each(2, "mlp", "Wi Wo"),
    ),
    ("t5", "T5ForConditionalGeneration", T5, pair, T5S | each(4, "DenseReluDense", "wi wo")),
    ("t5", "T5ForConditionalGeneration", GATED, pair, T5S | each(4, "DenseReluDense", "wi_0 wi_1 wo")),
    ("t5", "MT5ForConditionalGeneration", T5, pair, T5S | each(4, "DenseReluDense", "wi_0 wi_1 wo")),
    ("bart", "BartForConditionalGeneration", BART, pair, BARTS),
    ("bart", "MBartForConditionalGeneration", BART, pair, BARTS),
    ("bart", "MarianMTModel", BART, pair, BARTS),
    ("bart", "PegasusForConditionalGeneration", BART, pair, BARTS),
    ("whisper", "WhisperForConditionalGeneration", WHISPER, mel, BARTS),
    ("wav2vec2", "Wav2Vec2ForCTC", SPEECH, wave, WAVES),
    ("wav2vec2", "HubertForCTC", SPEECH, wave, WAVES),
    ("wav2vec2", "WavLMForCTC", SPEECH, wave, WAVES),
    ("vit", "ViTForImageClassification", IMAGE, image, VISION | FC),
    ("vit", "ViTModel", IMAGE, image, VISION | FC),
    ("vit", "DeiTForImageClassification", IMAGE, image, VISION | FC),
    ("dinov2", "Dinov2Model", IMAGE, image, VISION | FC),
    ("dinov2", "Dinov2Model", SWIGLU, image, VISION | GLU),
    ("dinov2", "Dinov2WithRegistersModel", IMAGE, image, VISION | FC),
    ("swin", "SwinForImageClassification", SWIN, image, VISION | FC),
    ("clip", "CLIPModel", TOWERS, towers, TWINS),
    ("siglip", "SiglipModel", TOWERS, towers, TWINS),
    (
        "siglip",
        "Siglip2TextModel",
        WIDTHS | {"projection_size": 16},
        text,
        each(2, "self_attn", "q_proj k_proj v_proj out_proj") | FC,
    ),
    ("all_linear", "LlamaForSequenceClassification", GROUPED, text, LLAMA),
    ("all_linear", "BertForSequenceClassification", WIDTHS, text, BERT),
]


def build(class_name, options):
    """A small model of that class in evaluation mode, every parameter moved off its initial value."""
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**(options if "text_config" in options else VOCABULARY | options))
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # What a family starts at zero, a residual branch say, would hide a dead adapter behind it.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
