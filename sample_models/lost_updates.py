"""A small language model trained purely in bfloat16. Fault: its updates are rounded away.

The weights themselves are bfloat16, with seven bits behind the point, and fine-tuning takes small steps: nearly
every weight is rounded back to what it was. Expect GF402, an error on the layers.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Tagger(nn.Module):
    def __init__(self, vocabulary: int = 512, width: int = 128, tags: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, tags)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(ids)))


model = Tagger().bfloat16()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randint(0, 512, (16, 32))]


def loss(logits: torch.Tensor, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    (ids,) = inputs
    return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten() % 16)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)
