"""The trunk's summary against closed forms."""

from __future__ import annotations

import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import make_trunk

from gradflow.trace_model import Trunk
from gradflow.trunk_profile import SLOPE_POINTS, profile, theil_sen

NAN = math.nan


def same(left: float, right: float) -> bool:
    return (math.isnan(left) and math.isnan(right)) or left == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("gain", [0.236, 0.5, 1.0, 1.2112, 4.0])
@pytest.mark.parametrize("points", [2, 3, 10, 51])
def test_a_constant_gain_per_layer_is_found_exactly(gain: float, points: int) -> None:
    steps = points - 1
    result = profile(make_trunk([gain ** (steps - k) for k in range(steps + 1)]))
    assert result.gain == pytest.approx(gain**steps)
    assert math.exp(result.slope) == pytest.approx(gain)
    assert result.largest_drop == pytest.approx(1 / gain)
    assert result.gains[-1] == 1.0
    assert len(result.gains) == steps + 1


@pytest.mark.parametrize(
    ("gradients", "gain", "drop", "at"),
    [
        ([], NAN, NAN, ""),
        ([1.0], NAN, NAN, ""),
        ([None, 2.0], NAN, NAN, ""),
        ([0.0, 0.0], NAN, NAN, ""),
        ([1.0, 4.0], 0.25, 4.0, "layers.0–layers.1"),
        ([1.0, 2.0, 20.0, 30.0], 1 / 30, 10.0, "layers.1–layers.2"),
        ([None, 1.0, None, 4.0], 0.25, 4.0, "layers.1–layers.3"),  # stepped over
        ([0.0, 0.0, 3.0, 6.0], 0.0, math.inf, "layers.1–layers.2"),  # exactly zero: dies here
        ([2.0, 0.0], math.inf, 0.0, "layers.0–layers.1"),
        ([math.inf, 2.0, 4.0], math.inf, 2.0, "layers.1–layers.2"),
        ([math.nan, 2.0, 4.0], NAN, 2.0, "layers.1–layers.2"),
        ([2.0, math.nan, 4.0], 0.5, 2.0, "layers.0–layers.2"),
        ([2.0, 4.0, math.inf], NAN, 2.0, "layers.0–layers.1"),
    ],
)
def test_zero_missing_and_nonfinite_gradients(
    gradients: list[float | None], gain: float, drop: float, at: str
) -> None:
    result = profile(make_trunk(gradients))
    assert same(result.gain, gain)
    assert same(result.largest_drop, drop)
    assert result.largest_drop_at == at
    assert len(result.gains) == len(gradients)


def test_what_was_not_measured_is_nan_among_the_gains() -> None:
    gains = profile(make_trunk([1.0, None, 4.0])).gains
    assert gains[0] == 0.25
    assert math.isnan(gains[1])


def test_the_slope_counts_the_layers_that_were_stepped_over() -> None:
    assert math.exp(profile(make_trunk([1.0, None, None, 8.0])).slope) == pytest.approx(0.5)


def test_one_collapsed_layer_does_not_move_the_slope() -> None:
    gradients = [0.5 ** (10 - k) for k in range(11)]
    gradients[0] = 1e-30
    assert math.exp(profile(make_trunk(gradients)).slope) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("signals", "expected"),
    [([2.0, 1.0, 0.5], 0.25), ([None, 2.0, 1.0], 0.5), ([None, None, 1.0], NAN), ([0.0, 1.0, 1.0], math.inf)],
)
def test_the_signal_gain(signals: list[float | None], expected: float) -> None:
    assert same(profile(make_trunk([1.0, 1.0, 1.0], signals=signals)).signal_gain, expected)


def test_tensors_of_one_module_are_told_apart() -> None:
    trunk = make_trunk([1.0, 1.0, 50.0], names=["", "", ""])
    assert profile(trunk).largest_drop_at == "#1–#2"


def test_an_empty_trunk_has_no_number() -> None:
    result = profile(Trunk(kind="none"))
    assert all(math.isnan(x) for x in (result.gain, result.slope, result.largest_drop, result.signal_gain))
    assert result.gains == ()


@given(
    st.lists(st.floats(1e-20, 1e20), min_size=2, max_size=12),
    st.sampled_from([2.0**-40, 2.0**20]),
)
def test_the_loss_scale_cancels(gradients: list[float], scale: float) -> None:
    plain, scaled = profile(make_trunk(gradients)), profile(make_trunk([g * scale for g in gradients]))
    assert scaled.gain == plain.gain
    assert scaled.largest_drop_at == plain.largest_drop_at
    assert scaled.slope == pytest.approx(plain.slope, abs=1e-9)


def test_a_long_trunk_is_thinned_evenly_and_stays_cheap() -> None:
    line = [(k, 0.25 * k - 3.0 + 0.01 * math.sin(k)) for k in range(20 * SLOPE_POINTS)]
    started = time.perf_counter()
    assert theil_sen(line) == pytest.approx(0.25, abs=1e-4)
    assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize("layers", [250, 1_000, 5_000])
def test_thinning_costs_the_slope_no_digit_that_a_verdict_needs(layers: int) -> None:
    """The slope of a noisy line, over seeds: its standard deviation is the one that ``SLOPE_POINTS`` states."""
    noise, seeds = 0.3, 30
    stated = noise * math.sqrt(12 / SLOPE_POINTS) / layers
    errors = []
    for seed in range(seeds):
        draw = random.Random(seed)
        line = [(k, -0.05 * k + draw.gauss(0, noise)) for k in range(layers)]
        errors.append(theil_sen(line) + 0.05)
    assert 0.5 * stated < math.sqrt(sum(error**2 for error in errors) / seeds) < 1.5 * stated
