"""A convolutional classifier. Fault: one layer's ReLUs are dead.

A learning rate that was too high for a moment has thrown the biases of ``conv2`` far below zero: nearly all
of its channels are off for every image, pass no gradient, and cannot come back. Expect GF301, an error on ``act2``.
"""

import torch
from torch import nn


class Classifier(nn.Module):
    def __init__(self, channels: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act3 = nn.ReLU()
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.conv2.bias[1:] = -20.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.conv1(images))
        x = self.act2(self.conv2(x))
        x = self.act3(self.conv3(x))
        return self.head(x.mean(dim=(2, 3)))


model = Classifier()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(16, 3, 16, 16)]
