"""Plain-torch architectures without one additive residual site, and some whose sites are only labelled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.residual_zoo import BATCH, Built, conv_norm


class DenseLayer(nn.Module):
    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inside), nn.ReLU(inplace=True), nn.Conv2d(inside, growth, 3, 1, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.body(x)), dim=1)


def densenet() -> Built:
    layers = [DenseLayer(8 + 4 * k, 4) for k in range(4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *layers, nn.Conv2d(24, 4, 1)), torch.randn(
        BATCH, 3, 16, 16
    )


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = conv_norm(3, 8), conv_norm(8, 16)
        self.bottom = conv_norm(16, 16)
        self.lift2 = nn.ConvTranspose2d(16, 16, 2, 2)
        self.up2 = conv_norm(32, 8)
        self.lift1 = nn.ConvTranspose2d(8, 8, 2, 2)
        self.up1, self.head = conv_norm(16, 8), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.down1(x))
        second = F.relu(self.down2(F.max_pool2d(first, 2)))
        x = F.relu(self.bottom(F.max_pool2d(second, 2)))
        x = F.relu(self.up2(torch.cat((second, self.lift2(x)), dim=1)))
        x = F.relu(self.up1(torch.cat((first, self.lift1(x)), dim=1)))
        return self.head(x)


def unet() -> Built:
    return UNet(), torch.randn(BATCH, 3, 16, 16)


def vgg() -> Built:
    layers: list[nn.Module] = []
    inside = 3
    for width in (8, 8, 16, 16):
        layers += [nn.Conv2d(inside, width, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        inside = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10)), torch.randn(BATCH, 3, 16, 16)


class Recurrent(nn.Module):
    """A recurrent module of torch and a head on its last step."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


def lstm() -> Built:
    return Recurrent(nn.LSTM(8, 8, 2, batch_first=True)), torch.randn(BATCH, 6, 8)


class GRULoop(nn.Module):
    """A GRU in plain ops: h = (1 - z) n + z h. The skip is z h, and z is made from the data: a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.onward, self.head = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 8)
        for step in range(x.shape[1]):
            reset_in, keep_in, new_in = self.inward(x[:, step]).chunk(3, dim=1)
            reset_on, keep_on, new_on = self.onward(h).chunk(3, dim=1)
            keep = torch.sigmoid(keep_in + keep_on)
            new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_on) * new_on)
            h = (1 - keep) * new + keep * h
        return self.head(h)


def gru_loop() -> Built:
    return GRULoop(), torch.randn(BATCH, 6, 8)


class CellLoop(nn.Module):
    """One of torch's cells, called once a step."""

    def __init__(self, cell: nn.GRUCell | nn.LSTMCell) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def gru_cell_loop() -> Built:
    return CellLoop(nn.GRUCell(8, 8)), torch.randn(BATCH, 6, 8)


def lstm_cell_loop() -> Built:
    return CellLoop(nn.LSTMCell(8, 8)), torch.randn(BATCH, 6, 8)


class RNNLoop(nn.Module):
    """h = tanh(W x + U h): two linear maps that meet, of another step's state and of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.onward, self.head = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 8)
        for step in range(x.shape[1]):
            h = torch.tanh(self.inward(x[:, step]) + self.onward(h))
        return self.head(h)


def rnn_loop() -> Built:
    return RNNLoop(), torch.randn(BATCH, 6, 8)


class Highway(nn.Module):
    """t H(x) + (1 - t) x: the factor on the skip is made from the data."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        share = torch.sigmoid(self.gate(x))
        return share * torch.relu(self.transform(x)) + (1 - share) * x


def highway() -> Built:
    return nn.Sequential(*(Highway(8) for _ in range(3))), torch.randn(BATCH, 8)


class HyperConnection(nn.Module):
    """Parallel streams: a branch reads their weighted sum, and a doubly stochastic matrix mixes them around it.

    DeepSeek-V4's block (manifold-constrained hyper-connections), with fewer Sinkhorn iterations.
    """

    def __init__(self, streams: int, width: int, carried: float) -> None:
        super().__init__()
        self.streams, self.carried = streams, carried
        self.weights = nn.Linear(streams * width, streams * (streams + 2))
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        count = self.streams
        pre, post, mix = self.weights(x.flatten(-2)).split([count, count, count**2], -1)
        mix = mix.unflatten(-1, (count, count)).softmax(-1)
        for dimension in (-2, -1, -2):
            mix = mix / mix.sum(dimension, keepdim=True)
        read = (pre.sigmoid().unsqueeze(-1) * x).sum(-2)
        written = 2 * post.sigmoid().unsqueeze(-1) * self.body(read).unsqueeze(-2)
        return written + (self.carried * mix).transpose(-1, -2) @ x


class HyperConnected(nn.Module):
    def __init__(self, depth: int, streams: int = 4, width: int = 8, carried: float = 1.0) -> None:
        super().__init__()
        self.streams = streams
        self.blocks = nn.ModuleList(HyperConnection(streams, width, carried) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-2).expand(*x.shape[:-1], self.streams, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(-2))


def hyper_connected() -> Built:
    return HyperConnected(6), torch.randn(BATCH, 5, 8)


class ValuesUnprojected(nn.Module):
    """Attention that mixes the stream itself, beside an MLP: comparing positions is no way to carry them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) @ self.key(x).transpose(-1, -2)).softmax(-1) @ x + self.mlp(x)


def values_unprojected() -> Built:
    return nn.Sequential(*(ValuesUnprojected(8) for _ in range(3))), torch.randn(BATCH, 5, 8)


class LoRALinear(nn.Module):
    """A frozen linear map and a product of two thin ones beside it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.base.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.lora_b(self.lora_a(x))


def lora() -> Built:
    return nn.Sequential(LoRALinear(8, 2), nn.ReLU(), LoRALinear(8, 2)), torch.randn(BATCH, 8)


class RepVGGBlock(nn.Module):
    """Three parallel linear maps that a deployment folds into one convolution: nothing bends in any of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense, self.pointwise = conv_norm(width, width), conv_norm(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.pointwise(x))


def repvgg() -> Built:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), RepVGGBlock(8), RepVGGBlock(8)), torch.randn(
        BATCH, 3, 8, 8
    )


class PairBiased(nn.Module):
    """Attention with a bias a pair, ``softmax(q k / s + linear(pairs)) v``; no skip of its own."""

    def __init__(self, width: int, pairs: int) -> None:
        super().__init__()
        self.norm, self.bias = nn.LayerNorm(width), nn.Linear(pairs, 1)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, pairs: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores = (scores + self.bias(pairs).squeeze(-1)).masked_fill(mask, -1e9)
        return self.out(F.softmax(scores, dim=-1) @ v)


class PairFormer(nn.Module):
    """Tokens that see their pairs, as in a structure predictor: the pairs come from the tokens."""

    def __init__(self, width: int = 16, pairs: int = 8) -> None:
        super().__init__()
        self.embed, self.left, self.right = (nn.Linear(width, n) for n in (width, pairs, pairs))
        self.layers = nn.ModuleList(PairBiased(width, pairs) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        pairs = self.left(x)[:, :, None] * self.right(x)[:, None]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for layer in self.layers:
            x = layer(x, pairs, mask)
        return x


def pair_bias() -> Built:
    return PairFormer(), torch.randn(BATCH, 6, 16)


class ExpandedBias(nn.Module):
    """A bias that takes its shape from the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.lasts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.biases = nn.ParameterList(torch.zeros(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer, last, bias in zip(self.layers, self.lasts, self.biases, strict=True):
            x = last(torch.tanh(layer(x))) + bias.to(x).expand_as(x)
        return x


def expanded_bias() -> Built:
    return ExpandedBias(), torch.randn(BATCH, 8)
