"""Plain-torch architectures whose residual sites can be counted by reading their forward.

Each builder returns ``(model, inputs)``, as small as its structure allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, Any]
BATCH = 4


def conv(inside: int, outside: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)


def conv_norm(inside: int, outside: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(inside, outside, size, stride, groups), nn.BatchNorm2d(outside))


class BasicBlock(nn.Module):
    """torchvision's: ``out += identity``, then a ReLU in place."""

    expansion = 1

    def __init__(self, inside: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv(inside, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """torchvision's: 1x1, 3x3, 1x1, and the last is four times wider."""

    expansion = 4

    def __init__(self, inside: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv(inside, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, width * 4, 1)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """torchvision's ResNet with an eighth of its widths."""

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: Sequence[int]) -> None:
        super().__init__()
        self.inside = 8
        self.conv1 = conv(3, 8, 7, 2)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self.stage(block, 8, depths[0], 1)
        self.layer2 = self.stage(block, 16, depths[1], 2)
        self.layer3 = self.stage(block, 32, depths[2], 2)
        self.layer4 = self.stage(block, 64, depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * block.expansion, 10)

    def stage(self, block: type[BasicBlock | Bottleneck], width: int, depth: int, stride: int) -> nn.Module:
        downsample = None
        if stride != 1 or self.inside != width * block.expansion:
            downsample = conv_norm(self.inside, width * block.expansion, 1, stride)
        blocks = [block(self.inside, width, stride, downsample)]
        self.inside = width * block.expansion
        blocks += [block(self.inside, width, 1, None) for _ in range(depth - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18() -> Built:
    return ResNet(BasicBlock, (2, 2, 2, 2)), torch.randn(BATCH, 3, 64, 64)


def resnet34() -> Built:
    return ResNet(BasicBlock, (3, 4, 6, 3)), torch.randn(BATCH, 3, 64, 64)


def resnet50() -> Built:
    return ResNet(Bottleneck, (3, 4, 6, 3)), torch.randn(BATCH, 3, 64, 64)


class PreActivation(nn.Module):
    """He et al. 2016: the norm and ReLU come first; a projection starts after them."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), conv(inside, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.shortcut = conv(inside, width, 1, stride) if stride != 1 or inside != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + skip


def preact_resnet18() -> Built:
    plan = [(8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    blocks = [PreActivation(*sizes) for sizes in plan]
    head = (nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(conv(3, 8), *blocks, *head), torch.randn(BATCH, 3, 32, 32)


class OptionA(nn.Module):
    """The CIFAR ResNet's block: its shortcut drops every other pixel and pads the channels with zeros."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inside, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.widen = width - inside

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.widen:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.widen // 2, self.widen // 2))
        out += x
        return F.relu(out)


def cifar_resnet20() -> Built:
    plan = [(8, 8, 1)] * 3 + [(8, 16, 2)] + [(16, 16, 1)] * 2 + [(16, 32, 2)] + [(32, 32, 1)] * 2
    blocks = [OptionA(*sizes) for sizes in plan]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return nn.Sequential(conv_norm(3, 8), nn.ReLU(), *blocks, *head), torch.randn(BATCH, 3, 32, 32)


class InvertedResidual(nn.Module):
    """MobileNetV2's: a skip only where neither the grid nor the width changes."""

    def __init__(self, inside: int, outside: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inside * expand
        layers = [conv_norm(inside, hidden, 1), nn.ReLU6(inplace=True)] if expand != 1 else []
        layers += [conv_norm(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(*layers, conv_norm(hidden, outside, 1))
        self.use_res_connect = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


def mobilenet_v2() -> Built:
    # expand, channels (an eighth), repeats, stride of the first: table 2 of the paper
    plan = (
        (1, 2, 1, 1),
        (6, 3, 2, 2),
        (6, 4, 3, 2),
        (6, 8, 4, 2),
        (6, 12, 3, 1),
        (6, 20, 3, 2),
        (6, 40, 1, 1),
    )
    layers: list[nn.Module] = [conv_norm(3, 4, 3, 2), nn.ReLU6(inplace=True)]
    inside = 4
    for expand, width, repeats, stride in plan:
        for repeat in range(repeats):
            layers.append(InvertedResidual(inside, width, 1 if repeat else stride, expand))
            inside = width
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))
    return nn.Sequential(*layers, *head), torch.randn(BATCH, 3, 64, 64)


class EncoderBlock(nn.Module):
    """torchvision's ViT block: pre-norm attention and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(2 * width, width),
            nn.Dropout(0.1),
        )

    def forward(self, input: Tensor) -> Tensor:
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x)
        x = x + input
        y = self.mlp(self.ln_2(x))
        return x + y


class VisionTransformer(nn.Module):
    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.layers = nn.Sequential(*(EncoderBlock(width) for _ in range(depth)))
        self.ln, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(len(x), -1, -1), tokens), dim=1)
        return self.head(self.ln(self.layers(tokens + self.positions))[:, 0])


def vit12() -> Built:
    return VisionTransformer(12, 16), torch.randn(BATCH, 3, 32, 32)


def encoder(*, norm_first: bool) -> Built:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(BATCH, 5, 16)


def decoder(*, norm_first: bool) -> Built:
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    return nn.TransformerDecoder(layer, 3), (torch.randn(BATCH, 5, 16), torch.randn(BATCH, 7, 16))


class GRN(nn.Module):
    """ConvNeXtV2's global response normalisation, which adds its input to two products with it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (energy / (energy.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + x


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, norm, MLP with GELU; V1 scales its branch (LayerScale), V2 has a GRN inside."""

    def __init__(self, width: int, *, grn: bool) -> None:
        super().__init__()
        self.dwconv = conv(width, width, 7, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1, self.act = nn.Linear(width, 4 * width), nn.GELU()
        self.grn = GRN(4 * width) if grn else nn.Identity()
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = None if grn else nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        skip = x
        x = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        x = self.pwconv2(self.grn(self.act(self.pwconv1(x))))
        if self.gamma is not None:
            x = self.gamma * x
        return skip + x.permute(0, 3, 1, 2)


def convnext(*, grn: bool) -> Built:
    def stage(width: int, depth: int) -> list[nn.Module]:
        return [ConvNeXtBlock(width, grn=grn) for _ in range(depth)]

    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), *stage(8, 2), nn.Conv2d(8, 16, 2, 2), *stage(16, 3))
    return net, torch.randn(BATCH, 3, 32, 32)


class PoolFormerBlock(nn.Module):
    """MetaFormer: the token mixer is an average pool, which owns nothing; the norm before it does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + (self.pool(normed) - normed)
        return x + self.mlp(self.norm2(x))


def poolformer() -> Built:
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), *(PoolFormerBlock(8) for _ in range(3))), torch.randn(
        BATCH, 3, 32, 32
    )
