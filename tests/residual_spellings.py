"""Every way of writing a residual connection that we have met, and what only looks like one: a function each.

Each takes a :class:`Parts`, whose layers it may call, and the stream ``x`` of shape (4, 6).
"""

from __future__ import annotations

import operator
import warnings
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


def isub(x: Tensor, f: Tensor) -> Tensor:
    x -= f
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


class Joined(torch.autograd.Function):
    """x + f in torch's ops, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor) -> Tensor:
        return x + f

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


class JoinedAndNormed(torch.autograd.Function):
    """What fused kernels of language models do: the new stream, and the stream normalised for the next branch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        total = x + f
        return F.layer_norm(total, (WIDTH,)), total

    @staticmethod
    def backward(ctx: Any, normed: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return normed + total, normed + total


class Unseen(torch.autograd.Function):
    """An add that no torch op does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() + f.detach().numpy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


class WholeBlock(torch.autograd.Function):
    """The block itself, in torch's ops, with a backward that makes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(x, first, second)
        return x + torch.relu(x @ first) @ second

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x, first, second = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
            total = x + torch.relu(x @ first) @ second
            return torch.autograd.grad(total, (x, first, second), gradient)


def rectified_sum(x: Tensor, f: Tensor) -> Tensor:
    return x + torch.relu(f)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # scripted functions are still about
    scripted = torch.jit.script(rectified_sum)


@torch.library.custom_op("gradflow_tests::joined", mutates_args=())
def joined(x: Tensor, f: Tensor) -> Tensor:
    """Another library's op."""
    return x + f


joined.register_autograd(lambda ctx, gradient: (gradient, gradient))


def twice_normed(m: Parts, x: Tensor) -> Tensor:
    normed, x = JoinedAndNormed.apply(x, m.f(x))
    return JoinedAndNormed.apply(x, m.f(normed))[1]


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
    # One op that adds and does more: what it adds is what must be measured.
    "torch.add(alpha=)": Found(
        write=lambda m, x: torch.add(x, m.f(x), alpha=0.3), of={"branch_scale": 0.3, "added_by": "add"}
    ),
    "add(alpha=) on the skip": Found(
        write=lambda m, x: m.f(x).add(x, alpha=0.5), kinds=("scaled",), of={"skip_scale": 0.5}
    ),
    "add_(alpha=)": Found(
        write=lambda m, x: x.clone().add_(m.alpha * m.f(x), alpha=2),
        of={"branch_scale": 0.6, "in_place": True},
    ),
    "x - f(x)": Found(write=lambda m, x: x - m.f(x), of={"branch_scale": -1.0, "added_by": "sub"}),
    "torch.sub(alpha=)": Found(
        write=lambda m, x: torch.sub(x, m.f(x), alpha=0.5), of={"branch_scale": -0.5, "added_by": "sub"}
    ),
    "x.clone() -= f(x)": Found(
        write=lambda m, x: isub(x.clone(), m.f(x)), of={"in_place": True, "added_by": "sub"}
    ),
    "x - a - b": Found(write=lambda m, x: x - m.f(x) - m.g(x), of={"branches": 2}),
    "addcmul with LayerScale": Found(
        write=lambda m, x: torch.addcmul(x, m.gamma, m.f(x)),
        of={"branch_factors": "channels", "added_by": "addcmul"},
    ),
    "addcmul(value=)": Found(
        write=lambda m, x: torch.addcmul(x, m.f(x), m.alpha, value=0.5), of={"branch_scale": 0.15}
    ),
    "addcmul_ with a gate": Found(
        write=lambda m, x: x.clone().addcmul_(m.f(x), torch.sigmoid(m.one(x))),
        of={"branch_factors": "gate", "in_place": True},
    ),
    "addcmul of the skip": Found(
        write=lambda m, x: torch.addcmul(m.f(x), m.alpha, x), kinds=("scaled",), of={"skip_scale": 0.3}
    ),
    "lerp": Found(
        write=lambda m, x: torch.lerp(x, m.f(x), 0.25),
        kinds=("scaled",),
        of={"skip_scale": 0.75, "branch_scale": 0.25, "added_by": "lerp"},
    ),
    "lerp_ the other way": Found(
        write=lambda m, x: m.f(x).lerp_(x, 0.25),
        kinds=("scaled",),
        of={"skip_scale": 0.25, "branch_scale": 0.75, "in_place": True},
    ),
    "lerp by a parameter": Found(
        write=lambda m, x: torch.lerp(x, m.f(x), m.alpha),
        kinds=("scaled",),
        of={"skip_scale": 0.7, "branch_scale": 0.3, "shortcut": "scalar"},
    ),
    "lerp by a gate": Found(
        write=lambda m, x: torch.lerp(x, m.f(x), torch.sigmoid(m.one(x))), kinds=("gated",)
    ),
    "sum([x, f])": Found(write=lambda m, x: sum([x, m.f(x)]), of={"added_by": "add"}),
    "sum([f, x])": Found(write=lambda m, x: sum([m.f(x), x])),
    "sum([x, a, b])": Found(write=lambda m, x: sum([x, m.f(x), m.g(x)]), of={"branches": 2}),
    "stack().sum(0)": Found(
        write=lambda m, x: torch.stack([x, m.f(x)]).sum(0), of={"added_by": "sum", "branches": 1}
    ),
    "torch.sum(torch.stack(), dim)": Found(
        write=lambda m, x: torch.sum(torch.stack((m.f(x), x), dim=1), dim=1), of={"added_by": "sum"}
    ),
    "stack of three, summed": Found(
        write=lambda m, x: torch.stack([m.f(x), x, m.g(x)], -1).sum((-1,)), of={"branches": 2}
    ),
    "stack().mean(0)": Found(
        write=lambda m, x: torch.stack([x, m.f(x)]).mean(dim=0),
        kinds=("scaled",),
        of={"skip_scale": 0.5, "branch_scale": 0.5},
    ),
    "addmm": Found(
        write=lambda m, x: torch.addmm(x, torch.tanh(m.one(x)), m.two.weight),
        of={"added_by": "addmm", "span": 2, "branch_ops": "linear;tanh;mm"},
    ),
    "addmm(beta=, alpha=)": Found(
        write=lambda m, x: torch.addmm(x, torch.tanh(m.one(x)), m.two.weight.t(), beta=0.5, alpha=2),
        kinds=("scaled",),
        of={"skip_scale": 0.5, "branch_scale": 2.0},
    ),
    "baddbmm": Found(
        write=lambda m, x: torch.baddbmm(x[None], torch.tanh(m.one(x))[None], m.two.weight[None])[0],
        of={"added_by": "baddbmm"},
    ),
    "scaled on both sides": Found(
        write=lambda m, x: x * 0.8 + m.f(x) * m.alpha,
        kinds=("scaled",),
        of={"skip_scale": 0.8, "branch_scale": 0.3},
    ),
    "torch.ops.aten.add": Found(write=lambda m, x: torch.ops.aten.add(x, m.f(x))),
    "torch.ops.aten.add.Tensor": Found(write=lambda m, x: torch.ops.aten.add.Tensor(x, m.f(x))),
    "x + (a + one linear map)": Found(write=lambda m, x: x + (m.f(x) + m.one(x)), of={"branches": 2}),
    # Joined by something with a backward of its own: said so, with no number that was not measured.
    "custom function": Found(
        write=lambda m, x: Joined.apply(x, m.f(x)), kinds=("opaque",), of={"added_by": "Joined"}
    ),
    "custom function, the whole block": Found(
        write=lambda m, x: WholeBlock.apply(x, m.one.weight, m.two.weight),
        kinds=("opaque",),
        of={"added_by": "WholeBlock", "span": 2},
    ),
    "custom function, also the norm": Found(
        write=twice_normed, kinds=("opaque", "opaque"), of={"added_by": "JoinedAndNormed"}
    ),
    "custom function without torch": Found(
        write=lambda m, x: Unseen.apply(x, m.f(x)), kinds=("opaque",), of={"added_by": "Unseen"}
    ),
    "scripted function": Found(
        write=lambda m, x: scripted(x, m.f(x)), kinds=("opaque",), of={"added_by": "an unseen op"}
    ),
    "another library's op": Found(
        write=lambda m, x: torch.ops.gradflow_tests.joined(x, m.f(x)),
        kinds=("opaque",),
        of={"added_by": "gradflow_tests::joined"},
    ),
    "after a custom function": Found(
        write=lambda m, x: in_a_function(Joined.apply(x, m.f(x)), m.g), kinds=("opaque", "identity")
    ),
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
    "a difference": lambda m, x: m.f(x) - x,
    "a reconstruction error": lambda m, x: x * (x - m.f(x)).square().mean(),
    "another": lambda m, x: x * torch.linalg.vector_norm(x - m.f(x)),
    "centred": lambda m, x: m.f(x - x.mean(0, keepdim=True)),
    "a custom function of two heads": lambda m, x: Unseen.apply(m.one(x), m.two(x)),
    "a stack of heads, summed": lambda m, x: torch.stack([m.one(x), m.two(x)]).sum(0),
    "a stack reduced along the features": lambda m, x: (
        torch.stack([x, m.f(x)]).sum(2).repeat(3, 1)[:WIDTH].t()
    ),
    "a stack with its largest": lambda m, x: torch.stack([x, m.f(x)]).amax(0),
    "addmm with a bias": lambda m, x: torch.addmm(m.gamma, torch.tanh(m.one(x)), m.two.weight),
    "addmm that drops the stream": lambda m, x: torch.addmm(x, torch.tanh(m.one(x)), m.two.weight, beta=0),
    "addcmul of itself": lambda m, x: torch.addcmul(x, x, x),
    "lerp to a constant": lambda m, x: torch.lerp(m.f(x), m.positions, 0.5),
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
