"""Means, intervals and rank correlations of an ablation, against closed forms and scipy."""

from __future__ import annotations

import csv
import io
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from gradflow import trace_file
from gradflow.ablation_profile import agreements, effect, kendall, spearman
from gradflow.reporters import csv_files
from gradflow.student_t import mean_interval, t95
from gradflow.trace_model import Ablation, BranchAblation, Removal, Trace
from tests.screens import make_report
from tests.traces import make_residual, make_trace

LOSSES = (2.0, 2.2, 1.8)


def make_ablation(*branches: BranchAblation, **changes: Any) -> Ablation:
    values: dict[str, Any] = {"order": "each", "measure": "loss", "varied": "batches", "losses": LOSSES}
    return Ablation(**(values | changes), branches=branches)


def branch(order: int = 0, *changes: float, moved: tuple[float, ...] = (0.1,)) -> BranchAblation:
    return BranchAblation(order=order, changes=changes, output_changes=moved)


def test_the_interval_is_students() -> None:
    changes = (0.1, 0.3, 0.2)
    found = effect(branch(0, *changes), make_ablation())
    half = 4.303 * 0.1 / math.sqrt(3)
    assert found.change == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2 - half, 0.2 + half))
    assert found.relative == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "moved", "verdict"),
    [
        ((0.1, 0.11, 0.12), (0.1,), "worse"),
        ((-0.1, -0.11, -0.12), (0.1,), "better"),
        ((-0.1, 0.1, 0.01), (0.1,), "no difference"),
        ((0.0, 0.0, 0.0), (0.1,), "no difference"),
        ((0.0,), (0.0,), "no difference"),
        ((0.1,), (0.1,), ""),
        ((), (0.1,), "changed"),
        ((), (0.0,), "no difference"),
        ((), (), ""),
        ((math.nan, 0.1), (0.1,), ""),
    ],
)
def test_verdicts(changes: tuple[float, ...], moved: tuple[float, ...], verdict: str) -> None:
    assert effect(branch(0, *changes, moved=moved), make_ablation()).verdict == verdict


def test_the_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 5, 30):
        assert t95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4)
    for freedom in (31, 60, 1000):
        assert t95(freedom) >= stats.t.ppf(0.975, freedom)
    assert mean_interval((1.0,)) is None
    assert mean_interval((1.0, math.inf)) is None


@pytest.mark.parametrize("levels", [3, 10, 1000])
def test_rank_correlations_are_scipys(levels: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(levels)
    pairs = [(float(draw.randrange(levels)), float(draw.randrange(levels))) for _ in range(40)]
    left, right = zip(*pairs, strict=True)
    assert spearman(pairs) == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)
    assert kendall(pairs) == pytest.approx(stats.kendalltau(left, right).statistic, abs=1e-12)


def test_no_rank_correlation_where_there_is_no_order() -> None:
    assert spearman([(1.0, 2.0), (2.0, 3.0)]) is None
    assert kendall([(1.0, 2.0)] * 5) is None
    assert spearman([(1.0, float(at)) for at in range(5)]) is None


def ranked_trace() -> Trace:
    rhos = (0.1, 0.4, 0.2, 0.8)
    sites = [make_residual(f"b.{at}", at, rho=rho, branch_gain=None) for at, rho in enumerate(rhos)]
    found = [branch(at, *(rho * loss for loss in LOSSES), moved=(1 / rho,)) for at, rho in enumerate(rhos)]
    removals = (Removal(order=0, changes=(0.1, 0.2, 0.3), output_changes=(0.5,)),)
    ablation = make_ablation(*found, order="greedy", removals=removals)
    return replace(make_trace(residuals=sites), ablation=ablation)


def test_cheap_measures_are_ranked_against_the_ablation() -> None:
    (by_rho, *others) = agreements(ranked_trace())
    assert (by_rho.measure, by_rho.blocks) == ("rho", 4)
    assert (by_rho.spearman, by_rho.kendall) == (pytest.approx(1), pytest.approx(1))
    assert (by_rho.output_spearman, by_rho.output_kendall) == (pytest.approx(-1), pytest.approx(-1))
    assert all(other.measure != "branch gain" for other in others)
    assert agreements(make_trace()) == ()


def test_an_ablation_is_saved_and_tabled() -> None:
    trace = ranked_trace()
    assert trace_file.loads(trace_file.dumps(trace)) == trace
    table = csv_files.files(make_report(trace))["ablation.csv"]
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["name"] for row in rows] == ["b.0", "b.1", "b.2", "b.3"]
    assert rows[0]["removal"] == "1"
    assert float(rows[0]["removal_loss_change"]) == pytest.approx(0.2)
    assert rows[1]["removal"] == rows[1]["removal_loss_change"] == ""
    assert rows[1]["verdict"] == "worse"
    assert float(rows[1]["loss_change"]) == pytest.approx(0.8)
    assert "ablation.csv" not in csv_files.files(make_report(make_trace()))
