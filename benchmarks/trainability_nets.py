"""The grid of ``trainability.py``: its nets, its data, and the two halves, fixed before anything was trained.

Each family is a full product of depth, activation, initialisation, normalisation and wiring. Of every family the
nets whose names have the smallest SHA-256 are taken, so nobody chose them; another hash of the name says which half
a net is in: ``tuned``, which thresholds may be chosen on, or ``untouched``, which they may not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from scoring import digest, half_of
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, CHANNELS, TOKEN_WIDTH, HEADS = 64, 16, 32, 4
CLASSES = 10
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;()[]{}\"'`_-+=*/<>|#%&~"
"""64 characters; a capital counts as its small letter, anything else as the last."""
TEXT_LENGTH = 16

COUNTS = {"dense": 400, "conv": 120, "transformer": 120}
"""How many nets of each family are in the grid."""

AXES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "dense": (
        ("digits",),
        (3, 6, 12, 24, 48),
        ("relu", "gelu", "tanh", "sigmoid"),
        ("default", "xavier", "he", "orthogonal", "small", "large"),
        ("none", "batch", "layer"),
        ("plain", "residual"),
    ),
    "conv": (
        ("digits",),
        (4, 10, 24),
        ("relu", "tanh"),
        ("default", "xavier", "he", "small", "large"),
        ("none", "batch"),
        ("plain", "residual"),
    ),
    "transformer": (
        ("digits", "text"),
        (2, 4, 8),
        ("relu", "gelu"),
        ("default", "std002", "xavier", "large"),
        ("none", "pre", "post"),
        ("plain", "residual"),
    ),
}
"""Data, depth, activation, initialisation, normalisation, wiring of each family."""

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """One recipe; its name holds all of it."""

    family: str
    data: str
    """"digits" or "text"."""
    depth: int
    activation: str
    initialisation: str
    norm: str
    wiring: str

    @property
    def name(self) -> str:
        """As in the table of labels: "dense-digits-24-relu-he-none-plain"."""
        parts = (self.family, self.data, self.depth, self.activation, self.initialisation, self.norm)
        return "-".join(map(str, (*parts, self.wiring)))

    @property
    def half(self) -> str:
        """ "tuned" or "untouched"."""
        return half_of(f"half:{self.name}")


@cache
def grid() -> tuple[Net, ...]:
    """Every net of the grid, families in order, each by the hash of its name."""
    found: list[Net] = []
    for family, axes in AXES.items():
        fields = ("data", "depth", "activation", "initialisation", "norm", "wiring")
        nets = [Net(family=family, **dict(zip(fields, values, strict=True))) for values in product(*axes)]
        found += sorted(nets, key=lambda net: digest(net.name))[: COUNTS[family]]
    return tuple(found)


def initialise(module: nn.Module, how: str) -> None:
    """Set the weights of every linear and convolution below ``module``; "default" leaves PyTorch's."""
    if how == "default":
        return
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            _initialise_weight(part.weight, how)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding) and how == "std002":
            nn.init.normal_(part.weight, std=0.02)


def _initialise_weight(weight: Tensor, how: str) -> None:
    if how == "xavier":
        nn.init.xavier_normal_(weight)
    elif how == "orthogonal":
        nn.init.orthogonal_(weight)
    elif how == "std002":
        nn.init.normal_(weight, std=0.02)
    else:
        nn.init.kaiming_normal_(weight)
        with torch.no_grad():
            weight *= {"he": 1.0, "small": 0.5, "large": 2.0}[how]


def norm_of(kind: str, width: int, *, images: bool = False) -> nn.Module:
    """The normalisation of this name over ``width`` features, or channels of images."""
    if kind == "batch":
        return nn.BatchNorm2d(width) if images else nn.BatchNorm1d(width)
    return nn.LayerNorm(width) if kind in ("layer", "pre", "post") else nn.Identity()


class Residual(nn.Module):
    """x + F(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _layer(weight: nn.Module, norm: nn.Module, activation: nn.Module, wiring: str) -> nn.Module:
    if wiring == "residual":
        return Residual(norm, activation, weight)
    return nn.Sequential(weight, norm, activation)


class Dense(nn.Module):
    """``depth`` layers of 64 units on the pixels, and a linear head."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                _layer(
                    nn.Linear(WIDTH, WIDTH),
                    norm_of(net.norm, WIDTH),
                    ACTIVATIONS[net.activation](),
                    net.wiring,
                )
                for _ in range(net.depth)
            )
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class Conv(nn.Module):
    """A stem that halves the size, ``depth`` 3×3 convolutions of 16 channels, global pooling, a linear head."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1)
        self.layers = nn.Sequential(
            *(
                _layer(
                    nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
                    norm_of(net.norm, CHANNELS, images=True),
                    ACTIVATIONS[net.activation](),
                    net.wiring,
                )
                for _ in range(net.depth)
            )
        )
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x.view(-1, 1, 8, 8))).mean(dim=(2, 3)))


class SelfAttention(nn.Module):
    """Queries, keys and values of their own matrices, so that each initialisation means what it says."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (
            part(x).view(batch, length, HEADS, width // HEADS).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
        return self.project(mixed.transpose(1, 2).reshape(batch, length, width))


class Sublayer(nn.Module):
    """A branch with its normalisation before it, after the add, or none; with a skip or without."""

    def __init__(self, branch: nn.Module, net: Net) -> None:
        super().__init__()
        self.branch = branch
        self.before = norm_of(net.norm if net.norm == "pre" else "none", TOKEN_WIDTH)
        self.after = norm_of(net.norm if net.norm == "post" else "none", TOKEN_WIDTH)
        self.skips = net.wiring == "residual"

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(self.before(x))
        return self.after(x + branch if self.skips else branch)


class Transformer(nn.Module):
    """``depth`` blocks of attention and an MLP: rows of a digit as tokens, or characters, causally."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        text = net.data == "text"
        self.embed = nn.Embedding(len(ALPHABET), TOKEN_WIDTH) if text else nn.Linear(8, TOKEN_WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(TEXT_LENGTH if text else 8, TOKEN_WIDTH))
        self.blocks = nn.Sequential()
        for _ in range(net.depth):
            mlp = nn.Sequential(
                nn.Linear(TOKEN_WIDTH, 4 * TOKEN_WIDTH),
                ACTIVATIONS[net.activation](),
                nn.Linear(4 * TOKEN_WIDTH, TOKEN_WIDTH),
            )
            self.blocks.append(Sublayer(SelfAttention(TOKEN_WIDTH, causal=text), net))
            self.blocks.append(Sublayer(mlp, net))
        self.norm = norm_of("layer" if net.norm == "pre" else "none", TOKEN_WIDTH)
        self.head = nn.Linear(TOKEN_WIDTH, len(ALPHABET) if text else CLASSES)
        self.text = text

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x if self.text else x.view(-1, 8, 8)) + self.positions
        hidden = self.norm(self.blocks(tokens))
        return self.head(hidden if self.text else hidden.mean(dim=1))


FAMILIES: dict[str, Callable[[Net], nn.Module]] = {"dense": Dense, "conv": Conv, "transformer": Transformer}


def build(net: Net, seed: int) -> nn.Module:
    """The net with the weights of this seed."""
    torch.manual_seed(seed)
    module = FAMILIES[net.family](net)
    initialise(module, net.initialisation)
    return module


@cache
def samples(data: str) -> tuple[Tensor, Tensor]:
    """All inputs and targets: standardised digits and their classes, or text and the characters that follow."""
    if data == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32)
        return (x - x.mean()) / x.std(), torch.tensor(labels, dtype=torch.int64)
    codes = torch.tensor([_code(character) for character in _text()])
    windows = codes.unfold(0, TEXT_LENGTH + 1, TEXT_LENGTH)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _text() -> str:
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))[:200_000]


def _code(character: str) -> int:
    place = ALPHABET.find(character.lower())
    return place if place >= 0 else len(ALPHABET) - 1


def batch(data: str, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """A seeded batch of the data."""
    x, y = samples(data)
    chosen = torch.randint(0, len(x), (size,), generator=torch.Generator().manual_seed(seed))
    return x[chosen], y[chosen]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over samples, or over characters."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@cache
def chance(data: str) -> float:
    """The accuracy of always naming the most frequent target."""
    targets = samples(data)[1].flatten()
    return int(torch.bincount(targets).max()) / len(targets)


def linear(data: str) -> nn.Module:
    """The linear model that says what can be learnt without depth: of the pixels, or of the last character."""
    torch.manual_seed(0)
    return nn.Linear(WIDTH, CLASSES) if data == "digits" else nn.Embedding(len(ALPHABET), len(ALPHABET))
