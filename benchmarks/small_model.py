"""A small residual CNN; run as a script it does the least that `gradflow inspect` of it must also do."""

import torch
from torch import nn


class Block(nn.Module):
    """Two 3×3 convolutions learn what to add to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(x + branch)


def build_model() -> nn.Module:
    """Build three blocks between a stem and a head."""
    blocks = [Block(16) for _ in range(3)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


example_inputs = torch.randn(8, 3, 16, 16)


if __name__ == "__main__":
    build_model()(example_inputs).square().mean().backward()
