"""A deep plain sigmoid MLP. Fault: the gradient vanishes.

Sigmoid passes at most a quarter of the gradient, and the default initialisation of ``nn.Linear`` takes
more, so of twenty layers only the last few learn. Expect GF101. Its healthy twin is
``residual_sigmoid_mlp.py``.
"""

import torch
from torch import nn
from torch.nn import functional as F


class DeepSigmoidMLP(nn.Module):
    def __init__(self, width: int = 64, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.sigmoid(layer(x))
        return self.head(x)


def build_model() -> nn.Module:
    return DeepSigmoidMLP()


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(64, 64)]


def loss(outputs: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    labels = inputs[0][:, :10].argmax(dim=1)
    return F.cross_entropy(outputs, labels)
