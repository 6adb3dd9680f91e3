"""Every statistic of a row against float64 arithmetic by its definition, on small and on large tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from witness import layer_row, missing, norm, parameter_row, per_sample_norm, statistics

import gradflow

EXACT = ("activation_mean", "activation_std", "activation_rms", "activation_absmax", "activation_nonfinite")
SAMPLED = ("activation_zero_fraction", "signal", "common_mode")
LARGE = 1_000_000


def mlp() -> tuple[nn.Module, Tensor]:
    """A different mean and scale in every unit."""
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(-2, 2, 30))
        model[0].weight.mul_(torch.logspace(-1, 1, 30)[:, None])
    return model, torch.randn(16, 20)


def wide_mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(64, 16_400), nn.ReLU(), nn.Linear(16_400, 4)), torch.randn(64, 64)


def convolution() -> tuple[nn.Module, Tensor]:
    """Channels that are off for most positions beside channels that are on."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 1, 1))
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(-1, 1, 64))
    return model, torch.randn(16, 3, 32, 32)


def channels_last() -> tuple[nn.Module, Tensor]:
    """The same numbers, stored with the channels innermost."""
    model, x = convolution()
    return model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


def tokens() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(32, 1024), nn.ReLU(), nn.Linear(1024, 8))
    return model, torch.randn(8, 128, 32) + torch.linspace(-1, 1, 128)[:, None]


MODELS = {
    "small": mlp,
    "wide": wide_mlp,
    "convolution": convolution,
    "channels last": channels_last,
    "tokens": tokens,
}


def loss(outputs: Tensor, _inputs: Any) -> Tensor:
    return outputs.square().mean()


def by_hand(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and their gradients in float64, without hooks."""
    wide = nn.ModuleList(model).double()
    outputs: dict[str, Tensor] = {}
    h = x.double()
    for index, layer in enumerate(wide):
        h = layer(h)
        outputs[str(index)] = h
    gradients = torch.autograd.grad(loss(h, None), list(outputs.values()), retain_graph=True)
    loss(h, None).backward()
    return outputs, dict(zip(outputs, gradients, strict=True))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_layer_statistics(build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    torch.manual_seed(0)
    model, x = build()
    report = gradflow.inspect(model, (x,), loss)
    outputs, gradients = by_hand(model, x)
    for name, output in outputs.items():
        row = layer_row(report, name)
        check_statistics(row, output)
        expected = per_sample_norm(gradients[name], len(x))
        assert row.gradient_norm == pytest.approx(expected, rel=1e-5)
        assert row.gradient_nonfinite == 0


def check_statistics(row: Any, output: Tensor) -> None:
    """Exact columns to 1e-5; those of a strided sample to five of the standard errors it states."""
    expected = statistics(output)
    scale = expected["activation_rms"]
    for column in EXACT:
        assert row[column] == pytest.approx(expected[column], rel=1e-5, abs=1e-6 * scale), column
    size = output.numel()
    if size < LARGE:
        assert row["sample"] == size
        for column in SAMPLED:
            assert row[column] == pytest.approx(expected[column], rel=1e-5), column
        return
    assert 1_000 < row["sample"] < size
    for column in SAMPLED:
        share = expected[column] if column != "signal" else 0.5
        unit = 1.0 if column != "signal" else expected["signal"]
        error = unit * math.sqrt(share * (1 - share) / row["sample"])
        assert row[column] == pytest.approx(expected[column], abs=5 * error + 1e-9), column


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_parameter_statistics(build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    torch.manual_seed(0)
    model, x = build()
    report = gradflow.inspect(model, (x,), loss)
    by_hand(model, x)  # leaves float64 gradients on the parameters
    for name, parameter in model.named_parameters():
        row, value, gradient = parameter_row(report, name), norm(parameter), norm(parameter.grad)
        assert row["norm"] == pytest.approx(value, rel=1e-5)
        assert row.gradient_norm == pytest.approx(gradient, rel=1e-5)
        assert row.elasticity == pytest.approx(value * gradient, rel=1e-5)
        assert row.gradient_ratio == pytest.approx(gradient / value, rel=1e-5)
        assert (row.gradient_nonfinite, row.value_nonfinite) == (0, 0)


class Poisoned(nn.Module):
    """Writes some NaN and Inf into its input."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[0, :3] = math.nan
        x[1, :2] = math.inf
        return x


@pytest.mark.parametrize("width", [16, 65_536], ids=["small", "large"])
def test_non_finite_values_are_counted_exactly(width: int) -> None:
    model = nn.Sequential(nn.Linear(4, width), Poisoned())
    report = gradflow.inspect(model, (torch.randn(16, 4),), lambda outputs, inputs: outputs[2:].sum())
    assert layer_row(report, "0").activation_nonfinite == 0
    assert layer_row(report, "1").activation_nonfinite == 5
    assert not math.isfinite(layer_row(report, "1").activation_absmax)
    assert layer_row(report, "0").gradient_nonfinite == 0


@pytest.mark.parametrize("width", [16, 65_536], ids=["small", "large"])
def test_non_finite_gradients_are_counted_exactly(width: int) -> None:
    """d sqrt(h) / dh is infinite at 0."""
    model = nn.Sequential(nn.Linear(4, width), nn.Flatten())
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
        model[0].bias[:7] = 0.0
    report = gradflow.inspect(model, (torch.randn(16, 4),), lambda outputs, inputs: outputs.sqrt().sum())
    assert layer_row(report, "1").gradient_nonfinite == 7 * 16
    assert layer_row(report, "0").gradient_nonfinite == 7 * 16
    assert parameter_row(report, "0.bias").gradient_nonfinite == 7
    assert parameter_row(report, "0.weight").gradient_nonfinite == 7 * 4


def test_values_whose_squares_overflow_are_still_finite() -> None:
    model = nn.Linear(4, 8, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e25)
    x = torch.ones(16, 4)
    report = gradflow.inspect(model, (x,), lambda outputs, inputs: (outputs * 1e-30).sum())
    row = layer_row(report, "")
    assert row.activation_nonfinite == 0
    assert row.activation_rms == pytest.approx(4e25, rel=1e-5)
    assert parameter_row(report, "weight")["norm"] == pytest.approx(1e25 * math.sqrt(32), rel=1e-5)


def test_signal_of_nearly_equal_samples_is_not_lost_to_rounding() -> None:
    """A signal of 1e-5 on a common mode of 1: the difference of two moments would give noise."""
    torch.manual_seed(0)
    model = nn.Linear(8, 64)
    with torch.no_grad():
        model.weight.mul_(1e-5)
        model.bias.fill_(1.0)
    x = torch.randn(32, 8)
    report = gradflow.inspect(model, (x,))
    expected = statistics(model(x))
    assert layer_row(report, "").signal == pytest.approx(expected["signal"], rel=1e-2)
    assert layer_row(report, "").common_mode == pytest.approx(1.0, abs=1e-6)


def test_zero_parameter_has_no_gradient_ratio() -> None:
    model = nn.Linear(8, 4)
    nn.init.zeros_(model.weight)
    report = gradflow.inspect(model, (torch.randn(16, 8),), lambda outputs, inputs: outputs.sum())
    row = parameter_row(report, "weight")
    assert row["norm"] == 0.0
    assert row.elasticity == 0.0
    assert missing(row.gradient_ratio)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("copies", [1, 4])
def test_gain_moves_with_neither_the_loss_scale_nor_the_batch(scale: float, copies: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(part for _ in range(8) for part in (nn.Linear(32, 32), nn.Tanh())), nn.Linear(32, 5)
    )
    x, labels = torch.randn(64, 32), torch.randint(0, 5, (64,))
    plain = gradflow.inspect(model, (x,), lambda outputs, _: F.cross_entropy(outputs, labels))
    many, again = x.repeat(copies, 1), labels.repeat(copies)
    scaled = gradflow.inspect(model, (many,), lambda outputs, _: scale * F.cross_entropy(outputs, again))
    assert scaled.profile.gain == pytest.approx(plain.profile.gain, rel=1e-4)
    assert scaled.profile.slope == pytest.approx(plain.profile.slope, rel=1e-4)
    assert scaled.profile.signal_gain == pytest.approx(plain.profile.signal_gain, rel=1e-4)


def test_median_over_steps() -> None:
    """With dropout and a fixed batch, three steps give the middle of three seeds."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 4)), torch.randn(8, 16)
    single = [
        layer_row(gradflow.inspect(model, (x,), loss, seed=seed), "0").gradient_norm for seed in (5, 6, 7)
    ]
    together = gradflow.inspect(model, (x,), loss, seed=5, steps=3)
    assert len(set(single)) == 3
    assert layer_row(together, "0").gradient_norm == sorted(single)[1]
