"""The numbers of residual sites: equal to explicit autograd, and to what theory expects of random networks.

Row numbers are those of the table of expected values of the theory behind the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow
from tests.witness import close, missing, norm

Sites = list[tuple[Tensor, Tensor, Tensor, Tensor]]
"""Source, skip, branch and sum of each site, in order."""
Plain = Callable[["Two", Tensor, Sites], Tensor]


def total(source: Tensor, skip: Tensor, branch: Tensor, sites: Sites) -> Tensor:
    """The add, plainly, with its operands noted and the gradients kept."""
    out = skip + branch
    source.retain_grad()
    out.retain_grad()
    sites.append((source, skip, branch, out))
    return out


class Two(nn.Module):
    """A stem, two linear maps and whatever is written with them; float64."""

    def __init__(self, write: Callable[[Two, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm, self.gamma = nn.LayerNorm(6), nn.Parameter(torch.rand(6))
        self.write = write
        self.double()

    def f(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self, self.stem(x))


def in_place(m: Two, x: Tensor) -> Tensor:
    out = m.f(x)
    out += x
    return out.relu_()


def functional(m: Two, x: Tensor) -> Tensor:
    return torch.add(F.linear(F.gelu(F.linear(x, m.one.weight)), m.two.weight), x)


def nested(m: Two, x: Tensor) -> Tensor:
    inner = m.norm(x)
    inner = inner + m.f(inner)
    return x + m.f(inner)


def scaled(m: Two, x: Tensor) -> Tensor:
    return 0.7 * x + m.gamma * m.f(x)


def of_parts(m: Two, x: Tensor) -> Tensor:
    half = x.view(2, 2, 6).contiguous().permute(1, 0, 2)
    return half + m.f(half)


def parallel(m: Two, x: Tensor) -> Tensor:
    return (x + m.f(x)) + m.norm(x)


WRITTEN: dict[str, tuple[Callable[[Two, Tensor], Tensor], Plain]] = {
    "in place": (in_place, lambda m, x, s: torch.relu(total(x, x, m.f(x), s))),
    "functional": (
        functional,
        lambda m, x, s: total(x, x, F.gelu(x @ m.one.weight.t()) @ m.two.weight.t(), s),
    ),
    "nested": (
        nested,
        lambda m, x, s: (lambda y: total(x, x, m.f(total(y, y, m.f(y), s)), s))(m.norm(x)),
    ),
    "scaled": (scaled, lambda m, x, s: total(x, 0.7 * x, m.gamma * m.f(x), s)),
    "tokens": (
        of_parts,
        lambda m, x, s: (lambda y: total(y, y, m.f(y), s))(x.view(2, 2, 6).permute(1, 0, 2).clone()),
    ),
    "parallel": (parallel, lambda m, x, s: total(x, x, m.f(x) + m.norm(x), s)),
}


def sites_of(model: nn.Module, inputs: Any, loss: Any = None) -> pd.DataFrame:
    return gradflow.inspect(model, inputs, loss).residuals


def square(outputs: Tensor, _inputs: Any) -> Tensor:
    return outputs.square().sum()


@pytest.mark.parametrize("name", WRITTEN)
def test_numbers_are_those_of_explicit_autograd(name: str) -> None:
    write, plain = WRITTEN[name]
    torch.manual_seed(3)
    model, inputs = Two(write), torch.randn(4, 6, dtype=torch.float64)
    measured = sites_of(model, (inputs,), square)
    seen: Sites = []
    square(plain(model, model.stem(inputs), seen), None).backward()
    assert len(measured) == len(seen)
    for row, (source, skip, branch, out) in zip(measured.itertuples(), seen, strict=True):
        inner = (skip * branch).sum().item()
        vectors = [t.reshape(-1, 6).detach() for t in (skip, out)]
        expected = {
            "skip_norm": norm(skip),
            "branch_norm": norm(branch),
            "rho": norm(branch) / norm(skip),
            "cosine": inner / norm(skip) / norm(branch),
            "block_influence": (1 - torch.cosine_similarity(*vectors, dim=1)).mean().item(),
            "gradient_norm": norm(out.grad),
            "source_gradient_norm": norm(source.grad),
            "gradient_ratio": norm(source.grad) / norm(out.grad),
            "std": out.std(correction=0).item(),
            "source_std": source.std(correction=0).item(),
        }
        for column, value in expected.items():
            assert close(getattr(row, column), value, 1e-12), (column, getattr(row, column), value)


def test_a_step_that_never_ran_backward_has_no_gradients_at_its_sites() -> None:
    model = Two(lambda m, x: x + m.f(x)).requires_grad_(False)
    (site,) = sites_of(model, (torch.randn(4, 6, dtype=torch.float64),), square).itertuples()
    assert missing(site.gradient_norm) and missing(site.source_gradient_norm)
    assert site.rho > 0


def test_a_zero_skip_has_an_infinite_rho_and_no_cosine() -> None:
    model = Two(lambda m, x: (lambda y: y + m.f(y))(x * 0.0)).double()
    (site,) = sites_of(model, (torch.randn(4, 6, dtype=torch.float64),), square).itertuples()
    assert site.skip_norm == 0.0 and site.rho == math.inf
    assert missing(site.cosine) and missing(site.block_influence)


def test_with_several_steps_every_number_is_the_median() -> None:
    torch.manual_seed(0)
    model = Two(lambda m, x: F.dropout(x, 0.5) + m.f(x))
    inputs = torch.randn(4, 6, dtype=torch.float64)
    singly = [gradflow.inspect(model, (inputs,), square, seed=seed).residuals.rho[0] for seed in range(3)]
    assert len(set(singly)) == 3
    assert gradflow.inspect(model, (inputs,), square, steps=3).residuals.rho[0] == sorted(singly)[1]


class Branch(nn.Module):
    """x + F(x) with a two-layer branch, of which the weights' standard deviations are given."""

    def __init__(self, width: int, gains: tuple[float, float], *, before: str = "", after: str = "") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if before == "norm" else nn.Identity()
        self.post = nn.LayerNorm(width) if after == "norm" else nn.Identity()
        self.bend = nn.ReLU() if before == "relu" else nn.Identity()
        self.one, self.two = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        for linear, gain in zip((self.one, self.two), gains, strict=True):
            nn.init.normal_(linear.weight, std=gain / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.post(x + self.two(torch.relu(self.one(self.bend(self.norm(x))))))


HE, XAVIER = math.sqrt(2.0), 1.0
WIDTH, BATCH = 512, 256


def stream(blocks: int, *args: Any, width: int = WIDTH, **options: Any) -> pd.DataFrame:
    torch.manual_seed(0)
    model = nn.Sequential(*(Branch(width, *args, **options) for _ in range(blocks)))
    inputs = torch.randn(BATCH, width).requires_grad_()
    direction = torch.randn(BATCH, width)
    return sites_of(model, (inputs,), lambda outputs, _: (outputs * direction).sum())


# Row 10: an un-normalised branch brings the variance it was given.
@pytest.mark.parametrize(
    ("gains", "before", "expected"),
    [((HE, HE), "relu", 2.0), ((HE, HE), "", 3.0), ((HE, XAVIER), "", 2.0)],
    ids=["relu first", "He, He", "He, Xavier"],
)
def test_an_unnormalised_stream_grows_by_its_branch(
    gains: tuple[float, float], before: str, expected: float
) -> None:
    sites = stream(1, gains, before=before)
    growth = (sites["std"] / sites.source_std)[0] ** 2
    assert growth == pytest.approx(expected, rel=0.05)
    # A branch at right angles: the growth is 1 + rho^2 (row 22's geometry).
    assert 1 + sites.rho[0] ** 2 == pytest.approx(growth, rel=0.05)


# Rows 11 and 12: a unit-variance branch behind a norm.
def test_a_pre_norm_stream_grows_by_one_a_block_and_its_branches_fade() -> None:
    sites = stream(24, (HE, XAVIER), before="norm")
    variances = sites["std"] ** 2
    for block in (8, 24):
        assert variances[block - 1] == pytest.approx(1 + block, rel=0.1)
    for block in (0, 3, 8, 23):
        assert sites.rho[block] == pytest.approx(1 / math.sqrt(block + 1), rel=0.1)


def test_two_sublayers_a_block_fade_twice_as_fast() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (Branch(WIDTH, (HE, XAVIER), before="norm") for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    torch.manual_seed(0)
    sites = sites_of(nn.Sequential(*(Block() for _ in range(5))), (torch.randn(BATCH, WIDTH),))
    assert sites.rho[8] == pytest.approx(1 / math.sqrt(2 * 4 + 1), rel=0.1)


@pytest.mark.parametrize("blocks", [8, 32])
def test_a_pre_norm_stream_loses_gradient_as_the_root_of_its_depth(blocks: int) -> None:
    sites = stream(blocks, (HE, XAVIER), before="norm")
    gain = sites.source_gradient_norm[0] / sites.gradient_norm.iloc[-1]
    assert gain == pytest.approx(math.sqrt(blocks + 1), rel=0.08)


# Row 13: D_eff = sum of the branches' shares of the variance = H_{L+1} - 1.
@pytest.mark.parametrize("blocks", [8, 32])
def test_the_effective_depth_of_a_pre_norm_stream_is_harmonic(blocks: int) -> None:
    sites = stream(blocks, (HE, XAVIER), before="norm")
    shares = sites.rho**2 / (1 + sites.rho**2)
    assert shares.sum() == pytest.approx(sum(1 / k for k in range(2, blocks + 2)), rel=0.05)


# Row 14: with the norm after the add, the sublayer as a whole keeps the gradient.
def test_a_post_norm_sublayer_keeps_the_gradient() -> None:
    sites = stream(6, (HE, XAVIER), after="norm")
    between = sites.source_gradient_norm[1:].to_numpy() / sites.source_gradient_norm[:-1].to_numpy()
    assert abs(between - 1.0).max() < 0.05
    # The skip alone divides by sqrt(1 + rho^2), which the norm does to the sum.
    passed = sites.gradient_norm[:-1].to_numpy() / sites.source_gradient_norm[1:].to_numpy()
    expected = 1 / (1 + sites.rho[:-1] ** 2).pow(0.5).to_numpy()
    assert abs(passed / expected - 1.0).max() < 0.05


class ZeroGate(nn.Module):
    """A branch that is exactly zero at first, each in its own way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bn = nn.BatchNorm1d(8) if how == "zero gamma" else nn.Identity()
        self.alpha = nn.Parameter(torch.zeros(())) if how == "ReZero" else None
        if how == "zero gamma":
            nn.init.zeros_(self.bn.weight)
        elif how in ("Fixup", "dead"):
            nn.init.zeros_(self.two.weight)
            nn.init.zeros_(self.two.bias)
        if how == "dead":
            nn.init.constant_(self.one.bias, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        f = self.bn(self.two(torch.relu(self.one(x))))
        return x + (f if self.alpha is None else self.alpha * f)


# Row 15: y == x, and what will move it at the first step.
@pytest.mark.parametrize(
    ("how", "opened_by"),
    [("ReZero", "0.alpha"), ("zero gamma", "0.bn.weight"), ("Fixup", "0.two.weight"), ("dead", "")],
)
def test_a_branch_that_is_zero_at_first_says_what_opens_it(how: str, opened_by: str) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(ZeroGate(how)), torch.randn(16, 8)
    assert torch.equal(model(inputs), inputs)
    (site,) = sites_of(model, (inputs,), square).itertuples()
    assert (site.rho, site.branch_norm, site.block_influence) == (0.0, 0.0, 0.0)
    assert missing(site.cosine)
    assert site.std == site.source_std
    assert site.opened_by == opened_by


# Row 15, the other half: which parameters of the branch get a gradient at all.
@pytest.mark.parametrize(
    ("how", "moved"),
    [
        ("ReZero", {"alpha"}),
        ("zero gamma", {"bn.weight", "bn.bias"}),
        ("Fixup", {"two.weight", "two.bias"}),
        ("dead", {"two.bias"}),
    ],
)
def test_a_branch_that_is_zero_at_first_has_its_own_pattern_of_gradients(how: str, moved: set[str]) -> None:
    torch.manual_seed(0)
    report = gradflow.inspect(nn.Sequential(ZeroGate(how)), torch.randn(16, 8), square)
    rows = report.parameters.set_index("name").gradient_norm
    assert {name.removeprefix("0.") for name in rows.index if rows[name] > 0} == moved
    assert set(rows[[name for name in rows.index if name.removeprefix("0.") not in moved]]) == {0.0}


# Row 22: BI = 1 - 1/sqrt(1 + rho^2) for a branch at right angles to its skip.
@pytest.mark.parametrize("rho", [0.1, 0.5, 1.0, 2.0])
def test_block_influence_of_an_orthogonal_branch(rho: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Branch(2048, (HE, rho * XAVIER)))
    (site,) = sites_of(model, (torch.randn(64, 2048),), square).itertuples()
    assert site.rho == pytest.approx(rho, rel=0.05)
    assert abs(site.cosine) < 0.02
    assert site.block_influence == pytest.approx(1 - 1 / math.sqrt(1 + site.rho**2), rel=0.05)


@pytest.mark.parametrize("factor", [1e-4, 1e-8, 1e-12])
def test_the_influence_of_a_branch_that_is_nearly_nothing_keeps_its_digits(factor: float) -> None:
    """1 - cos computed as it is written has no digit left here; rho^2 / 2 has all of them."""
    torch.manual_seed(0)
    model, inputs = Two(lambda m, x: x + factor * m.f(x)), torch.randn(256, 6, dtype=torch.float64)
    (site,) = sites_of(model, (inputs,), square).itertuples()
    skip = model.stem(inputs).detach()
    branch = factor * model.f(skip).detach()
    along = (skip * branch).sum(1, keepdim=True) / skip.square().sum(1, keepdim=True)
    # To first order 1 - cos(x, x + F) is half the square of the angle, the part of F at right angles to x.
    expected = ((branch - along * skip).square().sum(1) / skip.square().sum(1) / 2).mean().item()
    assert site.block_influence == pytest.approx(expected, rel=1e-3)
