"""Whatever op adds, what is measured is what it truly adds: equal to explicit float64 autograd on the two operands."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow
from tests.witness import close, norm

SIZE = 6
Sides = tuple[Tensor, Tensor]
"""What the skip and the branch bring."""


class Model(nn.Module):
    """A stem, one residual sum written in some way, and a head; float64. ``sides`` writes the same plainly."""

    def __init__(self, write: Write, sides: Plain) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 8), nn.Linear(8, SIZE)
        self.gate, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 3)
        self.gamma, self.alpha = nn.Parameter(torch.rand(SIZE)), nn.Parameter(torch.tensor(0.3))
        self.write, self.sides = write, sides
        self.double()

    def h(self, x: Tensor) -> Tensor:
        return torch.tanh(self.one(x))

    def f(self, x: Tensor) -> Tensor:
        return self.two(self.h(x))

    def g(self, x: Tensor) -> Tensor:
        return F.gelu(self.gate(x))

    def w(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.write(self, self.stem(x)))


Write = Callable[[Model, Tensor], Tensor]
Plain = Callable[[Model, Tensor], Sides]

CASES: dict[str, tuple[Write, Plain]] = {
    "add(alpha=)": (
        lambda m, x: torch.add(x, m.f(x), alpha=0.3),
        lambda m, x: (x, 0.3 * m.f(x)),
    ),
    "add(alpha=) of the skip": (
        lambda m, x: torch.add(m.f(x), x, alpha=-0.3),
        lambda m, x: (-0.3 * x, m.f(x)),
    ),
    "add_(alpha=)": (
        lambda m, x: x.clone().add_(m.f(x), alpha=2.5),
        lambda m, x: (x, 2.5 * m.f(x)),
    ),
    "sub": (lambda m, x: x - m.f(x), lambda m, x: (x, -m.f(x))),
    "sub_(alpha=)": (
        lambda m, x: x.clone().sub_(m.f(x), alpha=0.5),
        lambda m, x: (x, -0.5 * m.f(x)),
    ),
    "a difference of two": (
        lambda m, x: x - m.f(x) - m.g(x),
        lambda m, x: (x, -m.f(x) - m.g(x)),
    ),
    "scaled, then another": (
        lambda m, x: torch.add(m.f(x), x, alpha=0.7) + m.g(x),
        lambda m, x: (0.7 * x, m.f(x) + m.g(x)),
    ),
    "scaled before, then another": (
        lambda m, x: 0.7 * x + m.f(x) + m.g(x),
        lambda m, x: (0.7 * x, m.f(x) + m.g(x)),
    ),
    "addcmul": (
        lambda m, x: torch.addcmul(x, m.gamma, m.f(x)),
        lambda m, x: (x, m.gamma * m.f(x)),
    ),
    "addcmul_(value=)": (
        lambda m, x: x.clone().addcmul_(m.f(x), m.w(x), value=-1.5),
        lambda m, x: (x, -1.5 * m.f(x) * m.w(x)),
    ),
    "addcmul of the skip": (
        lambda m, x: torch.addcmul(m.f(x), m.gamma, x, value=2),
        lambda m, x: (2 * m.gamma * x, m.f(x)),
    ),
    "lerp": (
        lambda m, x: torch.lerp(x, m.f(x), 0.25),
        lambda m, x: (0.75 * x, 0.25 * m.f(x)),
    ),
    "lerp by a parameter": (
        lambda m, x: torch.lerp(x, m.f(x), m.gamma),
        lambda m, x: ((1 - m.gamma) * x, m.gamma * m.f(x)),
    ),
    "lerp_ the other way": (
        lambda m, x: m.f(x).lerp_(x, 0.25),
        lambda m, x: (0.25 * x, 0.75 * m.f(x)),
    ),
    "sum()": (lambda m, x: sum([x, m.f(x), m.g(x)]), lambda m, x: (x, m.f(x) + m.g(x))),
    "stack().sum()": (
        lambda m, x: torch.stack([x, m.f(x)]).sum(0),
        lambda m, x: (x, m.f(x)),
    ),
    "torch.sum(stack()) of three": (
        lambda m, x: torch.sum(torch.stack((m.f(x), x, m.g(x)), 1), dim=1),
        lambda m, x: (x, m.f(x) + m.g(x)),
    ),
    "stack().mean()": (
        lambda m, x: torch.stack([m.f(x), x]).mean(0),
        lambda m, x: (x / 2, m.f(x) / 2),
    ),
    "addmm": (
        lambda m, x: torch.addmm(x, m.h(x), m.two.weight.t()),
        lambda m, x: (x, m.h(x) @ m.two.weight.t()),
    ),
    "addmm(beta=, alpha=)": (
        lambda m, x: torch.addmm(x, m.h(x), m.two.weight.t(), beta=0.5, alpha=3),
        lambda m, x: (0.5 * x, 3 * (m.h(x) @ m.two.weight.t())),
    ),
    "baddbmm": (
        lambda m, x: torch.baddbmm(x[:, None], m.h(x)[:, None], m.two.weight.t().expand(len(x), -1, -1))[
            :, 0
        ],
        lambda m, x: (x, m.h(x) @ m.two.weight.t()),
    ),
    "x * a + f(x) * b": (
        lambda m, x: x * m.alpha + m.f(x) * 0.4,
        lambda m, x: (m.alpha * x, 0.4 * m.f(x)),
    ),
}


def loss(outputs: Tensor, _inputs: Any) -> Tensor:
    return outputs.square().sum()


def brought_back(side: Tensor, source: Tensor, gradient: Tensor) -> Tensor:
    """The gradient that one side brings back to the source."""
    if side is source:
        return gradient
    (found,) = torch.autograd.grad(side, source, gradient, retain_graph=True)
    return found


def expected(model: Model, inputs: Tensor) -> dict[str, float]:
    source = model.stem(inputs)
    skip, branch = model.sides(model, source)
    total = skip + branch
    at_sum, at_source = torch.autograd.grad(
        loss(model.head(total), inputs), (total, source), retain_graph=True
    )
    back_skip, back_branch = (brought_back(side, source, at_sum) for side in (skip, branch))
    pair = (skip.detach(), total.detach())
    return {
        "skip_norm": norm(skip),
        "branch_norm": norm(branch),
        "rho": norm(branch) / norm(skip),
        "cosine": (skip * branch).sum().item() / norm(skip) / norm(branch),
        "block_influence": (1 - torch.cosine_similarity(*pair, dim=1)).mean().item(),
        "gradient_norm": norm(at_sum),
        "source_gradient_norm": norm(at_source),
        "std": total.std(correction=0).item(),
        "skip_gradient_norm": norm(back_skip),
        "branch_gradient_norm": norm(back_branch),
        "gradient_cosine": (back_skip * back_branch).sum().item() / norm(back_skip) / norm(back_branch),
    }


@pytest.mark.parametrize("name", CASES)
def test_what_is_measured_is_what_is_added(name: str) -> None:
    torch.manual_seed(1)
    model, inputs = Model(*CASES[name]), torch.randn(4, SIZE, dtype=torch.float64)
    skip, branch = model.sides(model, model.stem(inputs))
    torch.testing.assert_close(model.write(model, model.stem(inputs)), skip + branch)
    sites = gradflow.inspect(model, (inputs,), loss).residuals
    (row,) = sites[sites.parent.isna()].itertuples()
    for column, value in expected(model, inputs).items():
        assert close(getattr(row, column), value, 1e-9), (column, getattr(row, column), value)


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_without_the_branch_is_the_skip_as_it_was_added(name: str) -> None:
    torch.manual_seed(1)
    model, inputs = Model(*CASES[name]), torch.randn(4, SIZE, dtype=torch.float64)
    skip, branch = model.sides(model, model.stem(inputs))
    change = loss(model.head(skip), inputs) - loss(model.head(skip + branch), inputs)
    (ablated,) = gradflow.inspect(model, (inputs,), loss, ablate="each").ablation.itertuples()
    assert close(ablated.loss_change, change.item(), 1e-9)


def test_a_fused_sum_costs_no_copy_of_the_stream() -> None:
    """A product that the op makes by itself is measured and let go: a block leaves what it leaves unwatched."""
    held: list[int] = []

    class Watched(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(4):
                x = torch.addcmul(x, self.gamma, self.f(x))
                held.append(sum(type(t) is Tensor and t.shape == x.shape for t in gc.get_objects()))
            return self.head(x)

    model, inputs = Watched(*CASES["addcmul"]), torch.randn(64, SIZE, dtype=torch.float64)
    gradflow.inspect(model, (inputs,), loss)
    watched, held[:] = [b - a for a, b in pairwise(held)], []
    model(inputs)
    assert watched == [b - a for a, b in pairwise(held)]
