"""The part of the zoo whose verdict is about residual blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import zoo_networks as networks
from torch import nn
from torch.nn import functional as F
from zoo import Built, Case, clusters, images, labels_loss

from gradflow.findings import Severity

WARNING, ERROR = Severity.WARNING, Severity.ERROR


class ReZeroBlock(nn.Module):
    """x + alpha F(x), alpha starting at zero (Bachlechner et al., 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.alpha * F.relu(self.linear(x))


class PreNormBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, width)
        self.project = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.expand.weight)
        nn.init.xavier_normal_(self.project.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(F.relu(self.expand(self.norm(x))))


class FixupBlock(nn.Module):
    """No norm: scalar biases and a scale, the first convolution small, the second zero (Zhang et al., 2019)."""

    def __init__(self, inputs: int, outputs: int, stride: int, blocks: int) -> None:
        super().__init__()
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.bias3, self.bias4 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()
        nn.init.normal_(self.conv1.weight, std=math.sqrt(2 / (9 * outputs)) / math.sqrt(blocks))
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = F.relu(self.conv1(x + self.bias1) + self.bias2)
        branch = self.scale * self.conv2(branch + self.bias3) + self.bias4
        return F.relu(branch + self.shortcut(x))


class FixupResNet(nn.Module):
    """ResNet-20, or another depth, by Fixup; head at zero."""

    def __init__(self, channels: int, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential()
        inputs = channels
        for stage in range(3):
            for index in range(blocks):
                outputs = channels * 2**stage
                stride = 2 if stage and not index else 1
                self.blocks.append(FixupBlock(inputs, outputs, stride, blocks=3 * blocks))
                inputs = outputs
        self.head = nn.Linear(inputs, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean(dim=(2, 3)))


class LoRALinear(nn.Module):
    """A frozen layer with a low-rank addition that starts at zero (Hu et al., 2022)."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class PreActivationBlock(nn.Module):
    """Two He-initialised convolutions behind ReLUs and no normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.kaiming_normal_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Silenced(nn.Module):
    """A pre-norm block whose branch is multiplied by zero."""

    def __init__(self, block: PreNormBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.block.project(F.relu(self.block.expand(self.block.norm(x))))
        return x + branch * 0


class Stack(nn.Module):
    """A stem, blocks and a head; images are averaged over their positions before the head."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], width: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean(dim=(2, 3)) if x.dim() == 4 else x)


def stack(
    blocks: Callable[[int, int], list[nn.Module]], depth: int, width: int = 128
) -> Callable[..., Built]:
    """A builder of blocks on the clusters."""

    def build(seed: int, width: int = width, depth: int = depth) -> Built:
        torch.manual_seed(seed)
        x, labels = clusters(seed, width)
        return Stack(nn.Linear(width, width), blocks(width, depth), width), (x,), labels_loss(labels)

    return build


def zero_gamma(seed: int, width: int = 16, depth: int = 3) -> Built:
    torch.manual_seed(seed)
    x, labels = images(seed, batch=16)
    model = networks.ResNet20(width, depth)
    for block in model.blocks:
        nn.init.zeros_(block.norm2.weight)
    return model, (x,), labels_loss(labels)


def fixup(seed: int, width: int = 16, depth: int = 3) -> Built:
    torch.manual_seed(seed)
    x, labels = images(seed, batch=16)
    return FixupResNet(width, depth), (x,), labels_loss(labels)


def low_rank(seed: int, width: int = 128, depth: int = 4) -> Built:
    """A pre-norm transformer, all frozen but the additions to its attention and MLP."""
    torch.manual_seed(seed)
    model = networks.GPT(vocabulary=512, width=width, depth=depth).requires_grad_(False)
    for block in model.blocks:
        block.attention.qkv = LoRALinear(block.attention.qkv)
        block.mlp[0] = LoRALinear(block.mlp[0])
    ids = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(seed))
    return model, (ids,), lambda logits, _: F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def growing(depth: int) -> Callable[..., Built]:
    def build(seed: int, width: int = 32, depth: int = depth) -> Built:
        torch.manual_seed(seed)
        x, labels = images(seed, batch=16, size=16)
        stem = nn.Conv2d(3, width, 3, padding=1)
        return (
            Stack(stem, [PreActivationBlock(width) for _ in range(depth)], width),
            (x,),
            labels_loss(labels),
        )

    return build


def switched_off(weak: Callable[[int], Iterable[int]]) -> Callable[..., Built]:
    """Pre-norm transformer blocks, twelve by default, the branches of some a thousand times smaller."""

    def build(seed: int, width: int = 64, depth: int = 12) -> Built:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 24, width, generator=generator)
        labels = torch.randint(0, 10, (16 * 24,), generator=generator)
        blocks: list[nn.Module] = [
            networks.TransformerBlock(width, causal=False, pre_norm=True) for _ in range(depth)
        ]
        with torch.no_grad():
            for index in weak(depth):
                for last in (blocks[index].attention.project, blocks[index].mlp[2]):
                    last.weight *= 1e-3
                    last.bias *= 1e-3
        model = Stack(nn.Linear(width, width), blocks, width)
        return model, (x,), lambda logits, _: F.cross_entropy(logits.flatten(0, 1), labels)

    return build


def dead_by_weights(width: int, depth: int) -> list[nn.Module]:
    """Blocks, the fifth of which has a ReLU that is off for every sample in front of a zero weight."""
    blocks: list[nn.Module] = [PreNormBlock(width) for _ in range(depth)]
    nn.init.constant_(blocks[4].expand.bias, -50.0)
    nn.init.zeros_(blocks[4].project.weight)
    nn.init.zeros_(blocks[4].project.bias)
    return blocks


def dead_by_factor(width: int, depth: int) -> list[nn.Module]:
    return [Silenced(PreNormBlock(width)) if k == 4 else PreNormBlock(width) for k in range(depth)]


def rezero(width: int, depth: int) -> list[nn.Module]:
    return [ReZeroBlock(width) for _ in range(depth)]


def pre_norm(width: int, depth: int) -> list[nn.Module]:
    return [PreNormBlock(width) for _ in range(depth)]


HEALTHY: tuple[Case, ...] = (
    Case(name="H6", build=zero_gamma),
    Case(name="H7", build=stack(rezero, 24)),
    Case(name="H8", build=fixup),
    Case(name="H15", build=low_rank),
    # rho falls as 1/sqrt(l + 1) to 0.14, the variance grows 1 + 1/l a block
    Case(name="H16", build=stack(pre_norm, 48)),
)

FAULTY: tuple[Case, ...] = (
    # The variance doubles a block; 2^(7/2) = 11 is no exploding gradient yet.
    Case(name="G1a", build=growing(8), rule="GF202", severity=WARNING, region="blocks.", exactly=True),
    # 2^(47/2) = 1e7: growth and explosion are both reported.
    Case(name="G1b", build=growing(48), rule="GF202", severity=ERROR, region="blocks.", also=("GF102",)),
    Case(
        name="I1a",
        build=switched_off(lambda depth: (5,)),
        rule="GF201",
        severity=WARNING,
        region="blocks.5",
        exactly=True,
        trained=True,
    ),
    Case(
        name="I1b",
        build=switched_off(lambda depth: range(depth // 2, depth)),
        rule="GF201",
        severity=WARNING,
        region="blocks.",
        exactly=True,
        trained=True,
    ),
    # Only the last bias gets a gradient.
    Case(name="Z1a", build=stack(dead_by_weights, 8), rule="GF204", severity=ERROR, region="blocks.4"),
    Case(name="Z1b", build=stack(dead_by_factor, 8), rule="GF204", severity=ERROR, region="blocks.4"),
)
