"""The networks of the zoo, as plain as their recipes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Initialise = Callable[[nn.Linear], None]


class MLP(nn.Module):
    """``depth`` hidden layers of linear, optional norm and activation, then a linear head."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        activation: type[nn.Module],
        initialise: Initialise,
        norm: type[nn.Module] | None = None,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(depth):
            linear = nn.Linear(width, width)
            initialise(linear)
            self.layers.append(linear)
            if norm is not None:
                self.layers.append(norm(width))
            self.layers.append(activation())
        self.head = nn.Linear(width, classes)
        initialise(self.head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


def relu_stack(width: int, depth: int, initialise: Initialise) -> nn.Sequential:
    stack = nn.Sequential()
    for _ in range(depth):
        linear = nn.Linear(width, width)
        initialise(linear)
        stack.append(linear)
        stack.append(nn.ReLU())
    return stack


class Auxiliary(nn.Module):
    """A ReLU MLP whose auxiliary head is never called."""

    def __init__(self, width: int, depth: int, *, initialise: Initialise, classes: int = 10) -> None:
        super().__init__()
        self.layers = relu_stack(width, depth, initialise)
        self.head = nn.Linear(width, classes)
        self.auxiliary = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


class Detached(nn.Module):
    """A ReLU MLP cut in the middle."""

    def __init__(self, width: int, depth: int, *, initialise: Initialise, classes: int = 10) -> None:
        super().__init__()
        self.encoder = relu_stack(width, depth, initialise)
        self.decoder = relu_stack(width, depth, initialise)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.decoder(self.encoder(x).detach()))


class VGG(nn.Module):
    """Stages of two 3×3 convolutions with ReLU, the size halved after each; default initialisation."""

    def __init__(
        self, channels: int, stages: int = 3, *, batch_norm: bool = False, classes: int = 10
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        inputs = 3
        for outputs in (channels * 2**stage for stage in range(stages)):
            for _ in range(2):
                self.features.append(nn.Conv2d(inputs, outputs, 3, padding=1))
                if batch_norm:
                    self.features.append(nn.BatchNorm2d(outputs))
                self.features.append(nn.ReLU())
                inputs = outputs
            self.features.append(nn.MaxPool2d(2))
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


def vgg_batch_norm(channels: int, stages: int = 3) -> VGG:
    return VGG(channels, stages, batch_norm=True)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(branch)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of basic blocks, three each, for 32×32 images, He initialisation."""

    def __init__(self, channels: int, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential()
        inputs = channels
        for stage in range(3):
            for index in range(blocks):
                outputs = channels * 2**stage
                self.blocks.append(BasicBlock(inputs, outputs, stride=2 if stage and not index else 1))
                inputs = outputs
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(self.blocks(x).mean(dim=(2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.project(mixed.transpose(1, 2).reshape(batch, length, width))


class TransformerBlock(nn.Module):
    """Attention and a GELU MLP, each on a residual; the norm before (``pre_norm``) or after the add."""

    def __init__(
        self, width: int, *, causal: bool, pre_norm: bool, dropout: float = 0.0, heads: int = 4
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.norm1(x)))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self.dropout(self.mlp(x)))


def initialise_002(model: nn.Module) -> None:
    """Weights N(0, 0.02), biases 0, norms as they are."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class GPT(nn.Module):
    """Pre-norm, causal, the output tied to the embedding; N(0, 0.02)."""

    def __init__(self, *, vocabulary: int, width: int, depth: int, length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, causal=True, pre_norm=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        initialise_002(self)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PostNormEncoder(nn.Module):
    """Bidirectional, the norm after each add, as in BERT; N(0, 0.02)."""

    def __init__(self, *, vocabulary: int, width: int, depth: int, length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, causal=False, pre_norm=False) for _ in range(depth)
        )
        self.head = nn.Linear(width, vocabulary)
        initialise_002(self)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ViT(nn.Module):
    """ViT-tiny for 32×32 images: patches of 4, a class token, dropout 0.1, GELU; truncated N(0, 0.02)."""

    def __init__(self, width: int, depth: int = 12, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 65, width))
        blocks = [
            TransformerBlock(width, causal=False, pre_norm=True, dropout=0.1, heads=3) for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        initialise_002(self.blocks)
        nn.init.trunc_normal_(self.token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class LSTMClassifier(nn.Module):
    """Two layers, or more, with a forget bias of 1; the last step is classified."""

    def __init__(self, width: int, layers: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, classes)
        for layer in range(layers):
            for part in ("ih", "hh"):
                bias = getattr(self.lstm, f"bias_{part}_l{layer}")
                nn.init.zeros_(bias)
                if part == "ih":
                    nn.init.ones_(bias[width : 2 * width])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def convolutions(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    stack = nn.Sequential()
    for index in range(depth):
        stack.append(nn.Conv2d(outputs if index else inputs, outputs, 3, padding=1))
        stack.append(nn.BatchNorm2d(outputs))
        stack.append(nn.ReLU())
    return stack


class UNet(nn.Module):
    """Two levels of two convolutions each, with concatenated skips and no addition."""

    def __init__(self, channels: int, depth: int = 2, classes: int = 4) -> None:
        super().__init__()
        self.down1 = convolutions(3, channels, depth)
        self.down2 = convolutions(channels, 2 * channels, depth)
        self.bottom = convolutions(2 * channels, 4 * channels, depth)
        self.rise2 = nn.ConvTranspose2d(4 * channels, 2 * channels, 2, stride=2)
        self.up2 = convolutions(4 * channels, 2 * channels, depth)
        self.rise1 = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.up1 = convolutions(2 * channels, channels, depth)
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.rise2(self.bottom(F.max_pool2d(second, 2)))
        x = self.rise1(self.up2(torch.cat((second, x), dim=1)))
        return self.head(self.up1(torch.cat((first, x), dim=1)))
