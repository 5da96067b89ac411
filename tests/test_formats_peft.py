"""PEFT's files, proved against PEFT itself: its outputs and tensors, and ours, in both directions."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft_cases import CASES, EXPERTS, Case, experts, rows
from safetensors.torch import load_file, save_file
from torch import nn

import lora_inject as li

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# A bias of B on a layer without one cannot be merged by PEFT, which warns; nothing else may.
ATOL = 2e-6


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def fill(parameters) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def injected(base: nn.Module, case: Case, **options) -> nn.Module:
    model = copy.deepcopy(base)
    li.inject(model, case.targets, **{"rank": 2, "alpha": 3, **case.options, **options})
    fill(li.adapter_parameters(model).values())
    for ref in li.adapters(model):
        padding = getattr(ref.module, "padding_idx", None)
        if padding is not None:
            ref.adapter.lora_B.data[padding] = 0
    return model


def peft_model(base: nn.Module, **config) -> PeftModel:
    """A model of PEFT's own, every trained number drawn anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT has to say about our choice of options
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, **config))
    fill(p for n, p in model.named_parameters() if p.requires_grad)
    for module in model.modules():
        if getattr(getattr(module, "base_layer", None), "padding_idx", None) is not None:
            module.lora_embedding_A["default"].data[:, module.base_layer.padding_idx] = 0
    return model.eval()


def saved(model: PeftModel, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes the bias of B for a matrix that lost an axis
        model.save_pretrained(folder)
    return folder


def loaded_by_peft(base: nn.Module, folder) -> PeftModel:
    """PEFT's own loading: a warning is an error, and so is a key that it misses or does not know."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    result = set_peft_model_state_dict(model, load_file(folder / TENSORS))
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    assert result.unexpected_keys == []
    return model.eval()


def exact(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output in float64, so that only a difference of functions is left."""
    with torch.no_grad():
        model = copy.deepcopy(model).double().eval()
        return model(x.double() if x.is_floating_point() else x)


def test_peft_computes_what_we_exported(case, tmp_path):
    base, x = case.build(), case.give()
    model = injected(base, case)
    folder = li.export(model, tmp_path / "out", format="peft")
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG, TENSORS]
    theirs = loaded_by_peft(base, folder)
    ours = exact(model, x)
    assert torch.allclose(exact(theirs, x), ours, rtol=0, atol=ATOL)
    assert not torch.allclose(ours, exact(base, x), atol=1e-2)
    theirs.train()
    with torch.no_grad():
        assert torch.allclose(theirs(x), model.train()(x), rtol=0, atol=1e-5)


def test_we_compute_what_peft_saved(case, tmp_path):
    base, x = case.build(), case.give()
    theirs = peft_model(base, **case.peft)
    model = copy.deepcopy(base)
    li.load(model, saved(theirs, tmp_path / "theirs"))
    assert torch.allclose(exact(model, x), exact(theirs, x), rtol=0, atol=ATOL)
    assert not torch.allclose(exact(model, x), exact(base, x), atol=1e-2)


def test_pefts_tensors_come_back_bit_for_bit(case, tmp_path):
    base = case.build()
    model = copy.deepcopy(base)
    li.load(model, saved(peft_model(base, **case.peft), tmp_path / "theirs"))
    li.export(model, tmp_path / "ours", format="peft")
    theirs, ours = load_file(tmp_path / "theirs" / TENSORS), load_file(tmp_path / "ours" / TENSORS)
    copies = {name for name in theirs if ".original_module." in name or ".modules_to_save." in name}
    assert theirs.keys() - copies == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_our_updates_come_back_exactly(case, dtype, tmp_path):
    base = case.build()
    model = injected(base, case, dtype=dtype)
    again = copy.deepcopy(base)
    li.load(again, li.export(model, tmp_path / "out", format="peft"))
    before, after = updates(model), updates(again)
    assert before.keys() <= after.keys()
    for name, update in after.items():
        if name not in before:
            assert not update.any(), name
        elif name.endswith(".weight") and "full" not in kinds(model)[name]:
            assert torch.equal(update, before[name]), name
        else:  # a trained value is stored in the base's dtype; two biases become one, rounded to theirs
            assert torch.allclose(update, before[name], rtol=0, atol=4 * torch.finfo(dtype).eps), name


def updates(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every update in float64 by the path of its parameter."""
    found: dict[str, torch.Tensor] = {}
    for ref in li.adapters(model):
        for name, update in copy.deepcopy(ref.adapter).double().delta(ref.module).items():
            owner = ref.path.removesuffix(f".{ref.adapter.parameter}") if ref.adapter.parameter else ref.path
            found[f"{owner}.{name}"] = found.get(f"{owner}.{name}", 0) + update.double()
    return found


def kinds(model: nn.Module) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for ref in li.adapters(model):
        owner = ref.path.removesuffix(f".{ref.adapter.parameter}") if ref.adapter.parameter else ref.path
        for name in ref.adapter.delta_names(ref.module):
            found.setdefault(f"{owner}.{name}", set()).add(ref.adapter.kind)
    return found


# Ranks and scales of their own.


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 6)}) for _ in range(12)])

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer["q"](x)) - layer["v"](x) / 4
        return x


def test_patterns_that_we_write_mean_one_layer_each_to_peft(tmp_path):
    base, x = Two(), rows()
    model = copy.deepcopy(base)
    li.inject(
        model,
        ["*.q", "*.v", li.Target("layers.1.q", rank=3, alpha=7.5), li.Target("layers.11.q", rank=5, rslora=True)],
        rank=4,
        alpha=6,
        exclude=["layers.3.*"],
    )
    fill(li.adapter_parameters(model).values())
    folder = li.export(model, tmp_path / "out", format="peft")
    config = json.loads((folder / CONFIG).read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 6
    assert config["rank_pattern"] == {r"^layers\.1\.q": 3, r"^layers\.11\.q": 5}
    assert torch.allclose(exact(loaded_by_peft(base, folder), x), exact(model, x), rtol=0, atol=ATOL)
    again = copy.deepcopy(base)
    li.load(again, folder)
    assert {ref.path: ref.adapter.scaling for ref in li.adapters(again)} == pytest.approx(
        {ref.path: ref.adapter.scaling for ref in li.adapters(model)}, rel=1e-15
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_patterns_are_read_by_its_own_rule(rslora, tmp_path):
    base, x = Two(), rows()
    config = {
        "rank_pattern": {r"1\.q": 3, r"^layers.2": 9, r"layers\.(4|5)\.v": 1, "v": 4},
        "alpha_pattern": {"layers.1.q": 11, r".*\.v": 2, "1": 100},
        "target_modules": r"layers\.\d+\.(q|v)",
        "use_rslora": rslora,
    }
    theirs = peft_model(base, **config)
    model = copy.deepcopy(base)
    li.load(model, saved(theirs, tmp_path / "theirs"))
    for ref in li.adapters(model):
        layer = theirs.get_submodule(f"base_model.model.{ref.path}")
        assert (ref.adapter.config.rank, ref.adapter.scaling) == (layer.r["default"], layer.scaling["default"])
    assert len({ref.adapter.scaling for ref in li.adapters(model)}) > 3
    assert torch.allclose(exact(model, x), exact(theirs, x), rtol=0, atol=ATOL)


def test_targets_are_as_short_as_they_can_be(tmp_path):
    def targets(patterns):
        model = Two()
        li.inject(model, patterns)
        folder = li.export(model, tmp_path / "out", format="peft")
        loaded_by_peft(Two(), folder)
        return json.loads((folder / CONFIG).read_text())["target_modules"]

    assert targets(["*.q"]) == ["q"]
    assert targets(["layers.1.q", "layers.2.q"]) == ["layers.1.q", "layers.2.q"]

    nested = nn.Module()
    nested.a, nested.b = nn.Linear(2, 2), nn.Module()
    nested.b.a = nn.Linear(2, 2)
    model = copy.deepcopy(nested)
    li.inject(model, ["a"])
    folder = li.export(model, tmp_path / "nested", format="peft")
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == "a"
    names = [name for name, _ in loaded_by_peft(nested, folder).named_parameters() if "lora_" in name]
    assert [name.split(".")[2] for name in names] == ["a", "a"]


# Attention: PEFT adapts both projections or none, and adds the update of the second one twice.


@pytest.mark.parametrize(
    "targets",
    [
        ["block.layer.out_proj"],
        ["block.layer.in_proj_weight"],
        [li.Target("block.layer.in_proj_weight", rank=3, alpha=5), li.Target("block.layer.out_proj", rslora=True)],
        [
            li.Target("block.layer.in_proj_weight", rank=1, alpha=5),
            li.Target("block.layer.out_proj", rank=4, alpha=0.7),
        ],
    ],
    ids=str,
)
def test_attention_in_parts_and_with_two_ranks(targets, tmp_path):
    case = CASES["attention"]
    base, x = case.build(), case.give()
    model = injected(base, Case(case.build, case.give, targets))
    folder = li.export(model, tmp_path / "out", format="peft")
    ours = exact(model, x)
    assert not torch.allclose(ours, exact(base, x), atol=1e-2)
    assert torch.allclose(exact(loaded_by_peft(base, folder), x), ours, rtol=0, atol=ATOL)
    again = copy.deepcopy(base)
    li.load(again, folder)
    assert torch.allclose(exact(again, x), ours, rtol=0, atol=ATOL)


def test_attention_with_biases_as_peft_computes_them(tmp_path):
    case = CASES["attention"]
    base, x = case.build(), case.give()
    theirs = peft_model(base, target_modules=["layer"], lora_bias=True)
    model = copy.deepcopy(base)
    li.load(model, saved(theirs, tmp_path / "theirs"))
    assert torch.allclose(exact(model, x), exact(theirs, x), rtol=0, atol=ATOL)


def test_attention_of_a_peft_that_may_have_changed_is_refused(tmp_path):
    base = CASES["attention"].build()
    folder = saved(peft_model(base, target_modules=["layer"]), tmp_path / "theirs")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"peft_version": "0.22.0"}))
    with pytest.raises(li.UnsupportedError, match=r"out_proj: PEFT up to 0\.21\.2 adds .* twice; a newer one"):
        li.load(base, folder)


# Experts of older PEFTs.


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("inner", [5, 6])
@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.19.1", "0.21.2", None])
def test_experts_of_every_version_of_peft(version, inner, transposed, tmp_path):
    """The layouts as those versions computed them: einsum "eio" or "eoi", A meeting the second axis or the last."""
    base = experts(transposed, inner)()
    module, (count, rank) = base.block.layer, (3, 2)
    last = {"0.18.1": False, "0.19.0": transposed, None: False}.get(version, not transposed)
    tensors, wanted = {}, {}
    for depth, name in enumerate(("down_proj", "gate_up_proj")):
        first, second = module.get_parameter(name).shape[1:]
        a = torch.randn(count * rank, second if last else first)
        b = torch.randn(first if last else second, count * rank)
        stacks = b.reshape(-1, rank, count), a.reshape(count, rank, -1)
        wanted[name] = torch.einsum("ore,eri->eoi" if last else "ore,eri->eio", *stacks) * 1.5
        place = "base_model.model.block.layer" + ".base_layer" * depth
        tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": [], **EXPERTS["peft"]}
    folder = written(tmp_path, config | ({"peft_version": version} if version else {}), tensors)
    if version is None and inner == 6 and not transposed:
        with pytest.raises(li.FormatError, match=r"gate_up_proj|down_proj.*square.*peft_version"):
            li.load(base, folder)
        return
    li.load(base, folder)
    for ref in li.adapters(base):
        name = ref.adapter.parameter
        assert torch.allclose(ref.adapter.delta(ref.module)[name], wanted[name], rtol=0, atol=1e-5), name


def test_another_base_is_noticed_where_we_wrote_the_folder(tmp_path):
    base = Two()
    model = copy.deepcopy(base)
    li.inject(model, "*.q")
    for profile in (None, "serve"):
        folder = li.export(model, tmp_path / str(profile), format="peft", profile=profile)
        li.load(copy.deepcopy(base), folder)
        other = copy.deepcopy(base)
        other.layers[3].q.weight.data += 1
        with pytest.raises(li.MismatchError, match=r"1 of 12 sites differ:\n  layers.3.q"):
            li.load(other, folder)
        li.load(other, folder, check_base=False)
    tensors = load_file(folder / TENSORS)
    for text in ("[]", '{"layers.3.q": 3}', '{"layers.3.q": {"shape": "x", "hash": "y"}}', "{"):
        save_file(tensors, folder / TENSORS, {"lora_inject_base": text})
        with pytest.raises(li.FormatError, match="lora_inject_base"):
            li.load(copy.deepcopy(base), folder)


def written(folder, config, tensors):
    folder = folder / "made"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / TENSORS)
    return folder
