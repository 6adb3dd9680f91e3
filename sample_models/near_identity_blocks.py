"""Twelve pre-norm blocks. Fault: one of them does nothing.

Block 7 was once switched off by a factor while something else was debugged, and the factor is still there:
its branch brings a few ten-thousandths of what the others bring, and its weights train a thousand times too
slowly under SGD. Expect GF201, a warning on ``blocks.7``.
"""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.project = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.strength * self.project(torch.relu(self.expand(self.norm(x))))


class Network(nn.Module):
    def __init__(self, width: int = 128, depth: int = 12, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Linear(32, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, classes)
        self.blocks[7].strength = 5e-4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))


model = Network()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(64, 32)]
