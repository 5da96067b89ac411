"""Adapter classes of installed packages: found by an entry point at the first plan, and named where they are broken."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import fill
from torch import nn

import lora_inject as li
from lora_inject import registry
from lora_inject.adapters.linear import LinearAdapter

ROOT = Path(li.__file__).parent.parent
ADAPTER = """
    from torch import nn
    import lora_inject as li

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(nn.init.normal_(nn.Parameter().new_empty(3, 4)))

        def forward(self, x):
            return 2 * x @ self.weight.T

    class ScaledAdapter(li.Adapter):
        kind = "{kind}"
        updates = ("weight",)

        @classmethod
        def can_adapt(cls, module):
            return isinstance(module, {serves})

        @classmethod
        def shape(cls, module, extras):
            return tuple(module._parameters["weight"].shape)

        @classmethod
        def layout(cls, module, config, extras):
            rows, columns = cls.shape(module, extras)
            return {{"lora_A": (config.rank, columns), "lora_B": (rows, config.rank)}}

        def delta(self, host):
            return {{"weight": self.scaling * self.lora_B.float() @ self.lora_A.float()}}
"""


@pytest.fixture
def install(tmp_path, monkeypatch, clean_registry):
    """Puts a package with its metadata where Python looks for packages, as pip would; the registry starts afresh."""
    names = []

    def put(name: str, code: str, value: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[lora_inject.adapters]\nmine = {value}\n")
        names.append(name)
        importlib.invalidate_caches()
        registry._loaded = False

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    for name in names:
        sys.modules.pop(name, None)


def scaled(kind: str = "scaled_of_plugin", serves: str = "Scaled") -> str:
    return ADAPTER.format(kind=kind, serves=serves)


def test_a_packaged_class_is_found_and_serves(install, tmp_path):
    install("scaled_plugin", scaled(), "scaled_plugin:ScaledAdapter")
    assert "scaled_plugin" not in sys.modules
    import scaled_plugin

    model = nn.Sequential(scaled_plugin.Scaled(), nn.Linear(3, 2))
    x, plain = torch.randn(5, 4), model(torch.zeros(5, 4))
    plan = li.inject(model, ["0", "1"], rank=2)
    assert [site.adapter_class.kind for site in plan] == ["scaled_of_plugin", "linear"]
    assert torch.equal(model(torch.zeros(5, 4)), plain)
    fill(model)
    adapter = model[0].adapters["default"]
    weight = model[0]._parameters["weight"] + adapter.lora_B @ adapter.lora_A
    with li.disabled(model[1]):
        assert torch.allclose(model(x), model[1](2 * x @ weight.T), atol=1e-5)
    path = li.export(model, tmp_path / "a")
    wanted = model(x)
    li.uninject(model)
    li.load(model, path)
    assert torch.equal(model(x), wanted)


def test_it_is_not_loaded_on_import_but_by_the_first_plan(install, tmp_path):
    install("scaled_plugin", scaled(), "scaled_plugin:ScaledAdapter")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import lora_inject as li
        from torch import nn
        assert "scaled_plugin" not in sys.modules, "on import"
        li.plan(nn.Sequential(nn.Linear(2, 2)), "0")
        assert "scaled_plugin" in sys.modules, "by the first plan"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120, cwd=ROOT)


def test_a_plugin_wins_over_built_in_classes_and_user_code_over_both(install):
    @li.register
    class Mine(LinearAdapter):
        kind = "mine"

        @classmethod
        def can_adapt(cls, module):
            return isinstance(module, nn.Linear) and module.out_features == 7

    install("scaled_plugin", scaled("of_plugin", "nn.Linear"), "scaled_plugin:ScaledAdapter")
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 7), nn.Embedding(3, 2))
    kinds = [site.adapter_class.kind for site in li.plan(model, "*", rank=2)]
    assert kinds == ["of_plugin", "mine", "embedding"]


@pytest.mark.parametrize(
    ("code", "value", "message"),
    [
        ("import no_such_module", "bad_plugin:Adapter", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1", "bad_plugin:Missing", "AttributeError"),
        ("Thing = int", "bad_plugin:Thing", "not a subclass of lora_inject.Adapter"),
        ("raise RuntimeError('at home')", "bad_plugin:Adapter", "RuntimeError: at home"),
    ],
)
def test_a_broken_plugin_is_named_each_time_and_changes_nothing(install, code, value, message):
    install("good_plugin", scaled("of_good", "nn.Linear"), "good_plugin:ScaledAdapter")
    install("bad_plugin", code, value)
    before, model = registry._classes, nn.Sequential(nn.Linear(2, 2))
    for _ in range(2):
        with pytest.raises(
            li.ConfigError, match=rf"the plug-in 'mine' \({value}\) of the package 'bad.plugin'.*{message}"
        ):
            li.plan(model, "0")
        assert registry._classes == before
    assert type(model[0]) is nn.Linear


def test_user_code_keeps_its_kind_against_a_plugin(install):
    install("scaled_plugin", scaled("shared_kind"), "scaled_plugin:ScaledAdapter")

    @li.register
    class Mine(LinearAdapter):
        kind = "shared_kind"

    assert [known for known in registry.registered() if known.kind == "shared_kind"] == [Mine]


def test_once_loaded_no_lock_is_taken_that_an_interrupt_could_leave_closed():
    registry.registered()
    with ThreadPoolExecutor(1) as pool, registry._loading:
        assert pool.submit(registry.registered).result(timeout=60) == registry.registered()
