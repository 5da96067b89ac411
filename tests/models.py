"""Small models for the tests that need more than one module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_inject as li


class Text(nn.Module):
    """Embedding, residual MLP, norm and a head that shares the embedding's weight."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


class Picture(nn.Module):
    """Convolutions, a batch norm with buffers, a shared linear and a plain list that holds it too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.mix = nn.Linear(4, 4)
        self.again = self.mix
        self.plain = [self.mix]
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).mean((2, 3))
        return self.out(self.plain[0](F.relu(self.again(x))))


TOKENS = torch.tensor([[1, 2, 3, 0], [4, 5, 10, 0]])


def text(tied: bool = True, dtype: torch.dtype = torch.float32) -> Text:
    """Returns the same text model at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Text(tied).to(dtype)


def picture() -> Picture:
    """Returns the same picture model at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Picture()


@torch.no_grad()
def fill(model: nn.Module, seed: int = 3, name: str | None = None, size: float = 0.3) -> None:
    """Sets the adapters' parameters to numbers, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in li.adapter_parameters(model, name).values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def steps(model: nn.Module, x: Tensor, count: int = 2) -> list[float]:
    """Trains the adapters a little and returns the losses."""
    optimizer = torch.optim.SGD([p for p in li.adapter_parameters(model).values() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
