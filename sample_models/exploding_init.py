"""A ReLU MLP whose weights are drawn from N(0, 1). Fault: the gradient explodes.

``nn.init.normal_`` without ``std`` ignores the width: every layer multiplies the signal, and the gradient
on its way back, by sqrt(width / 2), here 8. Expect GF102. ``nn.init.kaiming_normal_`` is what was meant.
"""

import torch
from torch import nn


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight)
        nn.init.zeros_(module.bias)


def build_model(width: int = 128, depth: int = 10, classes: int = 10) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes)).apply(initialise)


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(64, 128)]
