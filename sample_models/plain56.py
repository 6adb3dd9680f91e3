"""Plain-56 of He et al. (2016, section 4.2) for 32×32 images. Fault: 56 layers without skips.

Batch normalisation keeps the activations in range and lets the gradient grow by about 1.2 a layer on its
way back, so the first layers get a gradient thousands of times larger than the last. Expect GF102 as a
warning that names batch normalisation. Its healthy twin, the same layers with skips, is ``resnet56.py``.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Pair(nn.Module):
    """Two convolutions, each normalised and rectified."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))


class Plain(nn.Module):
    def __init__(self, depth: int = 56, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        pairs: list[nn.Module] = []
        inputs = 16
        for outputs in (16, 32, 64):
            for index in range((depth - 2) // 6):
                pairs.append(Pair(inputs, outputs, stride=2 if index == 0 and outputs > 16 else 1))
                inputs = outputs
        self.pairs = nn.Sequential(*pairs)
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.pairs(F.relu(self.norm(self.conv(images))))
        return self.head(x.mean(dim=(2, 3)))


def build_model() -> nn.Module:
    return Plain()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(16, 3, 32, 32)]
