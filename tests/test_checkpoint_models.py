"""Merging checkpoints of transformers on disk: ties, renamed and fused weights, and loading without a warning."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_inject as li
from lora_inject.checkpoint import merge_checkpoint

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 120}
LLAMA = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | options))


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=120, n_positions=64)
    )


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False)
    )


def qwen_moe():
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8, decoder_sparse_step=1
        )
    )


def t5():
    config = transformers.T5Config(
        d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, vocab_size=120, tie_word_embeddings=True
    )
    return transformers.T5ForConditionalGeneration(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=48))


def tensors(folder):
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def adapt(model, path, targets, rank=3):
    li.inject(model, targets, rank=rank, alpha=rank, seed=0)
    for ref in li.adapters(model):
        for parameter in ref.adapter.parameters():
            parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
        padding = getattr(ref.module, "padding_idx", None)
        if padding is not None:
            ref.adapter.lora_B.data[padding] = 0
    return li.export(model, path)


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def outputs(model, ids):
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits


def loaded_without_a_word(kind, folder, caplog):
    caplog.clear()
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            model, info = kind.from_pretrained(folder, output_loading_info=True)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not [record.getMessage() for record in caplog.records]
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


CASES = {
    "llama": (llama, ["*_proj"], False),
    "llama untied, embedding and head": (lambda: llama(tie_word_embeddings=False), ["*embed_tokens", "lm_head"], False),
    "llama tied, embedding": (lambda: llama(tie_word_embeddings=True), ["*embed_tokens", "*.q_proj"], True),
    "llama tied, head": (lambda: llama(tie_word_embeddings=True), ["lm_head"], True),
    "llama tied, neither": (lambda: llama(tie_word_embeddings=True), ["*.q_proj"], False),
    "gpt2": (gpt2, ["*.c_attn", "*.c_fc", "*.c_proj"], False),
    "gpt2 tied, embedding": (gpt2, ["*.wte", "*.wpe"], True),
    "gpt2 tied, head": (gpt2, ["lm_head"], True),
    "bert": (bert, ["*.query", "*.dense"], False),
    "t5": (t5, ["*.q", "*.wi"], False),
    "mixtral experts": (mixtral, ["*.experts.gate_up_proj", "*.experts.down_proj", "*.q_proj"], False),
    "qwen experts": (qwen_moe, ["*.experts.gate_up_proj", "*.experts.down_proj"], False),
}


@pytest.mark.parametrize("name", CASES)
def test_plain_from_pretrained_gives_the_merged_model(tmp_path, caplog, name):
    build, targets, untied = CASES[name]
    model = build()
    base = save(model, tmp_path / "base", max_shard_size="30KB")
    model = type(model).from_pretrained(base)
    adapter = adapt(model, tmp_path / "a.safetensors", targets)
    ids = torch.randint(2, 120, (2, 7))
    li.merge(model)
    wanted = outputs(model, ids)
    li.uninject(model, keep_merged=True)
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert bool(report.plan.untied) == untied
    if untied:
        assert config["tie_word_embeddings"] is False
    else:
        assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    found = loaded_without_a_word(type(model), tmp_path / "out", caplog)
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    assert torch.equal(outputs(found, ids), wanted)


def test_a_checkpoint_without_the_prefix_of_the_model(tmp_path):
    model = gpt2()
    base = save(model.transformer, tmp_path / "base")
    adapter = adapt(model, tmp_path / "a.safetensors", ["*.c_attn"])
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert "prefix 'transformer.'" in report.plan.note
    li.merge(model)
    for key, value in tensors(tmp_path / "out").items():
        assert torch.equal(value, model.transformer.state_dict()[key]), key
    assert not torch.equal(tensors(tmp_path / "out")["h.0.attn.c_attn.weight"], tensors(base)["h.0.attn.c_attn.weight"])


def test_a_checkpoint_with_a_prefix_that_the_adapter_lacks(tmp_path):
    model = llama(tie_word_embeddings=False)
    base = save(model, tmp_path / "base")
    adapter = adapt(model.model, tmp_path / "a.safetensors", ["*.q_proj"])
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert "with the prefix 'model.'" in report.plan.note
    li.merge(model)
    for key, value in tensors(tmp_path / "out").items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_a_prefix_that_is_not_the_only_one_is_refused(tmp_path):
    linear = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})
    adapter = adapt(linear, tmp_path / "a.safetensors", ["q"])
    state = {f"{tower}.q.{name}": value for tower in ("left", "right") for name, value in linear.state_dict().items()}
    save_file(
        {key.replace(".q.q.", ".q."): value.clone() for key, value in state.items() if "lora" not in key},
        tmp_path / "base.safetensors",
    )
    with pytest.raises(li.MismatchError, match="no weight for 1 of 1 sites"):
        merge_checkpoint(tmp_path / "base.safetensors", adapter, tmp_path / "out")


def test_the_way_through_the_model_gives_the_same_bits(tmp_path, caplog):
    model = mixtral()
    base = save(model, tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    adapter = adapt(model, tmp_path / "a.safetensors", ["*.experts.gate_up_proj", "*.q_proj"])
    merge_checkpoint(base, f"{adapter}:0.5", tmp_path / "out")
    report = merge_checkpoint(base, f"{adapter}:0.5", tmp_path / "other", via_model=True)
    assert len(report) == 4 and (tmp_path / "other" / "tokenizer.json").exists()
    first, second = tensors(tmp_path / "out"), tensors(tmp_path / "other")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    loaded_without_a_word(type(model), tmp_path / "other", caplog)
    with pytest.raises(li.StateError, match="exists and is not empty"):
        merge_checkpoint(base, adapter, tmp_path / "other", via_model=True)


def test_the_way_through_the_model_unties_too(tmp_path, caplog):
    model = llama(tie_word_embeddings=True)
    base = save(model, tmp_path / "base")
    adapter = adapt(model, tmp_path / "a.safetensors", ["lm_head"])
    merge_checkpoint(base, adapter, tmp_path / "out", via_model=True)
    li.merge(model)
    found = loaded_without_a_word(type(model), tmp_path / "out", caplog)
    assert torch.equal(found.lm_head.weight, model.lm_head._parameters["weight"])
    assert torch.equal(found.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not torch.equal(found.model.embed_tokens.weight, found.lm_head.weight)


def test_packed_experts_under_their_own_names(tmp_path):
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2, head_dim=8)
    )
    base = save(model, tmp_path / "base")
    adapter = adapt(model, tmp_path / "a.safetensors", ["*.experts.gate_up_proj"])
    merge_checkpoint(base, adapter, tmp_path / "out")
    li.merge(model)
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[key], model.state_dict()[key]) for key in found)


def test_an_embedding_with_biases_needs_the_model(tmp_path):
    model = bert()
    base = save(model, tmp_path / "base")
    model = type(model).from_pretrained(base)
    li.inject(model, ["*.position_embeddings"], rank=2, bias=True)
    for parameter in li.adapter_parameters(model).values():
        parameter.data.normal_()
    adapter = li.export(model, tmp_path / "a.safetensors")
    merge_checkpoint(base, adapter, tmp_path / "out")
    li.merge(model)
    key = "bert.embeddings.position_embeddings.weight"
    assert torch.equal(tensors(tmp_path / "out")[key], model.state_dict()[key])
    with pytest.raises(li.FormatError, match="depends on more than the weights tell"):
        merge_checkpoint(base / "model.safetensors", adapter, tmp_path / "bare")


@pytest.fixture
def conversions():
    """Lets a test give Llama a conversion of its own."""
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    held = conversion_mapping._checkpoint_conversion_mapping_cache
    yield lambda *rules: held.__setitem__("LlamaForCausalLM", list(rules))
    held.pop("LlamaForCausalLM", None)


def test_a_fused_tensor_that_the_model_splits(tmp_path, conversions):
    from transformers.core_model_loading import Chunk, WeightConverter

    model = llama(tie_word_embeddings=False, num_key_value_heads=4)
    base = save(model, tmp_path / "base")
    state = tensors(base)
    parts = ("q_proj", "k_proj", "v_proj")
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn."
        state[f"{at}qkv.weight"] = torch.cat([state.pop(f"{at}{part}.weight") for part in parts])
    save_file(state, base / "model.safetensors", {"format": "pt"})
    targets = [f"self_attn.{part}.weight" for part in parts]
    conversions(WeightConverter("self_attn.qkv.weight", targets, operations=[Chunk(dim=0)]))
    adapter = adapt(model, tmp_path / "a.safetensors", ["*.q_proj", "*.v_proj"])
    merge_checkpoint(base, adapter, tmp_path / "out")
    li.merge(model)
    found, merged = tensors(tmp_path / "out"), model.state_dict()
    assert found.keys() == state.keys()
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn."
        wanted = torch.cat([merged[f"{at}{part}.weight"] for part in parts])
        assert torch.equal(found[f"{at}qkv.weight"], wanted)
    assert torch.equal(found["lm_head.weight"], state["lm_head.weight"])


def test_tensors_whose_rows_cannot_be_followed_are_refused_by_name(tmp_path, conversions):
    from transformers.core_model_loading import Transpose, WeightConverter

    model = llama(tie_word_embeddings=False)
    base = save(model, tmp_path / "base")
    state = tensors(base)
    renamed = {key.replace("q_proj.weight", "q_t.weight"): value for key, value in state.items()}
    turned = {key: value.t().contiguous() if "q_t" in key else value for key, value in renamed.items()}
    save_file(turned, base / "model.safetensors", {"format": "pt"})
    conversions(WeightConverter("q_t.weight", "q_proj.weight", operations=[Transpose(0, 1)]))
    adapter = adapt(model, tmp_path / "a.safetensors", ["*.q_proj"])
    words = r"q_proj.weight: transformers makes it from model.layers.0.self_attn.q_t.weight .*Transpose(.|\n)*via_model"
    with pytest.raises(li.UnsupportedError, match=words):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_checkpoint(base, adapter, tmp_path / "out", via_model=True)
    li.merge(model)
    for layer in range(2):
        key = f"model.layers.{layer}.self_attn.q_"
        assert torch.equal(tensors(tmp_path / "out")[f"{key}t.weight"].t(), model.state_dict()[f"{key}proj.weight"])
