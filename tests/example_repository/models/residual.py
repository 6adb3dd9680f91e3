"""A deep network that trains because of its skips."""

import torch
from torch import nn


class Block(nn.Module):
    """Adds what a small branch makes of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.narrow(torch.sigmoid(self.wide(self.norm(x))))
        return x + branch


class Residual(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, width: int = 64, depth: int = 16) -> None:
        super().__init__()
        self.stem = nn.Linear(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


model = Residual()
