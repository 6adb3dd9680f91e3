"""GF403: batch statistics against float64, both sides of every limit, and what it explains."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from traces import make_layers, make_trace, make_trunk

import gradflow
from gradflow import trace_file
from gradflow.analyzer import find
from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules import find_rule
from gradflow.trace_model import BatchNormRecord, Trace

INFO, WARNING, ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR


def energy(outputs: Tensor, _inputs: Any) -> Tensor:
    return outputs.square().mean()


def records(model: nn.Module, x: Tensor, **options: Any) -> tuple[BatchNormRecord, ...]:
    return gradflow.inspect(model, (x,), energy, **options).trace.batch_norms


def reference(norm: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """Low-variance share, mean shift and deviation ratio by their definitions, in float64."""
    units = x.detach().double().movedim(1, 0).flatten(1)
    mean, variance = units.mean(1), units.var(1, correction=0)
    running = (norm.running_var.double() + norm.eps).sqrt()
    shift = ((norm.running_mean.double() - mean).abs() / running).median()
    ratio = (running / (variance + norm.eps).sqrt()).median()
    return (variance < norm.eps).double().mean().item(), shift.item(), ratio.item()


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, 0.0, None])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.BatchNorm1d, (32, 6)), (nn.BatchNorm1d, (8, 6, 5)), (nn.BatchNorm2d, (4, 6, 5, 7))],
)
def test_statistics_agree_with_float64(norm: Any, shape: tuple[int, ...], momentum: float | None) -> None:
    torch.manual_seed(0)
    module = norm(6, momentum=momentum)
    module.running_mean.normal_()
    module.running_var.uniform_(0.2, 3.0)
    x = 3 + 2 * torch.randn(shape)
    x[:, 1] = 0.25
    (record,) = records(nn.Sequential(module), x)
    low, shift, ratio = reference(module, x)
    assert (record.name, record.channels, record.values) == ("0", 6, x.numel() // 6)
    assert record.batch_statistics
    assert record.low_variance == low == pytest.approx(1 / 6)
    assert record.mean_shift == pytest.approx(shift, rel=1e-4)
    assert record.deviation_ratio == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_of_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.BatchNorm1d(6).to(dtype)
    x = (3 + 2 * torch.randn(32, 6)).to(dtype)
    (record,) = records(nn.Sequential(module), x)
    low, shift, ratio = reference(module, x)
    assert record.low_variance == low
    assert record.mean_shift == pytest.approx(shift, rel=1e-3)
    assert record.deviation_ratio == pytest.approx(ratio, rel=1e-3)


class Calls(nn.Module):
    """One module twice, one without running statistics, one function, one operator, in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.BatchNorm1d(6)
        self.bare = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bare(self.shared(self.shared(x)))
        x = F.batch_norm(x, None, None, training=True, eps=1e-3)
        return torch.batch_norm(x, None, None, torch.zeros(6), torch.ones(6), True, 0.1, 1e-4, False)


def test_every_way_to_normalise_is_seen() -> None:
    model = Calls()
    seen = records(model, torch.randn(16, 6))
    assert [(r.name, r.call, r.eps, r.updates) for r in seen] == [
        ("shared", 0, 1e-5, 0),
        ("shared", 1, 1e-5, 0),
        ("bare", 0, 1e-5, None),
        ("", 0, 1e-3, None),
        ("", 1, 1e-4, None),
    ]
    assert [r.mean_shift is None for r in seen] == [False, False, True, True, False]
    assert all(r.low_variance == 0 and r.values == 16 and r.batch_statistics for r in seen)


def test_updates_are_those_before_the_step_and_eval_measures_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout())
    for _ in range(7):
        model(torch.randn(16, 6))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    (record,) = records(model, torch.randn(16, 6))
    assert record.updates == 7
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    (record,) = records(model.eval(), torch.randn(16, 6))
    assert (record.batch_statistics, record.updates) == (False, 7)
    assert (record.low_variance, record.mean_shift, record.deviation_ratio) == (None, None, None)


def test_a_trace_with_batch_norms_is_read_back_the_same() -> None:
    trace = gradflow.inspect(Calls(), (torch.randn(16, 6),), energy, steps=2).trace
    assert len(trace.batch_norms) == 5
    assert trace_file.loads(trace_file.dumps(trace)) == trace


@pytest.mark.parametrize("values", [2, 3, 4, 16])
def test_the_energy_left_is_what_autograd_leaves(values: int) -> None:
    """Row 16: (m - 2)/m of the gradient's energy, times the variance; none of it for m = 2."""
    torch.manual_seed(0)
    x = torch.randn(values, 4000, dtype=torch.float64, requires_grad=True)
    y = nn.BatchNorm1d(4000, eps=1e-14, dtype=torch.float64)(x)
    given = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * given).sum(), x)
    left = (gradient.square().sum(0) * x.var(0, correction=0)).sum() / given.square().sum()
    evidence = dict(judged(values=values, low_variance=1.0)[0].evidence)
    assert left.item() == pytest.approx(evidence["gradient_energy_left"], rel=0.03, abs=1e-9)


def make_batch_norm(name: str = "bn", order: int = 0, **changes: Any) -> BatchNormRecord:
    values: dict[str, Any] = {
        "call": 0,
        "channels": 64,
        "values": 256,
        "batch_statistics": True,
        "eps": 1e-5,
        "updates": 1000,
        "low_variance": 0.0,
        "mean_shift": 0.1,
        "deviation_ratio": 1.0,
    }
    return BatchNormRecord(order=order, name=name, **(values | changes))


def with_norms(*norms: BatchNormRecord, **run: Any) -> Trace:
    trace = make_trace(layers=make_layers(*dict.fromkeys(n.name for n in norms)), **run)
    return _with(trace, norms)


def _with(trace: Trace, norms: tuple[BatchNormRecord, ...]) -> Trace:
    return replace(trace, batch_norms=norms)


def said(trace: Trace) -> list[Finding]:
    return list(find_rule("GF403").check(trace, Config()))


def judged(*, run: dict[str, Any] | None = None, **changes: Any) -> list[Finding]:
    return said(with_norms(make_batch_norm(**changes), **({"inputs_from": "get_inputs()"} | (run or {}))))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"values": 2}, ERROR),
        ({"values": 3}, WARNING),
        ({"values": 15}, WARNING),
        ({"values": 16}, None),
        ({"low_variance": 0.1}, None),
        ({"low_variance": 0.101}, INFO),
        ({"low_variance": 0.5}, INFO),
        ({"low_variance": 0.501}, WARNING),
        ({"low_variance": None}, None),
        ({"mean_shift": 1.0}, None),
        ({"mean_shift": 1.01}, WARNING),
        ({"mean_shift": None}, None),
        ({"deviation_ratio": 0.5}, None),
        ({"deviation_ratio": 0.49}, WARNING),
        ({"deviation_ratio": 2.0}, None),
        ({"deviation_ratio": 2.01}, WARNING),
        ({"deviation_ratio": None}, None),
        ({"mean_shift": 9.0, "updates": 100}, WARNING),
        ({"mean_shift": 9.0, "deviation_ratio": 0.1, "updates": 99}, None),
        ({"mean_shift": 9.0, "updates": None}, None),
    ],
)
def test_both_sides_of_every_limit(changes: dict[str, Any], expected: Severity | None) -> None:
    found = judged(**changes)
    assert [finding.severity for finding in found] == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("changes", "run", "expected"),
    [
        ({"values": 8}, {"inputs_from": "inferred"}, INFO),
        ({"values": 2}, {"inputs_from": "inferred"}, ERROR),
        ({"values": 8}, {"inputs_from": "--input"}, WARNING),
        ({"mean_shift": 9.0}, {"inputs_from": "inferred"}, None),
        ({"mean_shift": 9.0}, {"inputs_from": "--input"}, None),
        ({"batch_statistics": False, "values": 2}, {"mode": "eval"}, None),
        ({"batch_statistics": False, "values": 2}, {"mode": "mixed"}, INFO),
    ],
)
def test_exemptions(changes: dict[str, Any], run: dict[str, Any], expected: Severity | None) -> None:
    found = judged(run=run, **changes)
    assert [finding.severity for finding in found] == ([] if expected is None else [expected])


def test_neighbours_are_one_finding_and_the_worst_is_named() -> None:
    norms = [make_batch_norm(f"bn{k}", k, values=v) for k, v in enumerate((12, 4, 256, 8))]
    found = said(with_norms(*norms))
    assert [(str(f.location), f.value) for f in found] == [("bn0–bn1", 4), ("bn3", 8)]
    assert "at worst in bn1" in found[0].message


def test_two_values_explain_the_gradient_lost_before_them_and_not_behind() -> None:
    trunk = make_trunk([1e-9, 1e-9, 1.0, 1.0, 1.0])
    trace = make_trace(trunk=trunk, inputs_from="get_inputs()")
    for at, values, expected in ((1, 2, "GF403 layers.1"), (1, 8, None)):
        norms = (make_batch_norm(f"layers.{at}", values=values),)
        found = {f.rule: f for f in find(_with(trace, norms), Config())}
        assert found["GF101"].consequence_of == expected


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_batch_of_two_is_the_first_finding(seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    found = gradflow.inspect(model, (torch.randn(2, 64),), energy).findings
    assert (found[0].rule, found[0].severity) == ("GF403", ERROR)
    loud = [f for f in found if f.consequence_of is None and f.severity is not INFO]
    assert {f.rule for f in loud} == {"GF403"}


def test_real_drift_is_said_of_given_data_after_enough_updates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6))
    for _ in range(100):
        model(torch.randn(32, 6))
    assert gradflow.inspect(model, (torch.randn(32, 6),), energy, trained=True).findings == ()
    (finding,) = gradflow.inspect(model, (4 * torch.randn(32, 6) + 2,), energy, trained=True).findings
    assert (finding.rule, finding.severity, str(finding.location)) == ("GF403", WARNING, "0")
    assert finding.value is not None
    assert math.isfinite(finding.value)
