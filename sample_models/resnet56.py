"""ResNet-56 of He et al. (2016, section 4.2) for 32×32 images. Healthy.

The layers of ``plain56.py`` with a parameter-free skip around every pair: where the size changes the skip
takes every second pixel and pads the new channels with zeros (option A). Expect no warning and no error.
"""

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = outputs - inputs

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.padding == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = F.relu(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        return F.relu(self.shortcut(x) + branch)


class ResNet(nn.Module):
    def __init__(self, depth: int = 56, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        inputs = 16
        for outputs in (16, 32, 64):
            for index in range((depth - 2) // 6):
                blocks.append(BasicBlock(inputs, outputs, stride=2 if index == 0 and outputs > 16 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(images))))
        return self.head(x.mean(dim=(2, 3)))


def build_model() -> nn.Module:
    return ResNet()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(16, 3, 32, 32)]
