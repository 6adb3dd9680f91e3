"""The models that overhead is measured on, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a skip, as in ResNet-18."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + skip)


def resnet18() -> nn.Module:
    """ResNet-18: 69 modules."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    width = 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for block in range(2):
            layers.append(BasicBlock(width, out, 2 if stage and not block else 1))
            width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class TransformerBlock(nn.Module):
    """One pre-norm block of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.ln_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.out(self.act(self.fc(self.ln_2(x))))


class GPT2Shape(nn.Module):
    """GPT-2 small: 12 layers of width 768, tied head, a vocabulary of 8192."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 8192) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def mlp200() -> nn.Module:
    """200 times Linear(64, 64) and ReLU: 401 modules, little arithmetic."""
    net = nn.Sequential(*(m for _ in range(200) for m in (nn.Linear(64, 64), nn.ReLU())))
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return net


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One model to measure on, its input, and the ratio that is still accepted."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    limit: float
    goal: float


SHAPES = (
    Shape(name="resnet18", build=resnet18, inputs=lambda: torch.randn(16, 3, 64, 64), limit=1.15, goal=1.05),
    Shape(
        name="gpt2", build=GPT2Shape, inputs=lambda: torch.randint(0, 8192, (4, 128)), limit=1.15, goal=1.05
    ),
    Shape(name="mlp200", build=mlp200, inputs=lambda: torch.randn(64, 64), limit=2.0, goal=1.4),
)
