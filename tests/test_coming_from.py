"""The page for those who come from elsewhere: its Python and its commands, in order, in one folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import lora_inject as li
from lora_inject.cli import main

PAGE = Path(li.__file__).resolve().parents[1] / "docs" / "coming-from.md"


@pytest.mark.filterwarnings("ignore::lora_inject.RoundingWarning")
def test_the_commands_of_the_page_run_on_what_its_code_makes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scope: dict[str, object] = {}
    count = 0
    for language, text in re.findall(r"^```(python|sh)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), scope)
            continue
        for command in text.splitlines():
            program, *arguments = shlex.split(command)
            assert (program, main(arguments)) == ("lora-inject", 0), (command, capsys.readouterr().err)
            count += 1
    assert count >= 9
    tokens, load = scope["tokens"], scope["LlamaForCausalLM"].from_pretrained
    wanted = scope["theirs"](tokens).logits
    merged = load(tmp_path / "merged").eval()
    assert torch.allclose(merged(tokens).logits, wanted, atol=1e-4)
    for adapter in ("adapter.safetensors", "from_mlx.safetensors", "for_llama_cpp.gguf"):
        model = load(tmp_path / "base").eval()
        li.load(model, tmp_path / adapter)
        assert torch.allclose(model(tokens).logits, wanted, atol=1e-4), adapter
