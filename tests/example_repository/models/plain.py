"""A deep plain network that trains because of how it starts."""

import torch
from torch import nn


class Plain(nn.Module):
    """Linear layers, each with its activation."""

    def __init__(self, width: int = 64, depth: int = 16) -> None:
        super().__init__()
        self.stem = nn.Linear(32, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.activation = nn.ReLU()
        self.head = nn.Linear(width, 10)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.head(x)


model = Plain()
