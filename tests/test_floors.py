"""Imports only go down: a file imports from lower floors only, and nothing heavy comes with `import lora_inject`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_inject

PACKAGE = Path(lora_inject.__file__).parent
ROOT = PACKAGE.parent
FLOORS = [
    {
        "version",
        "errors",
        "tree",
        "tables",
        "blocks",
        "commit",
        "recipe_yaml",
        "bulk",
        "dropout",
        "stacking",
        "rows",
        "report.spectra",
    },
    {"fused", "quantized"},
    {"config", "safefile", "keeping", "verdicts", "inspected", "models", "model_inputs", "offload"},
    {"targets", "adapter", "adapter_file", "safewrite"},
    {"registry", "recipe", "slots"},
    {"host"},
    {"swap", "weights", "freezing"},
    {"factored", "residual", "sites", "fingerprint", "recipe_schema", "ties", "computed"},
    {"adapters.*", "formats.*", "refs", "merge_job", "selection", "recipe_file"},
    {"adapters", "formats", "plan", "merge_ways"},
    {"merging"},
    {"merge"},
    {"check.*"},
    {"check"},
    {"surgery", "switches", "verify", "state"},
    {"loading", "diffusion_models"},
    {"checkpoint.*"},
    {"conversion", "report.*", "algebra.*"},
    {"inspection"},
    {""},
    {"cli.*"},
    {"__main__"},
]
"""From the ground up; a file imports from floors below its own. "x.*" is a folder whose files may import from
each other as long as there is no cycle, "" is the package itself."""
LATE = {"recipe": {"recipe_file"}}
"""Imports inside functions, of what only few users need, that go up; each is a decision."""
ON_DEMAND = ("algebra", "check", "checkpoint", "conversion", "formats", "loading", "report", "state")
"""What works on files, and takes longer to import than the rest together."""
HEAVY = (
    "transformers",
    "pydantic",
    "typer",
    "rich",
    "numpy.testing",
    "matplotlib",
    "peft",
    "accelerate",
    "click",
    "torchao",
    "bitsandbytes",
    "diffusers",
)
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
FILES = {name.removesuffix(".__init__") if name != "__init__" else "": path for name, path in FILES.items()}


def floor(name: str) -> int:
    for number, names in enumerate(FLOORS):
        if name in names:
            return number
    for number, names in enumerate(FLOORS):
        if f"{name.partition('.')[0]}.*" in names:
            return number
    raise AssertionError(
        f"lora_inject/{name.replace('.', '/')}.py has no floor: add it to FLOORS in tests/test_floors.py"
    )


def imports(name: str, path: Path, late: bool) -> set[str]:
    """Returns the names of the package's files that a file imports, at its top or inside functions."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)
    }
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if (id(node) in inside) != late:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = [part for part in package if part][: len([p for p in package if p]) - node.level + 1]
            target = ".".join([*folder, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                full = f"{target}.{alias.name}".strip(".")
                found.add(full if full in FILES else target)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_inject":
            found.add(node.module.removeprefix("lora_inject").strip("."))
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("lora_inject").strip(".") for a in node.names if a.name.startswith("lora_inject")
            }
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_imports_from_lower_floors_only(name):
    folder = name.partition(".")[0]
    for target in imports(name, FILES[name], late=False):
        neighbour = folder and target.partition(".")[0] == folder and floor(target) == floor(name)
        assert neighbour or floor(target) < floor(name), f"{name or '__init__'} imports {target}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_inside_functions_go_down_too_or_are_listed(name):
    for target in imports(name, FILES[name], late=True):
        assert floor(target) < floor(name) or target in LATE.get(name, ()), f"{name} imports {target} late"


def test_there_is_no_cycle():
    graph = {name: imports(name, path, late=False) & FILES.keys() for name, path in FILES.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_table_names_no_file_twice():
    names = [name for floor_ in FLOORS for name in floor_]
    assert len(names) == len(set(names))


def imported_by(statement: str) -> set[str]:
    """Returns the modules that a statement imports beyond torch, in a process of its own."""
    code = f"import torch, sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    return set(run.stdout.split())


@pytest.mark.parametrize("statement", ["import lora_inject", "from lora_inject import *"])
def test_importing_the_package_imports_nothing_heavy(statement):
    loaded = {module.split(".")[0] for module in imported_by(statement)}
    assert "lora_inject" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_what_works_on_files_is_imported_on_demand():
    at_first = imported_by("import lora_inject as li; li.inject, li.merge, li.verify")
    assert "lora_inject.surgery" in at_first
    assert at_first.isdisjoint(f"lora_inject.{name}" for name in ON_DEMAND)
    assert {"lora_inject.state", "lora_inject.formats"} <= imported_by("import lora_inject as li; li.export")


def test_every_public_name_is_there_whenever_it_is_imported():
    assert set(lora_inject.__all__) <= set(dir(lora_inject))
    for name in lora_inject.__all__:
        assert getattr(lora_inject, name) is getattr(lora_inject, name)
    with pytest.raises(AttributeError, match="no attribute 'injekt'"):
        _ = lora_inject.injekt


def test_transformers_is_not_needed_to_serve_its_conv1d():
    for path in PACKAGE.joinpath("adapters").glob("*.py"):
        assert "import transformers" not in path.read_text() and "from transformers" not in path.read_text()


def test_all_names_that_are_exported_exist_and_only_those():
    public = {name for name in vars(lora_inject) if not name.startswith("_")}
    assert set(lora_inject.__all__) - {"__version__"} <= public
    assert len(set(lora_inject.__all__)) == len(lora_inject.__all__)
    assert all(getattr(lora_inject, name) is not None for name in lora_inject.__all__)


API = ["plan", "inject", "uninject", "merge", "unmerge", "export", "load", "adapters", "adapter_parameters", "verify"]
API += ["adapter_state", "disabled", "scaled", "activate", "load_recipe", "register", "Adapter", "Target"]
API += ["LoraInjectError"]


@pytest.mark.parametrize("name", API)
def test_the_public_api_of_the_design_is_there(name):
    assert name in lora_inject.__all__ and callable(getattr(lora_inject, name))
