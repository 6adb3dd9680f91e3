"""Recurrent and unusual models, healthy as they stand: shapes of forward that a tool meets in the wild.

``MODELS`` maps a name to a builder of ``(model, inputs, loss)``; ``loss`` is None where the model is
measured with the probe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn

Loss = Callable[[Any, Any], torch.Tensor]
Built = tuple[nn.Module, tuple[Any, ...], Loss | None]


class CharLSTM(nn.Module):
    """Characters of texts of different lengths, packed."""

    def __init__(self, vocabulary: int = 40, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = rnn.pack_padded_sequence(
            self.embedding(ids), lengths, batch_first=True, enforce_sorted=False
        )
        states, _ = rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(states)


def char_lstm() -> Built:
    return CharLSTM(), (torch.randint(0, 40, (6, 20)), torch.tensor([20, 5, 11, 8, 3, 17])), None


class Seq2Seq(nn.Module):
    """A GRU encoder and an LSTM cell that is called once a token with the right answer fed back."""

    def __init__(self, vocabulary: int = 30, width: int = 32) -> None:
        super().__init__()
        self.source = nn.Embedding(vocabulary, width)
        self.target = nn.Embedding(vocabulary, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.LSTMCell(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        hidden = self.encoder(self.source(source))[1][0]
        cell = torch.zeros_like(hidden)
        logits = []
        for step in range(target.shape[1]):
            hidden, cell = self.decoder(self.target(target[:, step]), (hidden, cell))
            logits.append(self.head(hidden))
        return logits


def seq2seq() -> Built:
    ids = torch.randint(0, 30, (8, 10))

    def loss(logits: list[torch.Tensor], _inputs: Any) -> torch.Tensor:
        return torch.stack([F.cross_entropy(step, ids[:, i]) for i, step in enumerate(logits)]).mean()

    return Seq2Seq(), (torch.randint(0, 30, (8, 12)), ids), loss


class BidirectionalTagger(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, bidirectional=True)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        states, (hidden, cell) = self.lstm(x.transpose(0, 1))
        return {"tags": self.head(states).transpose(0, 1), "last": (hidden.mean(0), cell.mean(0))}


def bidirectional() -> Built:
    return BidirectionalTagger(), (torch.randn(8, 12, 24),), None


class NeuralODE(nn.Module):
    """Euler steps of one shared field."""

    def __init__(self, width: int = 32, steps: int = 10) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.head = nn.Linear(width, 4)
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.steps):
            x = x + self.field(x) / self.steps
        return self.head(x)


def neural_ode() -> Built:
    return NeuralODE(), (torch.randn(16, 32),), lambda outputs, _inputs: outputs.square().mean()


class HyperNetwork(nn.Module):
    """One network writes the weights of another, which is only ``F.linear``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(8))
        self.weights = nn.Linear(8, width * width)
        self.biases = nn.Linear(8, width)
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weights(self.code).view(self.width, self.width)
        return F.linear(torch.tanh(F.linear(x, weight, self.biases(self.code))), weight)


def hypernetwork() -> Built:
    return HyperNetwork(), (torch.randn(32, 16),), None


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 16)
        )

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return F.pairwise_distance(self.encoder(left), self.encoder(right))


def siamese() -> Built:
    return Siamese(), (torch.randn(8, 1, 16, 16), torch.randn(8, 1, 16, 16)), None


class GAN(nn.Module):
    """Both halves in one module; returns the two losses, and the sum is minimised."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(0.2), nn.Linear(32, 16), nn.Tanh())
        self.discriminator = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def forward(self, noise: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fake = self.generator(noise)
        generated = F.softplus(-self.discriminator(fake)).mean()
        judged = F.softplus(self.discriminator(fake.detach())).mean()
        return generated, judged + F.softplus(-self.discriminator(real)).mean()


def gan() -> Built:
    return GAN(), (torch.randn(16, 8), torch.randn(16, 16)), lambda outputs, _inputs: outputs[0] + outputs[1]


class Experts(nn.Module):
    """Each row goes to its best expert; with six rows and eight experts some are never called."""

    def __init__(self, width: int = 16, experts: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(dim=1).max(dim=1)
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            rows = chosen == index
            out[rows] = self.experts[index](x[rows]) * weights[rows, None]
        return out


def experts() -> Built:
    return Experts(), (torch.randn(6, 16),), None


class GraphConvolution(nn.Module):
    """Mean over neighbours, given as a (2, edges) index: the second input has no batch dimension."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, 4)

    def gather(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges
        degree = torch.bincount(target, minlength=len(x)).clamp(min=1).to(x.dtype)
        return x + torch.zeros_like(x).index_add(0, target, x[source]) / degree[:, None]

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return self.second(self.gather(F.relu(self.first(self.gather(x, edge_index))), edge_index))


def graph() -> Built:
    return GraphConvolution(), (torch.randn(20, 16), torch.randint(0, 20, (2, 60))), None


class Parametrised(nn.Module):
    """Spectral and weight normalisation as parametrizations."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.spectral = parametrizations.spectral_norm(nn.Linear(width, width))
        self.normed = parametrizations.weight_norm(nn.Conv1d(1, 4, 3, padding=1))
        self.head = nn.Linear(4 * width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.spectral(x), 0.1)
        return self.head(self.normed(x[:, None]).flatten(1))


def parametrised() -> Built:
    return Parametrised(), (torch.randn(16, 24),), None


class ComplexNet(nn.Module):
    """Filters in the frequency domain with complex weights."""

    def __init__(self, length: int = 32) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(length // 2 + 1, dtype=torch.complex64) / 4)
        self.mix = nn.Linear(length // 2 + 1, length // 2 + 1, dtype=torch.complex64)
        self.head = nn.Linear(length, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = self.mix(torch.fft.rfft(x) * self.filters)
        return self.head(torch.fft.irfft(spectrum, n=x.shape[1]))


def complex_net() -> Built:
    return ComplexNet(), (torch.randn(16, 32),), None


class DenseNet(nn.Module):
    """Every layer sees the concatenation of all before it."""

    def __init__(self, channels: int = 8, growth: int = 8, layers: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels + index * growth),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels + index * growth, growth, 3, padding=1, bias=False),
            )
            for index in range(layers)
        )
        self.head = nn.Linear(channels + layers * growth, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return self.head(torch.cat(features, dim=1).mean(dim=(2, 3)))


def dense_net() -> Built:
    labels = torch.randint(0, 10, (8,))
    return DenseNet(), (torch.randn(8, 3, 16, 16),), lambda outputs, _inputs: F.cross_entropy(outputs, labels)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


def mixer() -> Built:
    model = nn.Sequential(*(MixerBlock(16, 32) for _ in range(4)), nn.Flatten(), nn.Linear(512, 10))
    return model, (torch.randn(8, 16, 32),), None


class SplineLayer(nn.Module):
    """A Kolmogorov–Arnold layer: a sum of learned bumps on every edge, and a SiLU beside it."""

    def __init__(self, inputs: int, outputs: int, knots: int = 8) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(-2, 2, knots))
        self.coefficients = nn.Parameter(torch.randn(outputs, inputs, knots) / (inputs * knots) ** 0.5)
        self.base = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bumps = torch.exp(-((x[..., None] - self.centres) * 2).square())
        return torch.einsum("bik,oik->bo", bumps, self.coefficients) + F.silu(x) @ self.base.T


def spline() -> Built:
    return (
        nn.Sequential(SplineLayer(8, 16), SplineLayer(16, 16), SplineLayer(16, 1)),
        (torch.randn(32, 8),),
        None,
    )


class Equilibrium(nn.Module):
    """A tied layer iterated to its fixed point without a graph, then once more with one."""

    def __init__(self, width: int = 24, iterations: int = 12) -> None:
        super().__init__()
        self.inject = nn.Linear(width, width)
        self.cell = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.iterations = iterations
        nn.init.orthogonal_(self.cell.weight, gain=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        injected = self.inject(x)
        state = torch.zeros_like(injected)
        with torch.no_grad():
            for _ in range(self.iterations):
                state = torch.tanh(self.cell(state) + injected)
        return self.norm(torch.tanh(self.cell(state) + injected))


def equilibrium() -> Built:
    return Equilibrium(), (torch.randn(16, 24),), None


MODELS: dict[str, Callable[[], Built]] = {
    "char-LSTM, packed": char_lstm,
    "GRU to LSTM cell, teacher forcing": seq2seq,
    "bidirectional LSTM": bidirectional,
    "neural ODE": neural_ode,
    "hypernetwork": hypernetwork,
    "Siamese": siamese,
    "GAN": gan,
    "mixture of experts": experts,
    "graph convolution": graph,
    "spectral and weight norm": parametrised,
    "complex": complex_net,
    "DenseNet": dense_net,
    "MLP-Mixer": mixer,
    "spline layers": spline,
    "deep equilibrium": equilibrium,
}
