"""The documentation is true: its Python blocks run, what it prints is printed, its links and names exist.

Blocks of one file run from top to bottom in one namespace, in an empty folder. Two comments on the line before a block
mean something: `<!-- not run: reason -->` before a Python block, and `<!-- output -->` before a text block that must be
what the Python block above it prints.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import json
import pkgutil
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import lora_inject
from lora_inject import registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "sh", "text", "yaml", "json", "html", "toml"}
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
OUTPUT = "<!-- output -->"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line of its first line of text (from 1), and the line before the fence."""

    language: str
    line: int
    before: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language == "python" and not NOT_RUN.fullmatch(self.before)

    @property
    def is_output(self) -> bool:
        return self.before == OUTPUT


def blocks_and_prose(text: str) -> tuple[list[Block], str]:
    """Splits a page; a fence that is never closed, or stands inside a list or quote, is an error."""
    blocks: list[Block] = []
    prose: list[str] = []
    lines = text.splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.lstrip(" >").startswith("```"):
            if start is None:
                prose.append(line)
        elif start is None:
            assert line.startswith("```"), f"line {number + 1}: a fence must start its line"
            start = number
        else:
            assert line == "```", f"line {number + 1}: a fence inside a fence"
            before = lines[start - 1].strip() if start else ""
            body = "\n".join(lines[start + 1 : number]) + "\n"
            blocks.append(Block(lines[start][3:].strip(), start + 2, before, body))
            start = None
    assert start is None, f"line {start}: a fence that is never closed"
    return blocks, "\n".join(prose)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(params=PAGES, ids=page_id)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def python(page: Path) -> list[Block]:
    return [block for block in blocks_and_prose(page.read_text(encoding="utf-8"))[0] if block.language == "python"]


def code_of(block: Block, page: Path) -> types.CodeType:
    """Compiles a block so that tracebacks show its line in the page."""
    tree = ast.increment_lineno(ast.parse(block.text, str(page)), block.line - 1)
    return compile(tree, str(page), "exec", dont_inherit=True)


def test_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch, clean_registry):
    monkeypatch.chdir(tmp_path)
    # A module of its own, so that classes defined on the page can be pickled.
    module = types.ModuleType("page_under_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed = None
    for block in blocks_and_prose(page.read_text(encoding="utf-8"))[0]:
        if block.runs:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(code_of(block, page), module.__dict__)
            printed = out.getvalue()
        elif block.is_output:
            assert printed is not None, f"{page}:{block.line}: no Python block ran before this output"
            assert trimmed(printed) == trimmed(block.text), f"{page}:{block.line}: it prints\n{printed}"
            printed = None
        elif block.language == "python":
            printed = None


def trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def test_every_fence_has_a_language_that_is_known(page):
    for block in blocks_and_prose(page.read_text(encoding="utf-8"))[0]:
        assert block.language in LANGUAGES, f"{page}:{block.line}: {block.language!r}; Python is spelled 'python'"
        assert not (block.is_output and block.language != "text"), f"{page}:{block.line}: output must be 'text'"


def test_blocks_that_do_not_run_are_rare_and_valid_python():
    blocks = {(page, block) for page in PAGES for block in python(page)}
    idle = [(page, block) for page, block in blocks if not block.runs]
    assert len(idle) <= len(blocks) // 10, [f"{page_id(page)}:{block.line}" for page, block in idle]
    for page, block in idle:
        code_of(block, page)


def test_readme_and_the_pages_of_the_core_have_examples():
    assert {page_id(page) for page in PAGES if any(block.runs for block in python(page))} >= {
        "README.md",
        "docs/file-format.md",
        "docs/getting-started.md",
        "docs/how-the-swap-works.md",
        "docs/writing-an-adapter.md",
    }


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown viewer gives to the headings of a page."""
    prose = blocks_and_prose(page.read_text(encoding="utf-8"))[1]
    titles = re.findall(r"^#+ +(.+?) *$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", blocks_and_prose(page.read_text(encoding="utf-8"))[1])
    return [link for link in re.findall(r"\]\(([^)\s]+)", prose) if not re.match(r"[a-z]+:", link)]


def test_relative_links_resolve(page):
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_pages_that_the_package_mentions_exist():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "lora_inject").rglob("*.py")]
    mentioned = {page for source in sources for page in re.findall(r"docs/[\w-]+\.md", source)}
    assert mentioned
    assert not [page for page in mentioned if not (ROOT / page).is_file()]


def test_names_that_the_pages_use_are_public(page):
    used = set(re.findall(r"\bli\.([A-Za-z_]\w*)", page.read_text(encoding="utf-8")))
    assert not used - set(lora_inject.__all__)


def test_every_public_name_is_on_the_getting_started_page():
    text = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    public = {name for name in lora_inject.__all__ if not name.startswith("__")}
    assert not [name for name in public if not re.search(rf"\bli\.{name}\b", text)]


def test_the_page_on_adapters_knows_the_whole_contract():
    text = (ROOT / "docs" / "writing-an-adapter.md").read_text(encoding="utf-8")
    members = {name for name in vars(lora_inject.Adapter) if not name.startswith("_")}
    assert not [name for name in members if not re.search(rf"`{name}\b", text)]
    tables = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    described = {name for cell in tables for name in re.findall(r"`(\w+)", cell)}
    assert not [name for name in described if not hasattr(lora_inject.Adapter, name) and name != "kind"]


def test_the_page_on_the_file_format_names_every_key(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    lora_inject.inject(model, "0", rank=1)
    with safe_open(lora_inject.export(model, tmp_path / "a.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    keys = {*metadata, *json.loads(metadata["adapter"])["sites"][0], "tied"}
    text = (ROOT / "docs" / "file-format.md").read_text(encoding="utf-8")
    tables = text[text.index("## Metadata") : text.index("## Fingerprint")]
    assert set(re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE)) == keys


def test_the_page_on_the_file_format_names_every_kind_of_adapter():
    text = (ROOT / "docs" / "file-format.md").read_text(encoding="utf-8")
    assert not [known.kind for known in registry.registered() if f"`{known.kind}`" not in text]


def modules() -> list[str]:
    found = [name.name for name in pkgutil.walk_packages(lora_inject.__path__, "lora_inject.")]
    # Importing __main__ would run the command.
    return ["lora_inject", *(name for name in found if not name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name, tmp_path, monkeypatch, clean_registry):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    out = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False)
    for case in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(case, out=out.write)
    assert runner.failures == 0, out.getvalue()


# The reader above is what all other tests rest on.


def test_reader_splits_a_page():
    idle = "a [b](c.md)\n<!-- not run: why -->\n```python\nx = 1\n```\n\n"
    text = '```python\nprint("[n](o)")\n```\n<!-- output -->\n```text\n1\n```\nend\n'
    blocks, prose = blocks_and_prose(idle + text)
    assert [(b.language, b.line, b.runs, b.is_output) for b in blocks] == [
        ("python", 4, False, False),
        ("python", 8, True, False),
        ("text", 12, False, True),
    ]
    assert "[n](o)" not in prose
    assert prose.endswith("end")


@pytest.mark.parametrize("text", ["```python\nx\n", "- item\n\n  ```python\n  x\n  ```\n", "```text\n```python\n```\n"])
def test_reader_refuses_fences_that_it_could_misread(text):
    with pytest.raises(AssertionError, match="fence"):
        blocks_and_prose(text)


def test_a_traceback_shows_the_line_in_the_page():
    with pytest.raises(ZeroDivisionError) as caught:
        exec(code_of(Block("python", 41, "", "x = 1\nx / 0\n"), ROOT / "README.md"), {})
    assert caught.traceback[-1].lineno + 1 == 42
