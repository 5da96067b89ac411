"""kohya's files: against diffusers' own reader, against float64 by hand, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from diffusion import assert_same_adapters, clip, deltas, fill, flux, run, t5, unet
from safetensors.torch import load_file, save_file
from torch import nn

import lora_inject as li
from lora_inject.formats import read_adapter
from lora_inject.safefile import read_header

PAIR = {"lora_down.weight": torch.ones(2, 6), "lora_up.weight": torch.ones(5, 2)}


class Two(nn.Module):
    """A linear layer, a norm and a convolution, under a name that says which component it is."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.conv = nn.Conv2d(3, 4, 3)


def small() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"unet": Two()})


def saved(path, module, tensors, metadata=None):
    save_file({f"{module}.{name}": tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_diffusers_computes_the_same_with_our_file(tmp_path, xl, dtype):
    model = unet(xl)
    targets = [li.Target("*"), li.Target("*.to_q", rank=5), li.Target("*.conv1", alpha=1.7, rank=2)]
    li.inject(model, targets, rank=3, alpha=6, dtype=dtype)
    path = li.export(fill(model), tmp_path / "a.safetensors", format="kohya")
    theirs, base = unet(xl), run(unet(xl))
    state, alphas = Loader.lora_state_dict(tmp_path, weight_name=path.name, unet_config=theirs.config)
    Loader.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
    want = run(model)
    assert (want - base).abs().max() > 0.1
    assert torch.allclose(run(theirs), want, atol=1e-5 if dtype == torch.float32 else 3e-2)
    fresh = unet(xl)
    assert len(li.load(fresh, path)) == (123 if xl else 121)
    assert_same_adapters(fresh, model)


@pytest.mark.parametrize("projection", [False, True])
def test_diffusers_computes_the_same_with_our_file_for_a_text_encoder(tmp_path, projection):
    model = clip(projection)
    # Without all four projections of the attention diffusers does not know the file as one of kohya's.
    li.inject(model, ["*_proj", "*.fc1"], rank=3, alpha=5)
    path = li.export(fill(model), tmp_path / "a.safetensors", format="kohya")
    assert all(name.startswith("lora_te_text_model_encoder_layers_") for name in read_header(path).tensors)
    theirs = clip(projection)
    state, alphas = Loader.lora_state_dict(tmp_path, weight_name=path.name)
    Loader.load_lora_into_text_encoder(state, alphas, theirs, prefix="text_encoder")
    assert torch.allclose(run(theirs), run(model), atol=1e-5)
    assert (run(clip(projection)) - run(model)).abs().max() > 0.1
    fresh = clip(projection)
    li.load(fresh, path)
    assert_same_adapters(fresh, model)


def test_a_pipeline_goes_by_its_components(tmp_path):
    def pipe():
        return nn.ModuleDict({"unet": unet(True), "text_encoder": clip(), "text_encoder_2": clip(True)})

    model = pipe()
    li.inject(model, ["*.to_k", "*.k_proj"], rank=2)
    path = li.export(fill(model), tmp_path / "a.safetensors", format="kohya")
    starts = {name.partition("_text_model")[0].partition("_in")[0] for name in read_header(path).tensors}
    assert {"lora_unet", "lora_te1", "lora_te2"} <= starts
    fresh = pipe()
    li.load(fresh, path)
    assert_same_adapters(fresh, model)
    with pytest.raises(li.MismatchError, match=r"lora_te1_\.\.\.\n  lora_te2_"):
        li.load(clip(), path)
    with pytest.raises(li.MismatchError, match="no module for"):
        li.load(unet(True), path)
    alone = unet(True)
    assert len(li.load(alone, path, strict=False)) == sum(ref.path.startswith("unet") for ref in li.adapters(model))


def test_transformers_and_t5_have_prefixes_of_their_own(tmp_path):
    def pipe():
        return nn.ModuleDict({"transformer": flux(), "text_encoder": clip(), "text_encoder_2": t5()})

    model = pipe()
    li.inject(model, ["*.to_q", "*.q_proj", "*.q"], rank=2)
    path = li.export(fill(model), tmp_path / "a.safetensors", format="kohya")
    names = set(read_header(path).tensors)
    for start in ("lora_transformer_transformer_blocks_0", "lora_te1_text_model_encoder", "lora_te3_encoder_block_0"):
        assert any(name.startswith(start) for name in names)
    fresh = pipe()
    li.load(fresh, path)
    assert_same_adapters(fresh, model)


def test_every_convolution_and_layer_of_a_unet_has_its_ldm_name():
    """The index of every block is compared with a list made by hand for two levels of two layers."""
    from lora_inject.formats.kohya_names import ldm_paths

    found = ldm_paths(unet(True))
    known = {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0": (
            "input_blocks.5.1.transformer_blocks.0.attn1.to_out.0"
        ),
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
        "up_blocks.1.resnets.2.conv2": "output_blocks.5.0.out_layers.3",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "conv_out": "out.2",
    }
    assert {path: found[path] for path in known} == known
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("word", ["down_blocks_1_attentions_0_proj_in", "input_blocks_4_1_proj_in"])
@pytest.mark.parametrize("xl", [False, True])
def test_both_spellings_of_a_unet_are_read(tmp_path, word, xl):
    model = unet(xl)
    shape = (2, 16) if xl else (2, 16, 1, 1)
    pair = {"lora_down.weight": torch.randn(shape), "lora_up.weight": torch.randn(16, 2)}
    li.load(model, saved(tmp_path / "a.safetensors", f"lora_unet_{word}", pair))
    (ref,) = li.adapters(model)
    assert ref.path == "down_blocks.1.attentions.0.proj_in"
    want = pair["lora_up.weight"].double() @ pair["lora_down.weight"].double().flatten(1)
    assert torch.allclose(ref.adapter.delta(ref.module)["weight"].double().flatten(1), want, atol=1e-6)


@pytest.mark.parametrize("alpha", [torch.tensor(4.0), torch.tensor(4), torch.tensor([4.0]).half(), None])
def test_a_missing_alpha_is_the_rank_and_integers_are_numbers(tmp_path, alpha):
    model = small()
    li.load(model, saved(tmp_path / "a", "lora_unet_to_q", PAIR | ({} if alpha is None else {"alpha": alpha})))
    (ref,) = li.adapters(model)
    assert ref.adapter.scaling == (1.0 if alpha is None else 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tucker_decomposition_becomes_a_pair(tmp_path, dtype):
    down, mid = torch.randn(2, 3, 1, 1).to(dtype), torch.randn(2, 2, 3, 3).to(dtype)
    up = torch.randn(4, 2, 1, 1).to(dtype)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    model = small()
    plan = li.load(model, saved(tmp_path / "a", "lora_unet_conv", parts))
    assert "Tucker" in str(plan.notes)
    exact = torch.zeros(4, 3, 3, 3, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            one = up.double()[:, i, 0, 0, None, None, None] * mid.double()[i, j]
            exact += 0.5 * one * down.double()[j, :, 0, 0][:, None, None]
    found = deltas(model)["unet.conv.weight"]
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-22
    assert (found - exact).abs().max() <= rounding * 4 * exact.abs().max()


def test_full_updates_stay_what_they_are(tmp_path):
    """LyCORIS adds `diff` and `diff_b` without a scale, and the update of a norm as `w_norm` and `b_norm`."""
    updates = {
        "lora_unet_to_q.diff": torch.randn(5, 6),
        "lora_unet_to_q.diff_b": torch.randn(5),
        "lora_unet_norm.w_norm": torch.randn(5),
        "lora_unet_norm.b_norm": torch.randn(5),
    }
    save_file(updates | {f"lora_unet_to_q.{name}": tensor for name, tensor in PAIR.items()}, tmp_path / "a")
    model, x = small(), torch.randn(3, 6)
    li.load(model, tmp_path / "a")
    unet, base = model["unet"], small()["unet"]
    weight = base.to_q.weight.double() + updates["lora_unet_to_q.diff"].double() + torch.ones(5, 2) @ torch.ones(2, 6)
    want = x.double() @ weight.T + base.to_q.bias.double() + updates["lora_unet_to_q.diff_b"].double()
    assert torch.allclose(unet.to_q(x).double(), want, atol=1e-5)
    y = torch.randn(3, 5)
    scale, shift = (1 + updates["lora_unet_norm.w_norm"], updates["lora_unet_norm.b_norm"])
    assert torch.allclose(unet.norm(y), torch.nn.functional.layer_norm(y, (5,), scale, shift), atol=1e-5)
    li.export(model, tmp_path / "b", format="kohya")
    again = load_file(tmp_path / "b")
    assert all(torch.equal(again[name], tensor) for name, tensor in updates.items())
    assert read_header(tmp_path / "b").metadata["ss_network_module"] == "lycoris.kohya"


def test_metadata_say_rank_and_alpha_and_are_compared(tmp_path):
    model = small()
    li.inject(model, [li.Target("*.to_q"), li.Target("*.conv", rank=3)], rank=2, alpha=1)
    meta = read_header(li.export(fill(model), tmp_path / "a", format="kohya")).metadata
    assert (meta["ss_network_dim"], meta["ss_network_alpha"]) == ("2", "1.0")
    assert json.loads(meta["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "1.0"}
    assert not li.load(small(), tmp_path / "a").notes
    said = {"ss_network_dim": "9", "ss_network_module": "networks.lora"}
    plan = li.load(small(), saved(tmp_path / "b", "lora_unet_to_q", PAIR, said))
    assert "rank 9" in str(plan.notes) and "have 2" in str(plan.notes)
    assert not li.load(small(), saved(tmp_path / "c", "lora_unet_to_q", PAIR, {"ss_network_dim": "Dynamic"})).notes


@pytest.mark.parametrize("scaling", [{"rslora": True}, {"alpha": 0.1}, {"alpha": 1 / 3, "rslora": True}])
def test_any_scaling_comes_back(tmp_path, scaling):
    model = small()
    li.inject(model, "*.to_q", rank=3, **scaling)
    fresh = small()
    li.load(fresh, li.export(fill(model), tmp_path / "a", format="kohya"))
    (one,), (other,) = li.adapters(model), li.adapters(fresh)
    assert abs(other.adapter.scaling - one.adapter.scaling) <= 2**-52 * one.adapter.scaling
    assert torch.equal(other.adapter.lora_A, one.adapter.lora_A) and torch.equal(
        other.adapter.lora_B, one.adapter.lora_B
    )


def test_names_of_the_original_code_of_flux_are_refused(tmp_path):
    pair = {"lora_down.weight": torch.ones(2, 16), "lora_up.weight": torch.ones(48, 2)}
    path = saved(tmp_path / "a", "lora_unet_double_blocks_0_img_attn_qkv", pair)
    with pytest.raises(li.UnsupportedError, match=r"original code of Flux.*\n  lora_unet_double_blocks_0_img_attn_qkv"):
        li.load(flux(), path)


def test_names_that_fit_two_modules_are_reported(tmp_path):
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.ModuleDict({"c": nn.Linear(6, 5)})
            self.a = nn.ModuleDict({"b_c": nn.Linear(6, 5)})

    model = nn.ModuleDict({"unet": Clash()})
    with pytest.raises(li.MismatchError, match=r"lora_unet_a_b_c: unet\.a_b\.c or unet\.a\.b_c"):
        li.load(model, saved(tmp_path / "a", "lora_unet_a_b_c", PAIR))
    li.inject(model, "*.b_c", rank=2)
    with pytest.raises(li.UnsupportedError, match=r"lora_unet_a_b_c: unet\.a_b\.c or unet\.a\.b_c"):
        li.export(model, tmp_path / "b", format="kohya")
    assert not (tmp_path / "b").exists()


BROKEN = {
    "dora": ({"dora_scale": torch.ones(1, 6)} | PAIR, "DoRA's magnitudes.*\n  lora_unet_to_q.dora_scale"),
    "loha": ({"hada_w1_a": torch.ones(2, 2), "hada_w1_b": torch.ones(2, 2)}, "LoHa"),
    "lokr": ({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)}, "LoKr"),
    "half": ({"lora_down.weight": torch.ones(2, 6)}, "other half:\n  lora_unet_to_q.lora_down.weight"),
    "unknown": (PAIR | {"strange": torch.ones(1)}, "no known meaning.*\n  lora_unet_to_q.strange"),
    "alpha alone": ({"alpha": torch.ones(())}, "other half"),
    "alpha zero": (PAIR | {"alpha": torch.zeros(())}, "alpha is 0"),
    "alpha many": (PAIR | {"alpha": torch.ones(2)}, "no number"),
    "alpha nan": (PAIR | {"alpha": torch.tensor(float("nan"))}, "not a finite number"),
    "one axis": (PAIR | {"lora_down.weight": torch.ones(2)}, "two axes"),
    "ranks": (PAIR | {"lora_down.weight": torch.ones(3, 6)}, "do not share a rank"),
    "bomb": (
        {
            "lora_down.weight": torch.ones(1, 9999, 1, 1),
            "lora_mid.weight": torch.ones(1, 1, 999, 999),
            "lora_up.weight": torch.ones(5, 1),
        },
        r"shape \(5, 9999, 999, 999\) for Linear",
    ),
    "no tucker": (PAIR | {"lora_mid.weight": torch.ones(3, 2, 3, 3)}, "no Tucker"),
    "nan": (PAIR | {"lora_up.weight": torch.full((5, 2), float("inf"))}, "NaN or infinity"),
    "shape": (PAIR | {"lora_up.weight": torch.ones(4, 2)}, "wanted by the model"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_or_unknown_is_refused_by_name(tmp_path, case):
    tensors, why = BROKEN[case]
    model = small()
    with pytest.raises(li.FormatError, match=why):
        li.load(model, saved(tmp_path / "a", "lora_unet_to_q", tensors))
    assert not list(li.adapters(model))


def test_without_a_model_its_names_are_unknown(tmp_path):
    saved(tmp_path / "a", "lora_unet_to_q", PAIR)
    with pytest.raises(li.UnsupportedError, match="--model"):
        read_adapter(tmp_path / "a", None)


@pytest.mark.parametrize(
    ("model", "target", "options", "why"),
    [
        (lambda: nn.ModuleDict({"unet": nn.ModuleDict({"e": nn.Embedding(6, 4)})}), "*.e", {}, "neither linear"),
        (small, "*.to_q", {"bias": True}, "biases"),
        (lambda: nn.Sequential(nn.Linear(6, 5)), "0", {}, "nn.ModuleDict"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, model, target, options, why):
    model = model()
    li.inject(model, target, rank=2, **options)
    with pytest.raises(li.UnsupportedError, match=why):
        li.export(model, tmp_path / "a", format="kohya")
    assert not list(tmp_path.iterdir())


def test_files_are_converted_by_the_configs_of_a_pipeline(tmp_path):
    """Paths come from the configs alone; a component that the pipeline lacks is not asked for."""
    base = tmp_path / "base"
    unet().save_config(base / "unet")
    clip().config.save_pretrained(base / "text_encoder")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": [None, None]}
    (base / "model_index.json").write_text(json.dumps(index))
    model = nn.ModuleDict({"unet": unet(), "text_encoder": clip()})
    li.inject(model, ["*.to_q", "*.conv1", "*.q_proj"], rank=3, alpha=5)
    first = li.export(fill(model), tmp_path / "a.safetensors", format="kohya")
    done = li.convert(first, tmp_path / "b.safetensors", "diffusers", model=base)
    assert (done.read, done.written, done.sites) == ("kohya", "diffusers", len(list(li.adapters(model))))
    last = li.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", model=base).target
    found, want = load_file(last), load_file(first)
    assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)
    alone = unet()
    li.inject(alone, "*.to_q", rank=2)
    second = li.export(fill(alone), tmp_path / "d.safetensors", format="kohya")
    li.convert(second, tmp_path / "e.safetensors", "lora_inject", model=base / "unet")
    fresh = unet()
    li.load(fresh, tmp_path / "e.safetensors")
    assert_same_adapters(fresh, alone)
    with pytest.raises(li.MismatchError, match=r"no module for 2 of \d+ sites:\n  lora_te_text_model"):
        li.convert(first, tmp_path / "f.safetensors", "diffusers", model=base / "unet")
    assert not (tmp_path / "f.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("config.json", {"_class_name": "os"}, "has no model 'os'"),
        ("config.json", {"_class_name": "UNet2DConditionModel", "layers_per_block": "x"}, "cannot build"),
        ("model_index.json", {"_class_name": "P", "vae": ["diffusers", "AutoencoderKL"]}, "none of the components"),
        ("model_index.json", [], "must hold a JSON object"),
    ],
)
def test_configs_that_name_no_model_are_refused(tmp_path, name, content, why):
    saved(tmp_path / "a.safetensors", "lora_unet_to_q", PAIR)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).write_text(json.dumps(content))
    with pytest.raises(li.LoraInjectError, match=why):
        li.convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", model=tmp_path / "base")
