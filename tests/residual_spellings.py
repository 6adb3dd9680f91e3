"""Every way of writing a residual connection that we have met, and what only looks like one: a function each.

Each takes a :class:`Parts`, whose layers it may call, and the stream ``x`` of shape (4, 6).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6
Forward = Callable[["Parts", Tensor], Tensor]


class Parts(nn.Module):
    """Layers to write with; ``forward`` runs one spelling as the root's own forward."""

    def __init__(self, write: Forward) -> None:
        super().__init__()
        self.write = write
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.f = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.g = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.norm = nn.LayerNorm(WIDTH)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gamma, self.alpha = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.tensor(0.3))
        self.zero = nn.Parameter(torch.tensor(0.0))
        self.positions = nn.Parameter(torch.randn(4, WIDTH))
        self.kinds = nn.Embedding(4, WIDTH)
        self.table = nn.Parameter(torch.randn(4, WIDTH))
        self.inner = nn.Module()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.write(self, self.stem(x)))


def in_a_function(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    return x + f(x)


def iadd(x: Tensor, f: Tensor) -> Tensor:
    x += f
    return x


def fused(x: Tensor, m: Parts) -> Tensor:
    """A branch of functional calls alone."""
    hidden = F.relu(F.linear(x, m.one.weight, m.one.bias))
    return x + F.linear(hidden, m.two.weight)


def nested(m: Parts, x: Tensor) -> Tensor:
    hidden = torch.tanh(m.one(x))
    hidden = hidden + m.f(hidden)
    return x + m.two(hidden)


def drop_path(m: Parts, x: Tensor) -> Tensor:
    mask = torch.ones(len(x), 1)
    mask[0] = 0.0
    return x + m.f(x) / 0.75 * mask


@dataclass(frozen=True, kw_only=True)
class Found:
    """What must be found; a site each, in order, by kind."""

    write: Forward
    kinds: tuple[str, ...] = ("identity",)
    of: dict[str, Any] = field(default_factory=dict)
    """Columns of the last site."""


SPELLINGS: dict[str, Found] = {
    "x + f(x)": Found(write=lambda m, x: x + m.f(x)),
    "f(x) + x": Found(write=lambda m, x: m.f(x) + x),
    "x.clone() += f(x)": Found(write=lambda m, x: iadd(x.clone(), m.f(x)), of={"in_place": True}),
    "out += x": Found(write=lambda m, x: iadd(m.f(x), x), of={"in_place": True}),
    "out.add_(x)": Found(write=lambda m, x: m.f(x).add_(x), of={"in_place": True}),
    "torch.add(x, f)": Found(write=lambda m, x: torch.add(x, m.f(x)), of={"in_place": False}),
    "torch.add(input=, other=)": Found(write=lambda m, x: torch.add(other=m.f(x), input=x)),
    "x.add(f)": Found(write=lambda m, x: x.add(m.f(x))),
    "operator.add": Found(write=lambda m, x: operator.add(x, m.f(x))),
    "in a function": Found(write=lambda m, x: in_a_function(x, m.f)),
    "functional branch": Found(write=lambda m, x: fused(x, m)),
    ".to of its own dtype": Found(write=lambda m, x: x.to(torch.float32) + m.f(x)),
    ".to and back": Found(write=lambda m, x: (x.double() + m.f(x).double()).float()),
    ".view": Found(write=lambda m, x: (x.view(2, 2, WIDTH) + m.f(x).view(2, 2, WIDTH)).view(4, WIDTH)),
    ".contiguous()": Found(write=lambda m, x: x.contiguous() + m.f(x).contiguous()),
    "permuted": Found(write=lambda m, x: (x.t() + m.f(x).permute(1, 0)).t()),
    "rolled": Found(write=lambda m, x: torch.roll(x, 2, 0) + m.f(x)),
    "dropout on the skip": Found(write=lambda m, x: F.dropout(x, 0.1) + m.f(x)),
    "dropout on the branch": Found(write=lambda m, x: x + F.dropout(m.f(x), 0.1)),
    "a slice": Found(write=lambda m, x: F.pad(x[:, :3] + m.f(x)[:, :3], (0, 3))),
    "scaled by a number": Found(
        write=lambda m, x: x * 0.5 + m.f(x), kinds=("scaled",), of={"skip_scale": 0.5}
    ),
    "divided": Found(write=lambda m, x: x / 4 + m.f(x), kinds=("scaled",), of={"skip_scale": 0.25}),
    "scaled by a parameter": Found(
        write=lambda m, x: m.f(x) + m.alpha * x, kinds=("scaled",), of={"skip_scale": 0.3}
    ),
    "ReZero": Found(write=lambda m, x: x + m.zero * m.f(x), of={"branch_scale": 0.0, "rho": 0.0}),
    "a learned scalar": Found(write=lambda m, x: x + m.alpha * m.f(x), of={"branch_scale": 0.3}),
    "LayerScale": Found(write=lambda m, x: x + m.gamma * m.f(x)),
    "a constant on the branch": Found(write=lambda m, x: x + 0.1 * m.f(x), of={"branch_scale": 0.1}),
    "stochastic depth": Found(write=drop_path),
    "x + a + b": Found(write=lambda m, x: x + m.f(x) + m.g(x), of={"branches": 2}),
    "x + (a + b)": Found(write=lambda m, x: x + (m.f(x) + m.g(x)), of={"branches": 2}),
    "a + b + x": Found(write=lambda m, x: m.f(x) + m.g(x) + x, of={"branches": 2}),
    "nested": Found(write=nested, kinds=("identity", "identity"), of={"span": 4}),
    "one after the other": Found(
        write=lambda m, x: in_a_function(in_a_function(x, m.f), m.g), kinds=("identity", "identity")
    ),
    "post-norm": Found(write=lambda m, x: m.norm(x + m.f(x))),
    "pre-norm": Found(write=lambda m, x: x + m.f(m.norm(x))),
    "a norm on the branch alone": Found(write=lambda m, x: x + m.norm(x), of={"span": 0}),
    "checkpointed": Found(write=lambda m, x: x + checkpoint(m.f, x, use_reentrant=False)),
    "checkpointed whole": Found(
        write=lambda m, x: checkpoint(in_a_function, x, m.f, use_reentrant=False), kinds=("identity",)
    ),
    "projection": Found(write=lambda m, x: m.one(x) + m.f(x), kinds=("projection",)),
    "projection with a norm": Found(write=lambda m, x: m.norm(m.one(x)) + m.f(x), kinds=("projection",)),
    "highway": Found(
        write=lambda m, x: torch.sigmoid(m.one(x)) * m.f(x) + (1 - torch.sigmoid(m.one(x))) * x,
        kinds=("gated",),
    ),
    "concatenated": Found(write=lambda m, x: m.norm(torch.cat((x, m.f(x)), 1)[:, ::2]), kinds=("concat",)),
}


def polynomial(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(0.7978845608 * (z + 0.044715 * z**3)))


def response_norm(m: Parts, x: Tensor) -> Tensor:
    energy = x.norm(dim=0, keepdim=True)
    return m.gamma * (x * (energy / (energy.mean() + 1e-6))) + m.positions[0] + x


def rotary(x: Tensor) -> Tensor:
    angles = torch.arange(WIDTH, dtype=torch.float32)
    half = WIDTH // 2
    return x * angles.cos() + torch.cat((-x[:, half:], x[:, :half]), 1) * angles.sin()


def recurrence(m: Parts, x: Tensor) -> Tensor:
    state = torch.zeros(1, WIDTH)
    for step in range(4):
        state = torch.tanh(m.one(x[step : step + 1]) + m.two(state))
    return state.expand(4, -1)


def cell(core: nn.RNNCellBase) -> Forward:
    def write(m: Parts, x: Tensor) -> Tensor:
        state = None
        for step in range(4):
            state = core(x[step : step + 1], state)
        return (state[0] if isinstance(state, tuple) else state).expand(4, -1)

    return write


def parallel_convolutions(m: Parts, x: Tensor) -> Tensor:
    image = x.view(1, 1, 4, WIDTH)
    return (
        F.conv2d(image, m.one.weight[:3, :3].reshape(1, 1, 3, 3), padding=1)
        + F.conv2d(image, m.two.weight[:1, :1].reshape(1, 1, 1, 1))
    ).view(4, WIDTH)


DECOYS: dict[str, Forward] = {
    "bias": lambda m, x: m.f(x) + m.gamma,
    "position embedding": lambda m, x: m.f(x) + m.positions,
    "token-type embedding": lambda m, x: m.f(x) + m.kinds(torch.arange(4)),
    "embedding of an index made from the data": lambda m, x: x + m.table[x.argmax(1) % 4],
    "mask": lambda m, x: m.f(x).masked_fill(x > 9, 0.0) + torch.zeros(4, WIDTH),
    "attention mask": lambda m, x: torch.softmax(m.one(x) @ x.t() + torch.triu(torch.ones(4, 4), 1), -1) @ x,
    "noise like x": lambda m, x: m.f(x) + 0.1 * torch.randn_like(x),
    "ones like a sum": lambda m, x: polynomial(x + torch.ones_like(x)),
    "rotary": lambda m, x: rotary(m.f(x)),
    "GELU's polynomial": lambda m, x: polynomial(m.f(x)),
    "global response normalisation": response_norm,
    "a sum with its own square": lambda m, x: x + x * x,
    "x + relu(x)": lambda m, x: x + torch.relu(x),
    "x + x": lambda m, x: m.f(x + x),
    "two linear heads": lambda m, x: m.one(x) + m.two(x),
    "parallel convolutions": parallel_convolutions,
    "RNN in plain ops": recurrence,
    "RNN cell": cell(nn.RNNCell(WIDTH, WIDTH)),
    "LSTM cell": cell(nn.LSTMCell(WIDTH, WIDTH)),
    "GRU cell": cell(nn.GRUCell(WIDTH, WIDTH)),
    "a sum over the batch": lambda m, x: m.f(x) + x.mean(0, keepdim=True).detach() * 0,
    "losses": lambda m, x: x * (m.f(x).square().mean() + m.g(x).square().mean()),
}
"""No site in any of these."""

AFTER_A_BLOCK: dict[str, Forward] = {
    "x + relu(x)": lambda m, x: (lambda y: y + torch.relu(y))(x + m.f(x)),
    "a polynomial": lambda m, x: polynomial(x + m.f(x)),
    "constants of its shape": lambda m, x: (lambda y: y + torch.ones_like(y))(x + m.f(x)),
    "a bias": lambda m, x: x + m.f(x) + m.gamma,
    "positions": lambda m, x: (x + m.f(x)) + m.positions,
}
"""The block's own site, and no more: what follows it must not be taken for a second branch."""
