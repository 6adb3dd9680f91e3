"""Pairs whose units, elements or tokens no longer say anything: D1, S1 and R1 of the zoo."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from zoo import Built, Case, clusters, images, labels_loss

from gradflow.findings import Severity

DEPTH = 4


class ShiftedCNN(nn.Module):
    """He-initialised convolutions with ReLU; the biases of ``dead`` of the channels are far below 0."""

    def __init__(self, channels: int, dead: float, depth: int = DEPTH, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential()
        inputs = 3
        for _ in range(depth):
            convolution = nn.Conv2d(inputs, channels, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight)
            nn.init.zeros_(convolution.bias)
            nn.init.constant_(convolution.bias[: math.floor(dead * channels)], -30.0)
            self.features.extend((convolution, nn.ReLU()))
            inputs = channels
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


class PostNormLayer(nn.Module):
    """Attention and a ReLU MLP with Xavier weights, the norm after each; ``skips`` or none."""

    def __init__(self, width: int, *, skips: bool, heads: int = 4) -> None:
        super().__init__()
        self.skips, self.heads = skips, heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        for linear in (self.qkv, self.project, self.grow, self.shrink):
            # Queries, keys and values are three matrices.
            for matrix in linear.weight.chunk(3) if linear is self.qkv else (linear.weight,):
                nn.init.xavier_normal_(matrix)
            nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.attend(x)
        x = self.norm1(x + mixed if self.skips else mixed)
        grown = self.shrink(F.relu(self.grow(x)))
        return self.norm2(x + grown if self.skips else grown)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        mixed = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4))
        return self.project(mixed.transpose(1, 2).reshape(batch, length, width))


class PostNormStack(nn.Module):
    """Such layers, twelve by default, over tokens that are given as vectors."""

    def __init__(self, width: int, *, skips: bool, depth: int = 12, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(PostNormLayer(width, skips=skips) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).mean(dim=1))


def shifted(dead: float, width: int) -> Callable[..., Built]:
    """D1: a ReLU CNN with this share of its channels shifted below 0 by their bias."""

    def build(seed: int, width: int = width, depth: int = DEPTH) -> Built:
        torch.manual_seed(seed)
        x, labels = images(seed, 16)
        return ShiftedCNN(width, dead, depth), (x,), labels_loss(labels)

    return build


def scaled(deviation: float) -> Callable[..., Built]:
    """S1: a tanh MLP, of three layers by default, whose first pre-activations have this standard deviation."""

    def build(seed: int, width: int = 256, depth: int = 3) -> Built:
        torch.manual_seed(seed)
        x, labels = clusters(seed, width)
        model = nn.Sequential()
        for _ in range(depth):
            linear = nn.Linear(width, width)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            model.extend((linear, nn.Tanh()))
        model.append(nn.Linear(width, 10))
        return model, (deviation * x,), labels_loss(labels)

    return build


def post_norm(*, skips: bool) -> Callable[..., Built]:
    """R1: a post-norm stack over 64 tokens, with its skips or without."""

    def build(seed: int, width: int = 128, depth: int = 12) -> Built:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 64, width, generator=generator)
        labels = torch.randint(0, 10, (8,), generator=generator)
        return PostNormStack(width, skips=skips, depth=depth), (x,), labels_loss(labels)

    return build


INFORMED: tuple[Case, ...] = (
    # The skips keep a few percent of what tells tokens apart.
    Case(
        name="R1a",
        build=post_norm(skips=True),
        rule="GF304",
        severity=Severity.INFO,
        region="layers.",
        exactly=True,
    ),
)

FAULTY: tuple[Case, ...] = (
    Case(
        name="D1a",
        build=shifted(0.6, 32),
        rule="GF301",
        severity=Severity.WARNING,
        region="features",
        exactly=True,
    ),
    Case(name="D1b", build=shifted(0.98, 128), rule="GF301", severity=Severity.ERROR, region="features"),
    # 2(1 - Phi(2.5/5)) = .617
    Case(name="S1a", build=scaled(5.0), rule="GF302", severity=Severity.WARNING, region="1", exactly=True),
    # 2(1 - Phi(2.5/40)) = .950
    Case(name="S1b", build=scaled(40.0), rule="GF302", severity=Severity.ERROR, region="1"),
    # Without skips each attention averages the tokens: 1 - CMF falls to 6e-14.
    Case(name="R1b", build=post_norm(skips=False), rule="GF304", severity=Severity.WARNING, region="layers."),
)
