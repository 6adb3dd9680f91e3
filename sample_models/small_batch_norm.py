"""A projection head as in contrastive learning, with batch normalisation. Fault: a batch of two.

Two values, normalised, are -1 and 1 whatever they were: what comes out no longer depends on the size of what
went in, and next to no gradient comes back. Expect GF403, an error on the normalisations.
"""

import torch
from torch import nn


class ProjectionHead(nn.Module):
    def __init__(self, features: int = 128, width: int = 256, out: int = 64) -> None:
        super().__init__()
        self.linear1 = nn.Linear(features, width)
        self.norm1 = nn.BatchNorm1d(width)
        self.linear2 = nn.Linear(width, width)
        self.norm2 = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, out)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.linear1(features)).relu()
        x = self.norm2(self.linear2(x)).relu()
        return self.out(x)


model = ProjectionHead()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(2, 128)]
