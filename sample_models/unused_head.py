"""A small network with an auxiliary head. Fault: the head is never called.

``auxiliary`` was written to help the middle layers, and ``forward`` forgot it: its parameters take memory,
are handed to the optimizer, and never change. Expect GF103 (unused) on ``auxiliary`` and nothing else.
"""

import torch
from torch import nn


class TwoHeaded(nn.Module):
    def __init__(self, width: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(32, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, classes)
        self.auxiliary = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


model = TwoHeaded()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(64, 32)]
