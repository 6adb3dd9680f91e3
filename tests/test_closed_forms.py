"""Closed forms that mean-field theory gives for random networks, measured through ``gradflow.inspect``.

Row numbers are those of the table of expected values of the theory behind the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from witness import layer_row

import gradflow


def cotangent(*shape: int) -> Callable[[Tensor, Any], Tensor]:
    """A loss whose gradient at the outputs is one fixed N(0, 1) draw."""
    direction = torch.randn(*shape, generator=torch.Generator().manual_seed(99))
    return lambda outputs, _inputs: (outputs * direction).sum()


def stack(
    width: int, depth: int, activation: type[nn.Module], std: float, bias: float = 0.0
) -> nn.Sequential:
    """Linear layers of weight standard deviation ``std / sqrt(width)``, each with its activation."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        nn.init.normal_(linear.weight, std=std / math.sqrt(width))
        nn.init.normal_(linear.bias, std=bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers)


def layer_gain(report: gradflow.Report, first: str, last: str, steps: int) -> float:
    """The gain of one layer going back, as the geometric mean between two of them."""
    ratio = layer_row(report, first).gradient_norm / layer_row(report, last).gradient_norm
    return float(ratio ** (1 / steps))


def mean_field_gain(model: nn.Sequential, *, first: int, last: int, width: int = 512) -> float:
    """Gain of one layer between two linear layers of a stack of (linear, activation) pairs."""
    report = gradflow.inspect(model, (torch.randn(256, width),), cotangent(256, width))
    return layer_gain(report, str(2 * first), str(2 * last), last - first)


# Row 1
def test_linear_chain_is_the_product_of_its_matrices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))
    direction = torch.randn(16, 32)
    report = gradflow.inspect(
        model, (torch.randn(16, 32),), lambda outputs, inputs: (outputs * direction).sum()
    )
    back = direction.double()
    for layer in reversed(range(8)):
        expected = back.square().sum(1).mean().sqrt().item()
        assert layer_row(report, str(layer)).gradient_norm == pytest.approx(expected, rel=1e-5)
        back = back @ model[layer].weight.detach().double()


def test_orthogonal_chain_keeps_the_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    report = gradflow.inspect(model, (torch.randn(32, 64),), cotangent(32, 64))
    assert report.profile.gain == pytest.approx(1, rel=1e-5)
    assert report.profile.slope == pytest.approx(0, abs=1e-5)
    assert report.profile.largest_drop == pytest.approx(1, rel=1e-5)


# Row 2
class ScaledReLU(nn.Module):
    """relu(s W x) with W fixed: <s, dL/ds> = <W, dL/dW>, and for a scalar that is its elasticity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("weight", torch.randn(width, width) * math.sqrt(2 / width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.scale * (x @ self.weight.T))


def test_euler_elasticity_is_the_same_in_every_layer_without_biases() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(ScaledReLU(128) for _ in range(12)))
    x = torch.randn(64, 128)
    loss = cotangent(64, 128)
    report = gradflow.inspect(model, (x,), loss)
    expected = abs(loss(model(x), (x,)).item())  # <h_L, d_L> at the last layer
    assert report.parameters.elasticity.tolist() == pytest.approx([expected] * 12, rel=1e-4)


# Row 3
class Start(nn.Module):
    """Hands its input on with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.one


class HeChain(nn.Module):
    """One draw of ``depth`` He-initialised ReLU layers, in one module; the weights are not kept."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.start = Start()
        self.end = nn.Identity()
        self.width, self.depth = width, depth

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for _ in range(self.depth):
            x = F.relu(x @ (torch.randn(self.width, self.width) * math.sqrt(2 / self.width)))
        return self.end(x)


class Draws(nn.Module):
    """A thousand networks in one, so that one inspection is a thousand draws."""

    def __init__(self, draws: int, width: int, depth: int) -> None:
        super().__init__()
        self.chains = nn.ModuleList(HeChain(width, depth) for _ in range(draws))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([chain(x) for chain in self.chains])


def he_layer_moments(width: int) -> tuple[float, float]:
    """Mean and variance of ln(|h_l|^2 / |h_l-1|^2) in a He ReLU layer of finite width.

    The ratio is (2 / n) chi^2_K with K ~ Binomial(n, 1/2) active units; to first order in 1 / n this is
    (-5 / 2n, 5 / n), Hanin and Nica's.
    """
    active = torch.arange(1, width + 1, dtype=torch.float64)
    count = torch.tensor(float(width), dtype=torch.float64)
    chance = (
        torch.lgamma(count + 1)
        - torch.lgamma(active + 1)
        - torch.lgamma(count - active + 1)
        - count * math.log(2)
    ).exp()
    logs = torch.digamma(active / 2) + math.log(4 / width)
    mean = (chance * logs).sum()
    spread = (chance * (torch.polygamma(1, active / 2) + (logs - mean).square())).sum()
    return mean.item(), spread.item()


def test_he_relu_has_the_lognormal_spread_of_hanin_and_nica() -> None:
    width, depth, draws = 64, 12, 1000
    mean, spread = he_layer_moments(width)
    assert (mean, spread) == pytest.approx((-5 / (2 * width), 5 / width), rel=0.1)
    torch.manual_seed(0)
    x = torch.randn(1, width)
    report = gradflow.inspect(Draws(draws, width, depth), (x,), cotangent(draws, width))
    layers = report.layers.set_index("name")
    starts = layers.loc[[f"chains.{draw}.start" for draw in range(draws)]]
    ends = layers.loc[[f"chains.{draw}.end" for draw in range(draws)]]
    for column, first, last in (
        ("activation_rms", starts, ends),
        ("gradient_norm", ends, starts),
    ):
        logs = 2 * np.log(last[column].to_numpy(float) / first[column].to_numpy(float))
        assert logs.mean() == pytest.approx(depth * mean, rel=0.1), column
        assert logs.var() == pytest.approx(depth * spread, rel=0.1), column
    assert np.exp(logs).mean() == pytest.approx(1, rel=0.1)


# Row 4
def test_xavier_relu_loses_a_factor_of_root_two_a_layer() -> None:
    torch.manual_seed(0)
    gain = mean_field_gain(stack(512, 20, nn.ReLU, 1.0), first=0, last=19)
    assert gain == pytest.approx(1 / math.sqrt(2), rel=0.02)


def test_default_linear_and_relu_keep_0_408_a_layer() -> None:
    torch.manual_seed(0)
    layers = [part for _ in range(20) for part in (nn.Linear(512, 512), nn.ReLU())]
    gain = mean_field_gain(nn.Sequential(*layers), first=0, last=19)
    assert gain == pytest.approx(1 / math.sqrt(6), rel=0.02)


# Row 5
@pytest.mark.parametrize(("std", "expected"), [(1.0, 0.2361), (2.0, 0.4142), (4.0, 0.6316)])
def test_sigmoid_settles_at_its_fixed_point(std: float, expected: float) -> None:
    torch.manual_seed(0)
    gain = mean_field_gain(stack(512, 12, nn.Sigmoid, std), first=4, last=11)
    assert gain == pytest.approx(expected, rel=0.03)
    assert gain < std / 4


# Row 6
@pytest.mark.parametrize(
    ("weight_variance", "bias_variance", "expected"),
    [(0.64, 0.0, 0.800), (1.76, 0.05, 0.9999), (2.25, 0.0, 1.0674), (9.0, 0.0, 1.3638)],
)
def test_tanh_gain_is_root_chi(weight_variance: float, bias_variance: float, expected: float) -> None:
    torch.manual_seed(0)
    model = stack(512, 20, nn.Tanh, math.sqrt(weight_variance), math.sqrt(bias_variance))
    assert mean_field_gain(model, first=6, last=19) == pytest.approx(expected, rel=0.03)


# Rows 8 and 9
def batch_normed(width: int, depth: int, activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        nn.init.kaiming_normal_(linear.weight)
        layers += [linear, nn.BatchNorm1d(width), activation()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [(nn.ReLU, math.sqrt(math.pi / (math.pi - 1))), (nn.Identity, 1.0)],
    ids=["ReLU", "linear"],
)
def test_batch_norm_grows_the_gradient_only_behind_a_relu(activation: Any, expected: float) -> None:
    torch.manual_seed(0)
    width, depth = 1024, 12
    report = gradflow.inspect(
        batch_normed(width, depth, activation), (torch.randn(256, width),), cotangent(256, width)
    )
    first, last = 2, depth - 2
    gain = layer_gain(report, str(3 * first), str(3 * last), last - first)
    assert gain == pytest.approx(expected, rel=0.02)


# Row 10
class Unnormalised(nn.Module):
    """x + W2 relu(W1 x), or x + W2 relu(W1 relu(x)), and a row for the stream."""

    def __init__(self, width: int, *, rectified: bool, last_std: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        nn.init.normal_(self.first.weight, std=math.sqrt(2 / width))
        nn.init.normal_(self.second.weight, std=last_std / math.sqrt(width))
        self.rectified = rectified
        self.stream = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(x) if self.rectified else x
        return self.stream(x + self.second(F.relu(self.first(branch))))


@pytest.mark.parametrize(
    ("rectified", "last_std", "expected"),
    [(True, math.sqrt(2), 2.0), (False, math.sqrt(2), 3.0), (False, 1.0, 2.0)],
)
def test_unnormalised_stream_grows_by_its_variance_ratio(
    rectified: bool, last_std: float, expected: float
) -> None:
    torch.manual_seed(0)
    width, depth = 512, 8
    model = nn.Sequential(
        *(Unnormalised(width, rectified=rectified, last_std=last_std) for _ in range(depth))
    )
    report = gradflow.inspect(model, (torch.randn(256, width),), cotangent(256, width))
    powers = [layer_row(report, f"{block}.stream").activation_rms ** 2 for block in range(depth)]
    ratio = (powers[-1] / powers[0]) ** (1 / (depth - 1))
    assert ratio == pytest.approx(expected, rel=0.05)


# Row 16
@pytest.mark.parametrize("samples", [3, 16])
def test_batch_norm_takes_two_degrees_of_freedom_from_the_gradient(samples: int) -> None:
    torch.manual_seed(0)
    width = 8192
    x = torch.randn(samples, width)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    model = nn.Sequential(Start(), nn.BatchNorm1d(width, eps=1e-12))
    report = gradflow.inspect(model, (x,), cotangent(samples, width))
    energy = (layer_row(report, "0").gradient_norm / layer_row(report, "1").gradient_norm) ** 2
    assert energy == pytest.approx((samples - 2) / samples, rel=0.02)


def test_layer_norm_takes_two_degrees_of_freedom_from_the_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 16)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    model = nn.Sequential(Start(), nn.LayerNorm(16, eps=1e-12))
    report = gradflow.inspect(model, (x,), cotangent(4096, 16))
    energy = (layer_row(report, "0").gradient_norm / layer_row(report, "1").gradient_norm) ** 2
    assert energy == pytest.approx(14 / 16, rel=0.02)


# Row 19
def test_cross_entropy_at_zero_logits() -> None:
    torch.manual_seed(0)
    head = nn.Linear(20, 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    labels = torch.randint(0, 10, (64,))
    report = gradflow.inspect(
        nn.Sequential(nn.Linear(20, 20), head),
        (torch.randn(64, 20),),
        lambda outputs, _inputs: F.cross_entropy(outputs, labels, reduction="sum"),
    )
    assert layer_row(report, "1").gradient_norm == pytest.approx(math.sqrt(0.9), rel=1e-6)
    assert report.trace.run.loss_values == pytest.approx((64 * math.log(10),), rel=1e-6)


# Row 24
def test_global_average_pool_divides_the_gradient_by_the_root_of_its_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5, bias=False)
    )
    report = gradflow.inspect(model, (torch.randn(16, 3, 14, 14),), cotangent(16, 5))
    gain = layer_row(report, "0").gradient_norm / layer_row(report, "1").gradient_norm
    assert gain == pytest.approx(1 / math.sqrt(196), rel=1e-5)
