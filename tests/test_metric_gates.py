"""A gate fails for a change that is beyond its limit and beyond noise, and for nothing else."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean, stdev

import pytest

from gradflow.errors import UsageError
from gradflow.metric_gates import METRICS, difference, gate, gate_finding, gate_sentence, measure
from gradflow.trace_model import SeedMeasure, Trace
from tests.traces import make_trace, make_trunk


def seeded(gains: Sequence[float]) -> Trace:
    seeds = tuple(
        SeedMeasure(seed=at, gain=gain, signal_gain=gain, largest_drop=1 / gain if gain else math.inf)
        for at, gain in enumerate(gains)
    )
    return Trace(
        run=make_trace().run,
        layers=(),
        parameters=(),
        trunk=make_trunk([gains[0], 1.0]),
        seeds=seeds if len(seeds) > 1 else (),
    )


STEADY = [0.50, 0.51, 0.49, 0.50, 0.50]


@pytest.mark.parametrize(
    ("now", "before", "verdict"),
    [
        (STEADY, STEADY, "no difference"),
        ([0.30, 0.31, 0.29, 0.30, 0.30], STEADY, "regressed"),
        ([0.48, 0.481, 0.479, 0.48, 0.48], [0.5, 0.501, 0.499, 0.5, 0.5], "within the limit"),
        ([0.70, 0.71, 0.69, 0.70, 0.70], STEADY, "improved"),
        ([0.1, 0.9, 0.3, 0.8, 0.2], STEADY, "no difference"),
        ([3.0, 3.1, 2.9, 3.0, 3.0], [2.0, 2.1, 1.9, 2.0, 2.0], "regressed"),
        ([2.0, 2.1, 1.9, 2.0, 2.0], STEADY, "no difference"),
        ([0.0, 0.0, 0.0], STEADY, "regressed"),
        ([math.nan] * 3, STEADY, "not measured"),
        ([0.3, 0.3, 0.3], [0.5, 0.5, 0.5], "regressed"),
        ([0.3, 0.31, 0.29], [0.5], "regressed"),
        ([0.3, 0.7, 0.4], [0.5], "no difference"),
    ],
)
def test_verdicts(now: list[float], before: list[float], verdict: str) -> None:
    (result,) = gate((("J", 0.1),), seeded(now), seeded(before))
    assert result.verdict == verdict
    assert result.fails is (verdict in ("regressed", "not measured"))
    assert "J" in gate_sentence(result)


def test_the_change_is_how_much_further_from_one() -> None:
    (result,) = gate((("J", 0.1),), seeded([0.25] * 3), seeded([0.5] * 3))
    assert (result.change, result.low, result.high) == pytest.approx((1.0, 1.0, 1.0))
    assert (result.now, result.before, result.seeds) == (pytest.approx(0.25), pytest.approx(0.5), (3, 3))
    (drop,) = gate((("drop", 0.1),), seeded([0.25] * 3), seeded([0.5] * 3))
    assert drop.change == pytest.approx(1.0)


def test_the_interval_is_welchs() -> None:
    now, before = [1.0, 2.0, 4.0], [0.0, 0.5, 0.2, 0.1]
    change, margin = difference(now, before)
    # scipy.stats.ttest_ind(now, before, equal_var=False) has 2.06 degrees of freedom; 4.303 is t of 2.
    error = math.sqrt(stdev(now) ** 2 / 3 + stdev(before) ** 2 / 4)
    assert (change, margin) == pytest.approx((fmean(now) - fmean(before), 4.303 * error))


def test_noise_alone_fails_at_most_as_often_as_the_interval_says() -> None:
    draw = random.Random(0)
    runs = 2000
    failed = sum(
        gate(
            (("J", 0.01),),
            seeded([math.exp(draw.gauss(-3, 0.5)) for _ in range(5)]),
            seeded([math.exp(draw.gauss(-3, 0.5)) for _ in range(5)]),
        )[0].fails
        for _ in range(runs)
    )
    assert 0 < failed / runs < 0.03, "2.5% of the differences lie above a 95% interval"


def test_a_real_change_is_found() -> None:
    draw = random.Random(1)
    found = sum(
        gate(
            (("J", 0.1),),
            seeded([math.exp(draw.gauss(-5, 0.5)) for _ in range(5)]),
            seeded([math.exp(draw.gauss(-3, 0.5)) for _ in range(5)]),
        )[0].fails
        for _ in range(200)
    )
    assert found > 190


def test_too_few_seeds_and_a_reference_without_the_number() -> None:
    with pytest.raises(UsageError, match="2 is too few: give --seeds 5"):
        gate((("J", 0.1),), seeded([0.5, 0.5]), seeded(STEADY))
    with pytest.raises(UsageError, match=r"old.json has no J to compare with"):
        gate((("J", 0.1),), seeded(STEADY), seeded([math.nan] * 3), name="old.json")


def test_a_failed_gate_is_an_error_on_the_trunk() -> None:
    now = seeded([0.3] * 3)
    (result,) = gate((("J", 0.1),), now, seeded(STEADY))
    finding = gate_finding(result, now)
    assert (finding.rule, finding.severity, str(finding.location)) == ("GATE", "error", "layers.0–layers.1")
    assert finding.message.startswith(
        "J is further from 1 than it may be: J 0.3 against 0.5 in the reference"
    )
    assert "limit +10%" in finding.message
    assert set(METRICS) == {"J", "signal", "drop"}


def test_one_seed_is_measured_from_its_trunk() -> None:
    assert measure(make_trace(trunk=make_trunk([0.25, 1.0])), 7) == SeedMeasure(
        seed=7, gain=0.25, signal_gain=1.0, largest_drop=4.0
    )
