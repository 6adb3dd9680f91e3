"""GF403's loss gap: the loss with running statistics against the modules themselves, and what it says of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import find
from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.trace_model import Trace


def energy(outputs: Tensor, _inputs: Any) -> Tensor:
    return outputs.square().mean()


class Net(nn.Module):
    """Ten batch normalisations and a dropout; the last one is a function."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(10) for layer in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())]
        self.layers = nn.Sequential(*layers)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.layers(x)))


def norms(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


def settled(*, updates: int = 100) -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(updates):
            model(torch.randn(64, 16))
    return model


def running_loss(model: nn.Module, x: Tensor, **options: Any) -> float | None:
    return gradflow.inspect(model, (x,), energy, trained=True, **options).trace.run.running_loss


def test_it_is_the_loss_of_the_same_step_with_batch_norms_in_eval_mode() -> None:
    model, x = settled(), torch.randn(64, 16)
    witness = copy.deepcopy(model)
    for norm in norms(witness):
        norm.eval()
    torch.manual_seed(5)
    assert running_loss(model, x, seed=5) == energy(witness(x), None).item()


def test_the_model_is_left_as_found() -> None:
    model = settled()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert running_loss(model, torch.randn(64, 16, generator=torch.Generator().manual_seed(1))) is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_not_run_where_nothing_has_settled() -> None:
    x = torch.randn(64, 16)
    assert running_loss(settled(updates=99), x) is None
    assert running_loss(settled().eval(), x) is None
    assert (
        gradflow.inspect(settled(), (x,), trained=True).trace.run.running_loss is None
    )  # a probe has no loss
    assert running_loss(nn.Sequential(nn.Linear(16, 4), nn.Dropout()), x) is None


def test_a_forward_that_fails_in_eval_mode_is_a_note() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x: Tensor) -> Tensor:
            if not self.norm.training:
                raise RuntimeError("no evaluation here")
            return self.norm(x)

    model = Fails()
    for _ in range(100):
        model(torch.randn(64, 16))
    run = gradflow.inspect(model, (torch.randn(64, 16),), energy, trained=True).trace.run
    assert run.running_loss is None
    assert any("loss with running statistics was not measured" in note for note in run.notes)
    assert model.norm.training


def gap_of(trace: Trace) -> list[Finding]:
    found = [finding for finding in find(trace, Config()) if finding.rule == "GF403"]
    return [finding for finding in found if dict(finding.evidence).get("cause") == "loss gap"]


@pytest.fixture(scope="module")
def healthy() -> Trace:
    return gradflow.inspect(settled(), (torch.randn(64, 16),), energy, trained=True).trace


def test_a_healthy_model_is_let_be(healthy: Trace) -> None:
    assert healthy.run.running_loss is not None
    assert gap_of(healthy) == []


@pytest.mark.parametrize(("running", "said"), [(1.5, False), (1.51, True), (0.2, False), (None, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_limit(healthy: Trace, running: float | None, said: bool, sign: int) -> None:
    value = None if running is None else sign + (running - 1)
    run = replace(healthy.run, loss_values=(float(sign),), running_loss=value)
    findings = gap_of(replace(healthy, run=run))
    assert [finding.severity for finding in findings] == [Severity.WARNING] * said
    if findings:
        assert findings[0].value == pytest.approx(0.51)
        assert str(findings[0].location) == "layers"


@pytest.mark.parametrize("inputs_from", ["inferred", "--input"])
def test_drawn_inputs_are_no_data(healthy: Trace, inputs_from: str) -> None:
    run = replace(healthy.run, loss_values=(1.0,), running_loss=9.0, inputs_from=inputs_from)
    assert gap_of(replace(healthy, run=run)) == []


def test_a_layer_that_drifted_is_the_cause_that_is_named(healthy: Trace) -> None:
    run = replace(healthy.run, loss_values=(1.0,), running_loss=9.0)
    first, *rest = healthy.batch_norms
    trace = replace(healthy, run=run, batch_norms=(replace(first, mean_shift=3.0), *rest))
    assert gap_of(trace) == []
    assert [f.severity for f in find(trace, Config()) if f.rule == "GF403"] == [Severity.WARNING]


def test_statistics_that_lag_a_little_in_every_layer_are_found() -> None:
    """A real one: each deviation is off by less than the limit of a layer, and all of them together are not."""
    model = settled()
    for norm in norms(model):
        assert norm.running_var is not None
        norm.running_var *= 0.6**2
    report = gradflow.inspect(model, (torch.randn(64, 16),), energy, trained=True)
    (finding,) = gap_of(report.trace)
    assert finding.value is not None
    assert finding.value > 0.5
