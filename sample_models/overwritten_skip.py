"""Pre-activation blocks. Fault: an in-place ReLU writes over the skip.

The first layer of each branch is ``ReLU(inplace=True)``. It changes the block's input before the add reads
it, so the blocks compute relu(x) + F(relu(x)): no negative value survives a block, and autograd does not
complain. Expect GF203, a warning on the blocks.
"""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Linear(width, width, bias=False),
            nn.LayerNorm(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.body(x)
        return x + out


class Network(nn.Module):
    def __init__(self, width: int = 128, depth: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Linear(32, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))


model = Network()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(64, 32)]
