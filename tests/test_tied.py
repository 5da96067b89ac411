"""One adapter for a weight that several modules share: `share_tied=True`."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
import torch.nn.functional as F
from models import TOKENS, Text, fill, steps, text
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from snapshot import assert_same, raw, snapshot
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_inject as li

BOTH = ["embed", "head"]
HALF = pytest.mark.filterwarnings("ignore::lora_inject.RoundingWarning")


def shared(seed: int = 3, **options) -> Text:
    model = text().eval()
    li.inject(model, BOTH, rank=2, alpha=3, seed=0, share_tied=True, **options)
    fill(model, seed)
    return model


def pair(model: Text) -> tuple[torch.Tensor, torch.Tensor]:
    adapter = model.embed.adapters["default"]
    return adapter.lora_A, adapter.lora_B


def by_hand(model: Text, delta: torch.Tensor) -> torch.Tensor:
    """Returns the output with W + delta as the one weight of embedding and head, in float64, rows of padding too."""
    base = {key: p.detach().double() for key, p in model.state_dict().items() if "adapters" not in key}
    table = base["embed.weight"] + delta
    x = F.embedding(TOKENS, table)
    inner = F.gelu(F.linear(x, base["up.weight"], base["up.bias"]))
    x = x + F.linear(inner, base["down.weight"])
    return F.linear(F.layer_norm(x, (8,), base["norm.weight"], base["norm.bias"]), table)


def test_one_pair_serves_both_uses_and_is_counted_once():
    model = text().eval()
    plan = li.inject(model, BOTH, rank=2, share_tied=True)
    assert [(site.path, site.owner) for site in plan] == [("embed", None), ("head", "embed")]
    assert plan.parameters == 2 * (11 + 8) and "shares embed" in str(plan)
    assert model.embed.adapters["default"].lora_A is model.head.adapters["default"].lora_A
    assert model.embed.adapters["default"].lora_B is model.head.adapters["default"].lora_B
    assert list(li.adapter_parameters(model)) == ["embed.adapters.default.lora_A", "embed.adapters.default.lora_B"]
    assert torch.equal(model(TOKENS), text().eval()(TOKENS))
    assert li.verify(model, TOKENS).ok


def test_the_output_and_the_gradients_are_those_of_one_weight_with_the_update():
    model = shared()
    a, b = (p.detach().double().requires_grad_(True) for p in pair(model))
    wanted = by_hand(model, 1.5 * b @ a)
    found = model(TOKENS)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert not torch.allclose(wanted, by_hand(model, torch.zeros(11, 8, dtype=torch.float64)), atol=1e-2)
    found.square().sum().backward()
    wanted.square().sum().backward()
    mine = pair(model)
    assert torch.allclose(mine[0].grad.double(), a.grad, rtol=1e-4, atol=1e-4)
    # Row 0 is padding: torch blocks what the embedding adds to its gradient, so that it is the head's part alone.
    assert torch.allclose(mine[1].grad[1:].double(), b.grad[1:], rtol=1e-4, atol=1e-4)
    assert mine[1].grad[0].any()


@HALF
@pytest.mark.parametrize("keep", ["residual", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_writes_the_one_weight_once_and_unmerge_gives_it_back(dtype, keep):
    model = text(dtype=dtype).eval()
    before = snapshot(model)
    li.inject(model, BOTH, rank=2, alpha=3, share_tied=True)
    fill(model)
    weight, injected = model.embed._parameters["weight"], snapshot(model)
    a, b = (p.detach().double() for p in pair(model))
    wanted = (weight.double() + 1.5 * b @ a).to(dtype)
    for _ in range(2):
        report = li.merge(model, keep=keep)
        assert report.untied == () and [row.path for row in report] == ["embed.weight"]
        assert model.embed._parameters["weight"] is weight is model.head._parameters["weight"]
        eps = torch.finfo(dtype).eps
        assert torch.allclose(weight.float(), wanted.float(), rtol=eps, atol=eps / 8)
        assert torch.allclose(model(TOKENS).double(), by_hand(model, torch.zeros(11, 8)), atol=200 * eps)
        with li.disabled(model):
            assert raw(weight) == raw(text(dtype=dtype).embed.weight)
        assert model.embed._parameters["weight"] is weight is model.head._parameters["weight"]
        assert torch.allclose(weight.float(), wanted.float(), rtol=eps, atol=eps / 8)
        li.unmerge(model)
        assert_same(injected, model)
    li.merge(model, keep=keep)
    li.uninject(model)
    assert_same(before, model)


def test_merged_weights_stay_tied_when_kept_cast_or_widened():
    model = shared()
    wanted = model(TOKENS)
    li.merge(model)
    li.uninject(model, keep_merged=True)
    assert model.embed.weight is model.head.weight and torch.allclose(model(TOKENS), wanted, atol=1e-5)

    model = shared()
    li.merge(model)
    model.double()
    li.unmerge(model)
    assert model.embed._parameters["weight"] is model.head._parameters["weight"]
    assert torch.equal(model.embed._parameters["weight"], text().embed.weight.double())

    model = shared().bfloat16()
    with torch.no_grad():
        pair(model)[0].mul_(1e-3)
    before = snapshot(model)
    report = li.merge(model, dtype=torch.float32)
    assert [row.widened for row in report] == [True] and not report.lossy
    assert model.embed._parameters["weight"] is model.head._parameters["weight"]
    assert model.embed._parameters["weight"].dtype == torch.float32
    li.unmerge(model)
    assert_same(before, model)


def test_another_adapter_on_one_of_the_two_unties_them_and_merging_stays_right():
    """However the merges come, each user has its own sum, and the base comes back."""
    for order in (("default", "own"), ("own", "default"), ("both",)):
        model = shared()
        li.inject(model, "head", rank=2, name="own", seed=1)
        fill(model, seed=9, name="own")
        before, wanted = snapshot(model), model(TOKENS)
        embed, head = model.embed.weight.detach().clone(), model.head.weight.detach().clone()
        for name in order:
            report = li.merge(model, *(() if name == "both" else (name,)))
        assert set(report.untied) == {"embed.weight", "head.weight"}
        assert torch.allclose(model(TOKENS), wanted, atol=1e-5)
        assert torch.allclose(model.embed.weight, embed, atol=1e-6)
        assert torch.allclose(model.head.weight, head, atol=1e-6)
        with li.disabled(model, "own"):
            assert torch.allclose(model(TOKENS), shared()(TOKENS), atol=1e-5)
        assert torch.allclose(model(TOKENS), wanted, atol=1e-5)
        twin = copy.deepcopy(model)
        li.unmerge(model)
        assert_same(before, model)
        li.uninject(twin, "own")
        assert torch.allclose(twin(TOKENS), shared()(TOKENS), atol=1e-5)
        assert twin.embed._parameters["weight"] is twin.head._parameters["weight"], "tied again, and merged for both"
        li.uninject(twin)
        assert raw(twin.embed.weight) == raw(text().embed.weight) and twin.embed.weight is twin.head.weight


def test_a_user_without_the_adapter_keeps_the_old_weight():
    model = shared()
    model.third = nn.Linear(8, 11, bias=False)
    model.third.weight = model.embed._parameters["weight"]
    before = snapshot(model)
    assert set(li.merge(model).untied) == {"embed.weight", "head.weight"}
    assert torch.equal(model.third.weight, text().embed.weight)
    li.unmerge(model)
    assert_same(before, model)


def test_a_merge_that_fails_leaves_both_as_they_were():
    model = shared()
    with torch.no_grad():
        pair(model)[1][3, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(li.StateError, match=r"embed\.weight.*not finite"):
        li.merge(model)
    assert_same(before, model)


def test_training_copies_and_pickles_keep_one_pair():
    model = shared()
    first = steps(model, TOKENS, 3)
    assert first == pytest.approx(steps(copy.deepcopy(shared()), TOKENS, 3))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False), copy.deepcopy(model).double()):
        assert twin.embed.adapters["default"].lora_B is twin.head.adapters["default"].lora_B
        assert torch.allclose(twin(TOKENS).float(), model(TOKENS), atol=1e-6)
    other = Text(tied=True).eval()
    other.load_state_dict(text().state_dict())
    li.inject(other, BOTH, rank=2, alpha=3, share_tied=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_the_file_holds_one_pair_and_carries_it_to_tied_and_untied_models(tmp_path):
    model = shared()
    assert list(li.adapter_state(model)) == ["embed.lora_A", "embed.lora_B"]
    path = li.export(model, tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"embed.lora_A", "embed.lora_B"}
        (site,) = json.loads(file.metadata()["adapter"])["sites"]
    assert site["path"] == "embed" and site["aliases"] == ["head"]
    fresh = text().eval()
    plan = li.load(fresh, path)
    assert [(one.path, one.owner) for one in plan] == [("embed", None), ("head", "embed")]
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    assert fresh.embed.adapters["default"].lora_B is fresh.head.adapters["default"].lora_B
    assert li.merge(fresh).untied == ()
    li.uninject(fresh)
    again = li.export(model, tmp_path / "b.safetensors")
    li.load(fresh, again)
    li.export(fresh, tmp_path / "c.safetensors")
    assert load_file(tmp_path / "c.safetensors").keys() == load_file(path).keys()

    apart = Text(tied=False).eval()
    apart.load_state_dict(text().state_dict())
    li.load(apart, path)
    assert torch.equal(apart(TOKENS), model(TOKENS))
    assert [row.path for row in li.merge(apart)] == ["embed.weight", "head.weight"]
    assert torch.equal(apart.embed._parameters["weight"], apart.head._parameters["weight"])
    li.unmerge(apart)
    assert torch.equal(apart(TOKENS), model(TOKENS))


def test_a_module_that_was_one_and_is_two_in_the_other_model_is_adapted_in_both_places(tmp_path):
    one = nn.ModuleDict({"a": nn.Linear(4, 3)})
    one["b"] = one["a"]
    li.inject(one, "a", rank=2)
    fill(one)
    two = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    for part in two.values():
        part.load_state_dict({"weight": one["a"]._parameters["weight"], "bias": one["a"].bias})
    li.load(two, li.export(one, tmp_path / "a"))
    x = torch.randn(2, 4)
    assert torch.equal(two["a"](x), one["a"](x)) and torch.equal(two["b"](x), one["b"](x))


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ("embed", {}, r"no two selected sites hold the same weight.*embedding and the head"),
        (["up", "down"], {}, "no two selected sites hold the same weight"),
        (["embed", li.Target("head", rank=4)], {}, "embed and head.*differ in their options"),
        (BOTH, {"bias": True}, "embed and head.*use bias=False"),
    ],
)
def test_what_cannot_share_is_refused_before_anything_changes(targets, options, message):
    model = text()
    before = snapshot(model)
    with pytest.raises(li.LoraInjectError, match=message):
        li.inject(model, targets, share_tied=True, **options)
    assert_same(before, model)


def test_without_the_option_each_user_has_its_own_pair():
    model = text()
    li.inject(model, BOTH, rank=2)
    assert len(li.adapter_parameters(model)) == 4 and len(li.adapter_state(model)) == 4


@HALF
@pytest.mark.parametrize("tied", [True, False], ids=["one-tensor", "both-stored"])
def test_a_checkpoint_is_merged_without_untying(tmp_path, tied):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=40, pad_token_id=0, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    if not tied:
        # As a plain state dict stores it: no config, two tensors that are equal.
        whole = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(whole, tmp_path / "whole.safetensors")
    li.inject(model, ["model.embed_tokens", "lm_head"], rank=2, share_tied=True)
    fill(model)
    path = li.export(model, tmp_path / "a.safetensors")
    li.merge(model)
    wanted = model.lm_head._parameters["weight"]
    base = tmp_path / "base" if tied else tmp_path / "whole.safetensors"
    li.merge_checkpoint(base, path, tmp_path / "out")
    files = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    found = {key: value for file in files for key, value in file.items()}
    assert torch.equal(found["model.embed_tokens.weight"], wanted)
    assert ("lm_head.weight" in found) is (not tied)
    if tied:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
        again = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
        tokens = torch.randint(1, 40, (2, 5))
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    else:
        assert torch.equal(found["lm_head.weight"], wanted)


@pytest.mark.parametrize("dense", [False, True])
def test_a_shared_pair_keeps_its_padding_row_in_a_model_without_the_head(tmp_path, dense):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=40, pad_token_id=3, tie_word_embeddings=True)
    whole = LlamaForCausalLM(config).eval()
    body, plain = copy.deepcopy(whole.model), copy.deepcopy(whole.model)
    li.inject(whole, ["model.embed_tokens", "lm_head"], rank=16, alpha=32, share_tied=True, dense=dense)
    fill(whole)
    p = {key.rpartition(".")[2]: v.detach().double() for key, v in li.adapter_parameters(whole).items()}
    update = 2 * (p["lora_dense"] if dense else p["lora_B"] @ p["lora_A"])
    li.load(body, li.export(whole, tmp_path / "a"), strict=False)
    ids = torch.tensor([[1, 3, 5, 3]])
    wanted = (plain.embed_tokens.weight.double() + update)[ids]
    assert update[3].abs().max() > 0.1
    assert torch.allclose(body.embed_tokens(ids).double(), wanted, atol=1e-5)
    assert torch.allclose(body(ids)[0], whole.model(ids)[0], atol=1e-6)
    li.merge(body)
    assert torch.allclose(body.embed_tokens(ids).double(), wanted, atol=1e-5)


def test_an_embedding_under_two_names_keeps_its_padding_row_fixed_under_one(tmp_path):
    two = nn.ModuleDict({"a": nn.Embedding(6, 4, padding_idx=2)})
    two["b"] = two["a"]
    one = nn.ModuleDict({"a": copy.deepcopy(two["a"])})
    base = one["a"].weight.detach().clone()
    li.inject(two, "a", rank=2)
    steps(nn.Sequential(two["a"]), torch.tensor([0, 1, 2, 3]))
    li.load(one, li.export(two, tmp_path / "a"))
    steps(nn.Sequential(one["a"]), torch.tensor([0, 1, 2, 3]))
    found = one["a"](torch.arange(6))
    assert torch.equal(found[2], base[2]) and not torch.equal(found[1], base[1])


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PADDING = 3
IDS = torch.tensor([[1, PADDING, 5, PADDING]])


def causal() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=40, pad_token_id=PADDING, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def shared_file(path, **options):
    """Returns the file of a pair that was trained for embedding and head, and its update by hand, in float64."""
    model = causal()
    li.inject(model, ["model.embed_tokens", "lm_head", "*.q_proj"], rank=2, alpha=4, share_tied=True, **options)
    fill(model)
    p = {key.rpartition(".")[2]: v.detach().double() for key, v in li.adapter_state(model).items() if "embed" in key}
    update = 2 * p["lora_B"] @ p["lora_A"]
    assert update[PADDING].abs().max() > 0.1
    return li.export(model, path), update


def sites(path) -> dict[str, dict]:
    with safe_open(path, "pt") as file:
        return {site["path"]: site for site in json.loads(file.metadata()["adapter"])["sites"]}


def test_the_file_tells_which_aliases_are_tied_modules(tmp_path):
    path, _ = shared_file(tmp_path / "a")
    found = sites(path)
    assert found["model.embed_tokens"]["aliases"] == ["lm_head"]
    assert found["model.embed_tokens"]["tied"] == {"lm_head": "linear"}
    assert "tied" not in found["model.layers.0.self_attn.q_proj"]


class Body(nn.Module):
    """A model without the head, whose paths are those of the whole model or lack their prefix."""

    def __init__(self, prefixed: bool) -> None:
        super().__init__()
        self.inner = causal().model
        if prefixed:
            self.model = self.inner
            del self.inner


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_shared_pair_stays_shared_through_models_without_the_head(tmp_path, prefixed):
    """From the whole model to a headless one, to a file, to another headless one, to a file, and to a whole model."""
    first, update = shared_file(tmp_path / "a")
    path, wanted = first, (causal().model.embed_tokens.weight.double() + update)[IDS]
    for turn in range(2):
        body = Body(prefixed=True) if prefixed else causal().model
        li.load(body, path)
        table = body.model.embed_tokens if prefixed else body.embed_tokens
        assert torch.allclose(table(IDS).double(), wanted, atol=1e-5), "the padding row is the head's work"
        path = li.export(body, tmp_path / f"turn{turn}")
        site = sites(path)["model.embed_tokens" if prefixed else "embed_tokens"]
        assert site["aliases"] == ["lm_head"] and site["tied"] == {"lm_head": "linear"}
        li.merge(body)
        assert torch.allclose(table(IDS).double(), wanted, atol=1e-5)
    whole, again = causal(), causal()
    li.load(whole, first)
    li.load(again, path)
    assert again.model.embed_tokens.adapters["default"].lora_B is again.lm_head.adapters["default"].lora_B
    assert torch.equal(again(IDS).logits, whole(IDS).logits)
    assert load_file(li.export(again, tmp_path / "last")).keys() == load_file(first).keys()
    assert sites(tmp_path / "last") == sites(first)


def test_a_shared_pair_stays_shared_through_a_model_that_has_the_head_alone(tmp_path):
    path, update = shared_file(tmp_path / "a")
    head = nn.ModuleDict({"lm_head": causal().lm_head})
    li.load(head, path, strict=False)
    x = torch.randn(3, 16)
    wanted = x.double() @ (causal().lm_head.weight.double() + update).T
    assert torch.allclose(head["lm_head"](x).double(), wanted, atol=1e-5)
    back = li.export(head, tmp_path / "b")
    site = sites(back)["lm_head"]
    assert site["adapter"] == "linear" and site["tied"] == {"model.embed_tokens": "embedding"}
    again = causal()
    li.load(again, back)
    assert again.model.embed_tokens.adapters["default"].lora_B is again.lm_head.adapters["default"].lora_B
    table = causal().model.embed_tokens.weight.double() + update
    assert torch.allclose(again.model.embed_tokens(IDS).double(), table[IDS], atol=1e-5)


def test_adding_and_resizing_files_keeps_what_they_tell_of_tied_modules(tmp_path):
    path, _ = shared_file(tmp_path / "a")
    li.resize(path, tmp_path / "b", rank=1)
    li.add([path, path], tmp_path / "c")
    for made in ("b", "c"):
        assert sites(tmp_path / made)["model.embed_tokens"]["tied"] == {"lm_head": "linear"}


def test_a_file_that_contradicts_itself_about_tied_modules_is_refused(tmp_path):
    path, _ = shared_file(tmp_path / "a")
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for wrong in ({"elsewhere": "linear"}, {"lm_head": 3}, ["lm_head"], None):
        adapter = json.loads(meta["adapter"])
        adapter["sites"][0]["tied"] = wrong
        save_file(tensors, tmp_path / "b", meta | {"adapter": json.dumps(adapter)})
        with pytest.raises(li.FormatError, match=r"model\.embed_tokens.*tied must give kinds"):
            li.load(causal(), tmp_path / "b")


def test_a_copy_of_a_headless_model_does_not_forget_the_head_either(tmp_path):
    path, _ = shared_file(tmp_path / "a")
    body = causal().model
    li.load(body, path)
    one = li.export(copy.deepcopy(body), tmp_path / "b")
    assert sites(one)["embed_tokens"]["tied"] == {"lm_head": "linear"}


@HALF
@pytest.mark.parametrize("turned", [False, True], ids=["whole-file", "headless-file"])
@pytest.mark.parametrize(
    ("has", "plain"),
    [("body", False), ("whole", False), ("body", True), ("head", True), ("whole", True), ("untied", True)],
)
def test_a_checkpoint_with_only_one_user_gets_the_whole_update(tmp_path, has, plain, turned):
    path, update = shared_file(tmp_path / "a")
    if turned:
        body = causal().model
        li.load(body, path)
        path = li.export(body, tmp_path / "b")
    whole = causal()
    base = tmp_path / "base"
    if plain:
        base.mkdir()
        keys = {
            "body": lambda key: key != "lm_head.weight",
            "head": lambda key: key == "lm_head.weight" or "q_proj" in key,
            "whole": lambda key: key != "lm_head.weight",
            "untied": lambda key: True,
        }[has]
        state = {key: value.clone() for key, value in whole.state_dict().items() if keys(key)}
        if has == "body":
            state = {key.removeprefix("model."): value for key, value in state.items()}
        save_file(state, base / "model.safetensors")
    else:
        (whole.model if has == "body" else whole).save_pretrained(base)
    li.merge_checkpoint(base, path, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = causal().lm_head.weight.double() + update
    users = [key for key in found if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(users) == (2 if has == "untied" else 1)
    for key in users:
        assert torch.allclose(found[key].double(), wanted, atol=1e-6), key
