"""GF401 and GF402: one true step against float64 and closed forms, nothing disturbed, both sides of every limit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from fingerprint import differences, fingerprint
from torch import Tensor, nn
from traces import make_parameter, make_trace

import gradflow
from gradflow import trace_file
from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules import find_rule
from gradflow.trace_model import ParameterRecord

INFO, WARNING, ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR


def energy(outputs: Tensor, _inputs: Any) -> Tensor:
    return (outputs - 1).square().mean()


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_name(report: gradflow.Report) -> dict[str, ParameterRecord]:
    return {p.name: p for p in report.trace.parameters}


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_one_that_training_would_take(name: str, steps: int) -> None:
    """The slow road: a copy trained in float64 by hand; ten steps first where ten were asked for."""
    model = network()
    report = gradflow.inspect(
        model, (data(),), energy, optimizer=OPTIMIZERS[name](model.parameters()), steps=steps
    )
    slow = network(torch.float64)
    optimizer = OPTIMIZERS[name](slow.parameters())
    for _ in range(11 if steps == 10 else 1):
        before = {n: p.detach().clone() for n, p in slow.named_parameters()}
        optimizer.zero_grad()
        energy(slow(data(torch.float64)), None).backward()
        optimizer.step()
    assert report.trace.run.optimizer_steps == (10 if steps == 10 else 0)
    for n, parameter in slow.named_parameters():
        row = by_name(report)[n]
        expected = (parameter - before[n]).norm() / before[n].norm()
        assert row.update_ratio == pytest.approx(expected.item(), rel=2e-3)
        assert row.update_lost is None
        eps = optimizer.param_groups[0]["eps"] if name.startswith("adam") else None
        assert parameter.grad is not None
        size = parameter.grad.square().mean().sqrt().item()
        assert row.gradient_to_eps == (None if eps is None else pytest.approx(size / eps, rel=1e-3))


def test_the_first_step_of_adam_is_its_learning_rate() -> None:
    """Row 20: U = lr sqrt(3n) = .0392 for nn.Linear(512); eps leaves r/(1 + r) of it."""
    torch.manual_seed(0)
    model = nn.Linear(512, 512, bias=False)
    x = torch.randn(64, 512)
    found = {}
    for eps in (1e-30, 1.0):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=eps)
        report = gradflow.inspect(model, (x,), lambda y, _: y.sum(), optimizer=optimizer)
        found[eps] = by_name(report)["weight"]
    assert found[1e-30].update_ratio == pytest.approx(1e-3 * math.sqrt(3 * 512), rel=0.01)
    r = torch.ones(1, 64) @ x
    expected = (r.abs() / (1 + r.abs())).square().mean().sqrt().item()
    assert found[1.0].update_ratio == pytest.approx(found[1e-30].update_ratio * expected, rel=1e-3)
    assert found[1.0].gradient_to_eps == pytest.approx(r.square().mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)])
def test_an_update_is_lost_below_half_the_spacing(dtype: torch.dtype, limit: float) -> None:
    """Row 27: at 1 the spacing above is 2^-7 (bfloat16) or 2^-10 (float16), and below half of that."""
    for factor, expected in ((0.9, 1.0), (1.1, 0.0)):
        model = nn.Linear(8, 4, bias=False).to(dtype)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=factor * limit)
        x = torch.ones(1, 8, dtype=dtype)
        report = gradflow.inspect(model, (x,), lambda y, _: y.sum(), optimizer=optimizer)
        assert by_name(report)["weight"].update_lost == expected


def lost_by_hand(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    energy(model(x), None).backward()
    optimizer.step()
    found = {}
    for n, p in model.named_parameters():
        assert p.grad is not None
        pairs = zip(
            before[n].flatten().tolist(), p.flatten().tolist(), p.grad.flatten().tolist(), strict=True
        )
        same = [old == new for old, new, gradient in pairs if gradient]
        found[n] = sum(same) / len(same)
    return found


def test_lost_elements_are_counted_one_by_one() -> None:
    model, x = network(torch.bfloat16), data(torch.bfloat16)
    report = gradflow.inspect(model, (x,), energy, optimizer=torch.optim.Adam(model.parameters(), lr=1e-4))
    slow = copy.deepcopy(model)
    expected = lost_by_hand(slow, x, torch.optim.Adam(slow.parameters(), lr=1e-4))
    assert {n: p.update_lost for n, p in by_name(report).items()} == expected
    assert 0 < expected["0.weight"] < 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_model_and_optimizer_are_left_as_found(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    called: list[int] = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    energy(model(data()), None).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    tensors = [id(value) for held in optimizer.state.values() for value in held.values()]
    attributes = dict(vars(optimizer))
    before = fingerprint(model)
    report = gradflow.inspect(model, (data(),), energy, optimizer=optimizer, steps=10)
    # SGD counts no steps.
    assert report.trace.run.optimizer_steps == (10 if name == "sgd" else 11)
    assert differences(before, fingerprint(model)) == []
    assert str(optimizer.state_dict()) == str(state)
    assert [id(value) for held in optimizer.state.values() for value in held.values()] == tensors
    assert vars(optimizer) == attributes
    assert called == [1]
    scheduler.step()


def test_what_cannot_be_stepped_is_a_note_and_not_checked() -> None:
    model = network()
    report = gradflow.inspect(model, (data(),), energy, optimizer=torch.optim.LBFGS(model.parameters()))
    assert by_name(report)["0.weight"].update_ratio is None
    assert report.trace.run.optimizer_steps is None
    assert any("updates not checked" in note for note in report.trace.run.notes)

    class Keeps(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.copies = [torch.ones(3)]

    report = gradflow.inspect(model, (data(),), energy, optimizer=Keeps(model.parameters()))
    assert any("(copies): updates not checked" in note for note in report.trace.run.notes)


def test_parameters_of_another_model_are_not_stepped() -> None:
    model, other = network(), network()
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = fingerprint(other)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=1.0)
    report = gradflow.inspect(model, (data(),), energy, optimizer=optimizer)
    assert by_name(report)["0.weight"].update_ratio is not None
    assert differences(before, fingerprint(other)) == []


def test_a_learning_rate_of_zero_measures_nothing_and_without_optimizer_it_is_not_checked() -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    report = gradflow.inspect(model, (data(),), energy, optimizer=torch.optim.SGD(groups, lr=0.1))
    assert by_name(report)["0.weight"].update_ratio is None
    assert by_name(report)["2.weight"].update_ratio is not None
    assert trace_file.loads(trace_file.dumps(report.trace)) == report.trace
    plain = gradflow.inspect(model, (data(),), energy)
    assert {p.update_ratio for p in plain.trace.parameters} == {None}
    assert plain.trace.run.optimizer_steps is None


def said(rule: str, *, run: dict[str, Any] | None = None, **changes: Any) -> list[Finding]:
    values = {"update_ratio": 1e-3} | changes
    about = {"optimizer": "AdamW", "optimizer_steps": 10, "loss": "loss()"} | (run or {})
    trace = make_trace(parameters=[make_parameter("layers.0.weight", **values)], **about)
    return list(find_rule(rule).check(trace, Config()))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"update_ratio": 1e-4}, None),
        ({"update_ratio": 0.99e-4}, WARNING),
        ({"update_ratio": 1e-8}, WARNING),
        ({"update_ratio": 0.99e-8}, ERROR),
        ({"update_ratio": 0.1}, None),
        ({"update_ratio": 0.101}, WARNING),
        ({"update_ratio": 10.0}, WARNING),
        ({"update_ratio": 10.1}, ERROR),
        ({"update_ratio": None}, None),
        ({"gradient_to_eps": 10.0}, None),
        ({"gradient_to_eps": 9.9}, WARNING),
        ({"gradient_to_eps": 1.0}, WARNING),
        ({"gradient_to_eps": 0.99}, ERROR),
        ({"update_ratio": 50.0, "shape": (16,)}, None),
        ({"gradient_to_eps": 0.1, "shape": (16,)}, None),
        ({"update_ratio": 50.0, "norm": 0.0}, None),
        ({"gradient_to_eps": 0.1, "gradient_norm": 0.0}, None),
    ],
)
def test_update_ratio(changes: dict[str, Any], expected: Severity | None) -> None:
    assert [f.severity for f in said("GF401", **changes)] == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("run", "changes", "expected"),
    [
        ({"optimizer_steps": 9}, {"update_ratio": 50.0}, INFO),
        ({"optimizer_steps": 9, "trained": True}, {"update_ratio": 50.0}, ERROR),
        ({"optimizer_steps": 0}, {"gradient_to_eps": 0.5}, ERROR),
        ({"loss": "probe"}, {"gradient_to_eps": 0.5}, None),
        ({"loss": "probe"}, {"gradient_to_eps": 50.0, "update_ratio": 50.0}, ERROR),
        ({"loss": "probe"}, {"update_ratio": 50.0}, None),
    ],
)
def test_phase_and_probe(run: dict[str, Any], changes: dict[str, Any], expected: Severity | None) -> None:
    found = [f.severity for f in said("GF401", run=run, **changes)]
    assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"update_lost": 0.5}, None),
        ({"update_lost": 0.501}, WARNING),
        ({"update_lost": 0.99}, WARNING),
        ({"update_lost": 0.991}, ERROR),
        ({"update_lost": None}, None),
        ({"update_lost": 1.0, "shape": (16,)}, None),
        ({"update_lost": 1.0, "norm": 0.0}, None),
    ],
)
def test_lost_updates(changes: dict[str, Any], expected: Severity | None) -> None:
    assert [f.severity for f in said("GF402", **changes)] == ([] if expected is None else [expected])
    assert said("GF402", run={"loss": "probe"}, **changes) == []


def root_causes(report: gradflow.Report) -> list[tuple[str, Severity]]:
    loud = [f for f in report.findings if f.consequence_of is None and f.severity is not INFO]
    return [(f.rule, f.severity) for f in loud]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_singletons_of_training(seed: int) -> None:
    """bfloat16 weights at a rate of 1e-4, an eps of 1e-2, a parameter missing from the optimizer."""
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), torch.randn(32, 64)
    healthy = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for steps in (1, 10):
        assert root_causes(gradflow.inspect(model, (x,), energy, optimizer=healthy, steps=steps)) == []
    eps = torch.optim.Adam(model.parameters(), eps=1e-2)
    found = root_causes(gradflow.inspect(model, (x,), energy, optimizer=eps))
    assert found[0] == ("GF401", ERROR)
    assert {rule for rule, _ in found} == {"GF401"}
    partial = torch.optim.AdamW(model[2].parameters(), lr=1e-3)
    assert root_causes(gradflow.inspect(model, (x,), energy, optimizer=partial)) == [("GF103", ERROR)]
    half = model.bfloat16()
    lost = torch.optim.SGD(half.parameters(), lr=1e-4)
    found = root_causes(gradflow.inspect(half, (x.bfloat16(),), energy, optimizer=lost))
    assert found[0] == ("GF402", ERROR)
    assert {rule for rule, _ in found} == {"GF402"}
