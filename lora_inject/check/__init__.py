"""Whether a program reads an adapter as it was trained: what it would refuse, drop or scale otherwise."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..config import check_option
from ..errors import ConfigError, did_you_mean
from .facts import facts_of
from .readers import COMMON, READERS, foreign, unwritable
from .rules import Finding, broken

__all__ = ["READERS", "CheckReport", "Finding", "check_adapter"]


@dataclass(frozen=True, repr=False)
class CheckReport:
    """What `check_adapter` found; prints as text, and is true if the reader does what the adapter was trained to do.

    Attributes:
        path: the adapter.
        format: the format that was recognised.
        reader: the program that is to read it.
        sites: how many low-rank pairs it holds.
        findings: the rules that it breaks.
    """

    path: str
    format: str
    reader: str
    sites: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing would be refused, dropped or mis-scaled."""
        return all(finding.severity == "fine" for finding in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        verdict = "reads it as it was trained" if self.ok else "does not read it as it was trained"
        lines = [f"{self.path} ({self.format}, {self.sites} low-rank pairs): {self.reader} {verdict}"]
        for one in self.findings:
            lines += [f"{one.severity}: {one.rule}: {one.what}", *(f"    {site}" for site in one.sites[:SHOWN])]
            lines += [f"    ... and {len(one.sites) - SHOWN} more"] * (len(one.sites) > SHOWN)
            lines.append(f"  -> {one.do}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<CheckReport of {self.path} for {self.reader}: {len(self.findings)} findings>"

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values that JSON can hold."""
        return {**asdict(self), "ok": self.ok}


SHOWN = 8
"""How many sites of a finding the text names."""


def check_adapter(
    path: str | os.PathLike[str], reader: str, *, model: nn.Module | None = None, max_rank: int = 16
) -> CheckReport:
    """Says which rules of a program an adapter breaks: what it would refuse, drop without a word, or mis-scale.

    Args:
        path: an adapter of any known format.
        reader: "vllm", "sglang", "tgi", "llama.cpp", "diffusers", "peft" or "mlx".
        model: the model that it is for, on the meta device perhaps: it tells layers without an adapter.
        max_rank: the highest rank that vLLM is started with.

    Raises:
        ConfigError: no such reader.
        FormatError: the file cannot be read or is broken.
    """
    known = next((one for one in READERS if one.name == reader), None)
    if known is None:
        raise ConfigError(f"reader {reader!r} is unknown: {did_you_mean(reader, [one.name for one in READERS])}")
    check_option("rank", max_rank)
    facts = facts_of(path, model)
    formats = known.formats
    rules = (
        *(foreign(formats, ours=ours) for ours in (False, True)),
        unwritable(formats),
        *COMMON,
        *known.rules(max_rank),
    )
    found = [finding for rule in rules if (finding := broken(rule, facts)) is not None]
    return CheckReport(str(path), facts.format, known.name, len(facts.pairs), tuple(found))
