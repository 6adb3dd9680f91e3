"""A text encoder with post-norm blocks, as in the first transformer and in BERT. Healthy.

The norm stands on the stream, after each add: the skip itself is rescaled twice a block. With weights from
N(0, 0.02) that costs little at twelve sublayers; it is deep stacks, larger weights and no warm-up that make
post-norm hard. ``prenorm_transformer.py`` is its twin. Expect no warning and no error.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.mlp(x))


class Encoder(nn.Module):
    def __init__(self, vocabulary: int = 256, length: int = 64, width: int = 96, depth: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[Block(width, heads=3) for _ in range(depth)])
        self.head = nn.Linear(width, vocabulary)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.norm(self.tokens(ids) + self.positions)))


def build_model() -> nn.Module:
    return Encoder()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randint(0, 256, (8, 64))]


def loss(outputs: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), inputs[0].flatten())
