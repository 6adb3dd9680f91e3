"""An encoder under a classifier. Fault: the graph is cut in the middle.

``detach()`` was right while a pretrained encoder stayed fixed. The encoder is to be trained now, the call
is still there, and no gradient ever reaches ``encoder``. Expect GF103, naming ``encoder`` and ``detach``.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Encoder(nn.Module):
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(2 * channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.down(F.relu(self.stem(images)))))


class Classifier(nn.Module):
    def __init__(self, channels: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.encoder = Encoder(channels)
        self.mixer = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.encoder(images).detach()
        pooled = F.relu(self.mixer(features)).mean(dim=(2, 3))
        return self.head(pooled)


model = Classifier()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(16, 3, 32, 32)]
