"""diffusers' files: its loaders and ours in both directions, all ages of names, and what is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from diffusion import assert_same_adapters, clip, deltas, fill, flux, run, t5, unet
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

import lora_inject as li
from lora_inject.formats import read_adapter
from lora_inject.safefile import read_header

NAME = "pytorch_lora_weights.safetensors"
TARGETS = [li.Target("*attn*.to_*"), li.Target("*.to_q", rank=5), li.Target("*.conv1", alpha=1.7), li.Target("conv_in")]


@pytest.fixture
def quiet():
    """Fails a test in which diffusers or transformers logs a warning."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    assert not heard


def metadata(path):
    return json.loads(read_header(path).metadata["lora_adapter_metadata"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"rslora": True}])
def test_diffusers_loads_our_unet(quiet, tmp_path, dtype, options):
    model = unet()
    li.inject(model, TARGETS, rank=3, alpha=6, dtype=dtype, **options)
    path = li.export(fill(model), tmp_path / NAME, format="diffusers")
    theirs = unet()
    theirs.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
    want = run(model)
    assert (want - run(unet())).abs().max() > 0.1
    assert torch.allclose(run(theirs), want, atol=1e-5 if dtype == torch.float32 else 3e-2)
    said = metadata(path)
    assert said["unet.use_rslora"] is bool(options) and set(said["unet.rank_pattern"].values()) == {5}
    fresh = unet()
    li.load(fresh, path)
    assert_same_adapters(fresh, model)


@pytest.mark.parametrize("make", [unet, flux])
def test_we_load_what_diffusers_saves(tmp_path, make):
    theirs = make()
    names = ["to_k", "to_out.0"] + (["conv2", "proj_in"] if make is unet else ["norm_out.linear", "proj_mlp"])
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=names,
        init_lora_weights=False,
        rank_pattern={r"^.*\.attn\.to_k" if make is flux else "attn1.to_k": 2},
        alpha_pattern={names[-1]: 7.5},
        use_rslora=make is flux,
    )
    theirs.add_adapter(config)
    theirs.save_lora_adapter(tmp_path)
    model = make()
    li.load(model, tmp_path)
    assert torch.allclose(run(model), run(theirs), atol=1e-5)
    assert (run(model) - run(make())).abs().max() > 0.1
    saved = get_peft_model_state_dict(theirs, adapter_name="default")
    ours = {ref.path: ref.adapter for ref in li.adapters(model)}
    assert len(saved) == 2 * len(ours)
    for key, tensor in saved.items():
        path, _, factor = key.removesuffix(".weight").rpartition(".")
        assert torch.equal(getattr(ours[path], factor).reshape(tensor.shape), tensor)


def test_diffusers_loads_our_transformer(quiet, tmp_path):
    model = flux()
    li.inject(model, [li.Target("*.to_*"), li.Target("*.proj_out", rank=2, alpha=3), li.Target("proj_out")], rank=4)
    path = li.export(fill(model), tmp_path / NAME, format="diffusers")
    theirs = flux()
    theirs.load_lora_adapter(tmp_path, prefix="transformer", use_safetensors=True)
    assert torch.allclose(run(theirs), run(model), atol=1e-5)
    assert (run(model) - run(flux())).abs().max() > 0.1
    fresh = flux()
    li.load(fresh, path)
    assert_same_adapters(fresh, model)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("targets", [["*.fc1"], ["*.q_proj", "*.fc2"]])
def test_diffusers_loads_our_text_encoder(quiet, tmp_path, projection, targets):
    model = clip(projection)
    li.inject(model, [*targets, li.Target("*.layers.0.*", rank=2, alpha=5)], rank=3)
    path = li.export(fill(model), tmp_path / NAME, format="diffusers")
    state, alphas, said = Loader.lora_state_dict(tmp_path, return_lora_metadata=True)
    theirs = clip(projection)
    Loader.load_lora_into_text_encoder(state, alphas, theirs, prefix="text_encoder", metadata=said)
    assert torch.allclose(run(theirs), run(model), atol=1e-5)
    assert (run(model) - run(clip(projection))).abs().max() > 0.1
    fresh = clip(projection)
    li.load(fresh, path)
    assert_same_adapters(fresh, model)


def test_biases_are_kept_and_made_complete(quiet, tmp_path):
    model = unet()
    li.inject(model, [li.Target("*.conv2", bias=True), li.Target("*.conv1")], rank=2, alpha=3)
    path = li.export(fill(model), tmp_path / NAME, format="diffusers")
    theirs = unet()
    theirs.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
    assert torch.allclose(run(theirs), run(model), atol=1e-5)
    fresh = unet()
    li.load(fresh, path)
    assert torch.allclose(run(fresh), run(model), atol=1e-5)


def test_a_pipeline_is_saved_by_diffusers_and_read_by_component(tmp_path):
    denoiser, encoder = unet(), clip()
    both = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}
    denoiser.add_adapter(LoraConfig(target_modules=["to_v"], **both))
    encoder.add_adapter(LoraConfig(target_modules=["v_proj"], **both))
    packed = {
        name: (get_peft_model_state_dict(one, adapter_name="default"), one.peft_config["default"].to_dict())
        for name, one in (("unet", denoiser), ("text_encoder", encoder))
    }
    for _, config in packed.values():
        config["target_modules"] = list(config["target_modules"])
    Loader.save_lora_weights(
        tmp_path,
        unet_lora_layers=packed["unet"][0],
        text_encoder_lora_layers=packed["text_encoder"][0],
        unet_lora_adapter_metadata=packed["unet"][1],
        text_encoder_lora_adapter_metadata=packed["text_encoder"][1],
    )
    model = nn.ModuleDict({"unet": unet(), "text_encoder": clip()})
    li.load(model, tmp_path)
    assert torch.allclose(run(model["unet"]), run(denoiser), atol=1e-5)
    assert torch.allclose(run(model["text_encoder"]), run(encoder), atol=1e-5)
    assert all(ref.adapter.scaling == 1.5 for ref in li.adapters(model))
    again = li.export(model, tmp_path / "again.safetensors", format="diffusers")
    fresh = nn.ModuleDict({"unet": unet(), "text_encoder": clip()})
    li.load(fresh, again)
    assert_same_adapters(fresh, model)
    # Without a model the components stay in front of the paths, and the file can be written again as it was.
    bundle = read_adapter(again, None)
    assert {path.partition(".")[0] for path in bundle.sites} == {"unet", "text_encoder"}
    with pytest.raises(li.MismatchError, match="no module for"):
        li.load(unet(), again)


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
OLD = {
    "peft": (f"unet.{BLOCK}.to_out.0.lora_A.weight", f"unet.{BLOCK}.to_out.0.lora_B.weight"),
    "down and up": (f"unet.{BLOCK}.to_out.0.lora.down.weight", f"unet.{BLOCK}.to_out.0.lora.up.weight"),
    "processor": (f"unet.{BLOCK}.processor.to_out_lora.down.weight", f"unet.{BLOCK}.processor.to_out_lora.up.weight"),
}


@pytest.mark.parametrize("age", OLD)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_names_of_all_ages_are_read(tmp_path, age, alpha):
    """Without metadata alpha is the rank, unless a tensor says otherwise."""
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    tensors = dict(zip(OLD[age], (a, b), strict=True))
    if alpha is not None:
        tensors[f"unet.{BLOCK}.to_out.0.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / NAME)
    model = unet()
    li.load(model, tmp_path / NAME)
    want = (1.0 if alpha is None else 0.5) * b.double() @ a.double()
    assert torch.allclose(deltas(model)[f"{BLOCK}.to_out.0.weight"], want, atol=1e-6)
    assert len(list(li.adapters(model))) == 1
    if alpha is None:
        theirs = unet()
        theirs.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
        assert torch.allclose(run(theirs), run(model), atol=1e-5)


@pytest.mark.parametrize("level", ["", "text_model."])
@pytest.mark.parametrize("old", ["to_q_lora", "q_proj.lora_linear_layer"])
@pytest.mark.parametrize("projection", [False, True])
def test_text_encoders_of_all_ages_are_read(tmp_path, level, old, projection):
    stem = f"text_encoder.{level}encoder.layers.0.self_attn.{old}"
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    save_file({f"{stem}.down.weight": a, f"{stem}.up.weight": b}, tmp_path / NAME)
    model = clip(projection)
    li.load(model, tmp_path)
    ((path, delta),) = deltas(model).items()
    assert path.endswith("encoder.layers.0.self_attn.q_proj.weight")
    assert torch.allclose(delta, b.double() @ a.double(), atol=1e-6)


PAIR = {"unet.conv_out.lora_A.weight": torch.ones(2, 8, 3, 3), "unet.conv_out.lora_B.weight": torch.ones(4, 2, 1, 1)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
BROKEN = {
    "dora": ({"unet.conv_out.lora_magnitude_vector": torch.ones(4)}, None, "DoRA.*\n  unet.conv_out.lora_magn"),
    "lokr": ({"unet.conv_out.lokr_w1": torch.ones(4, 4)}, None, "LoKr"),
    "half": ({"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}, None, "other half:\n  unet.conv_in.lora_A"),
    "unknown": ({"unet.conv_in.weight": torch.ones(2)}, None, "no known meaning.*\n  unet.conv_in.weight"),
    "no json": ({}, "{", "not valid JSON"),
    "no object": ({}, "[1]", "must be a JSON object"),
    "rank": ({}, CONFIG | {"r": 3}, "rank 3 for unet.conv_out, whose tensors have rank 2"),
    "type": ({}, CONFIG | {"lora_alpha": "4"}, "lora_alpha"),
    "huge": ({}, CONFIG | {"r": 10**9 * 10**9}, "unet: r = "),
    "no lora": ({}, CONFIG | {"peft_type": "LOKR"}, "no LoRA"),
    "dora said": ({}, CONFIG | {"use_dora": True}, "use_dora"),
    "pattern": ({}, CONFIG | {"alpha_pattern": {"(a+)+b": 1}}, "too costly"),
    "two alphas": ({"unet.conv_out.alpha": torch.tensor(1.0)}, CONFIG, "alpha 4 for unet.conv_out"),
    "parameters": ({}, CONFIG | {"target_parameters": ["x"]}, "target_parameters"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_or_unknown_is_refused_by_name(tmp_path, case):
    tensors, said, why = BROKEN[case]
    if isinstance(said, dict):
        said = json.dumps({f"unet.{key}": value for key, value in said.items()})
    save_file(PAIR | tensors, tmp_path / NAME, None if said is None else {"lora_adapter_metadata": said})
    model = unet()
    with pytest.raises((li.FormatError, li.UnsupportedError), match=why):
        li.load(model, tmp_path)
    assert not list(li.adapters(model))


@pytest.mark.parametrize(
    ("model", "target", "why"),
    [
        (clip, "*token_embedding", "token_embedding.*embedding"),
        (lambda: nn.ModuleDict({"unet": nn.ModuleDict({"c": nn.Conv2d(4, 4, 3, dilation=2)})}), "*.c", "dilation"),
        (lambda: nn.Sequential(nn.Linear(6, 5)), "0", "nn.ModuleDict"),
        (lambda: t5(), li.Target("*.layer_norm.weight", adapter="full"), "full"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, model, target, why):
    model = model()
    li.inject(model, target, rank=2)
    with pytest.raises(li.UnsupportedError, match=why):
        li.export(model, tmp_path / "a", format="diffusers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: nn.Linear(6, 5), {"rank": 6, "dense": True}),
        (lambda: nn.Linear(5, 6), {"rank": 6, "dense": True, "alpha": 3}),
        (lambda: nn.Conv2d(4, 6, (3, 2)), {"rank": 3, "factorization": "balanced", "alpha": 2}),
        (lambda: nn.Conv2d(2, 3, 2), {"rank": 9, "dense": True}),
        (lambda: nn.Conv1d(4, 6, 3), {"rank": 2}),
        (lambda: nn.Conv3d(4, 6, 3), {"rank": 2, "alpha": 5}),
    ],
)
def test_every_factorisation_comes_back_as_the_same_update(tmp_path, format, make, options):
    model, fresh = (nn.ModuleDict({"unet": nn.ModuleDict({"layer": make()})}) for _ in range(2))
    li.inject(model, "*.layer", **options)
    li.load(fresh, li.export(fill(model), tmp_path / "a.safetensors", format=format), check_base=False)
    (want,), (found,) = deltas(model).values(), deltas(fresh).values()
    assert want.abs().max() > 1e-3
    if "factorization" in options:
        # Another order of the same sum of two products per element, beside products with zero.
        assert torch.allclose(found, want, atol=2**-22 * want.abs().max().item())
    else:
        assert torch.equal(found, want)
