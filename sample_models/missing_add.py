"""A small residual network. Fault: the last stage builds its skip and never adds it.

``Block`` makes a projection for the blocks that change the size. Whoever rewrote ``forward`` for the last
stage kept the branch and dropped the add: ``stage3`` is a plain stack, and its ``downsample`` is never
called. Expect GF103 (never called) on ``stage3.downsample``.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.downsample(x) + self.branch(x))


class LastBlock(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.branch(x))


class Network(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stage1 = Block(16, 32, stride=2)
        self.stage2 = Block(32, 64, stride=2)
        self.stage3 = LastBlock(64, 128, stride=2)
        self.head = nn.Linear(128, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(images))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(x.mean(dim=(2, 3)))


model = Network()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(16, 3, 32, 32)]
