"""How far an overwritten skip is from x + F(x): against the same block by hand, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow
from gradflow.rules import find_rule
from gradflow.trace_model import OverwrittenSkip
from tests.test_rules_gf2xx import said
from tests.traces import make_residual, make_trace


class Block(nn.Module):
    """x + body(x), however the body begins and the add is written."""

    def __init__(self, first: Callable[[Tensor], Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.join = first, join
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(self.first(x))
        return self.join(x, out)


def plus(x: Tensor, out: Tensor) -> Tensor:
    return x + out


FIRST: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (lambda x: F.relu(x, inplace=True), torch.relu),
    "relu_": (torch.relu_, torch.relu),
    "module": (nn.ReLU(inplace=True), torch.relu),
    "mul_": (lambda x: x.mul_(0.25), lambda x: 0.25 * x),
    "clamp_": (lambda x: x.clamp_(-0.5, 0.5), lambda x: x.clamp(-0.5, 0.5)),
    "two in a row": (lambda x: torch.relu_(x.mul_(-0.5)), lambda x: torch.relu(-0.5 * x)),
}  # fmt: skip


def stem(first: Callable[[Tensor], Tensor], join: Callable[[Tensor, Tensor], Tensor] = plus) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 16), Block(first, join), nn.Linear(16, 4)).double()


def overwritten(model: nn.Module, inputs: Any, **options: Any) -> OverwrittenSkip | None:
    from gradflow.recording.execution import record
    from gradflow.recording.target import target_from_objects

    (site,) = record(target_from_objects(model, inputs), **options).residuals
    return site.overwritten


@pytest.mark.parametrize(("first", "plain"), FIRST.values(), ids=FIRST)
def test_both_distances_by_hand(first: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]) -> None:
    model, inputs = stem(first), torch.randn(8, 16, dtype=torch.float64)
    found = overwritten(model, inputs)
    assert found is not None and found.rebound is not True

    with torch.no_grad():
        x = model[0](inputs)
        after = plain(x)
        branch = model[1].linear(after)
    change = (after - x).norm() / x.norm()
    distance = ((after + branch) - (x + branch)).norm() / (x + branch).norm()
    assert found.change == pytest.approx(change.item(), rel=1e-12)
    assert found.distance == pytest.approx(distance.item(), rel=1e-12)


JOINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "x - out": (lambda x, out: x - out, -1.0),
    "out + x": (lambda x, out: out + x, 1.0),
    "out += x": (lambda x, out: out.add_(x), 1.0),
    "scaled": (lambda x, out: 0.5 * x + out, 0.5),
    "negative": (lambda x, out: -2.0 * x + out, -2.0),
}  # fmt: skip


@pytest.mark.parametrize(("join", "factor"), JOINS.values(), ids=JOINS)
def test_however_the_add_is_written(join: Callable[[Tensor, Tensor], Tensor], factor: float) -> None:
    model, inputs = stem(torch.relu_, join), torch.randn(8, 16, dtype=torch.float64)
    found = overwritten(model, inputs)
    assert found is not None
    with torch.no_grad():
        x = model[0](inputs)
        branch = model[1].linear(torch.relu(x))
    distance = (factor * (torch.relu(x) - x)).norm() / (factor * x + branch).norm()
    assert found.distance == pytest.approx(distance.item(), rel=1e-12)


def test_an_add_with_weights_has_a_change_and_no_distance() -> None:
    found = overwritten(
        stem(torch.relu_, lambda x, out: torch.add(x, out, alpha=0.5)),
        torch.randn(8, 16, dtype=torch.float64),
    )
    assert found is not None and found.change is not None and found.distance is None


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(torch.relu_(x))
        return x + a + self.b(x)


def test_a_second_branch_does_not_clear_the_first() -> None:
    report = gradflow.inspect(nn.Sequential(nn.Linear(16, 16), Parallel()), torch.randn(8, 16))
    assert report.residuals["branches"].tolist() == [2]
    (finding,) = [finding for finding in report.findings if finding.rule == "GF203"]
    assert finding.severity == "warning"


def test_a_skip_that_is_thinned_out_has_a_change_and_no_distance() -> None:
    model = stem(torch.relu_, lambda x, out: F.dropout(x, 0.5) + out)
    found = overwritten(model, torch.randn(8, 16, dtype=torch.float64))
    assert found is not None
    assert found.change is not None and 0.4 < found.change < 1.0
    assert found.distance is None


class Rebinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(x)
        return x + self.linear(x)


def test_what_was_meant_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_again(*_: Any) -> None:
        raise AssertionError("a model without an accused skip ran twice")

    monkeypatch.setattr("gradflow.recording.execution.prove_overwrites", run_again)
    found = overwritten(nn.Sequential(nn.Linear(16, 16), Rebinds()), torch.randn(8, 16))
    assert found is not None
    assert (found.rebound, found.change, found.distance) == (True, None, None)


@pytest.mark.parametrize("steps", [1, 3])
def test_random_numbers_and_statistics_are_those_of_the_first_run(steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), Block(torch.relu_, plus))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = overwritten(model, torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), steps=steps)
    again = overwritten(model, torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), steps=steps)
    assert first == again
    assert first is not None and first.change is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is None


def test_the_tables_have_both() -> None:
    report = gradflow.inspect(stem(torch.relu_), torch.randn(8, 16, dtype=torch.float64))
    row = report.residuals.iloc[0]
    assert 0 < row["overwritten_change"] < 1 and 0 < row["overwritten_distance"] < 2
    (finding,) = [finding for finding in report.findings if finding.rule == "GF203"]
    assert f"it moves x by {100 * row['overwritten_change']:.3g}%" in finding.message
    assert "away from x + F(x)" in finding.message
    assert dict(finding.evidence)["distance"] == row["overwritten_distance"]


@pytest.mark.parametrize(
    ("changes", "distances", "words"),
    [
        ([0.7], [0.35], ": it moves x by 70% and the sum is 35% away from x + F(x)"),
        ([0.7, 0.8], [0.35, 0.2], ": it moves x by up to 80% and the sum is up to 35% away from x + F(x)"),
        ([0.7], [None], ": it moves x by 70%"),
        ([math.inf], [1.0], ": it moves x by inf% and the sum is 100% away from x + F(x)"),
        ([None], [None], "(warning above 0)"),
    ],
)
def test_what_the_finding_says(changes: list[Any], distances: list[Any], words: str) -> None:
    sites = [
        make_residual(
            f"blocks.{k}", k,
            overwritten=OverwrittenSkip(
                op="relu", name="", source="net.py:3", rebound=False, change=change, distance=distance
            ),
        )
        for k, (change, distance) in enumerate(zip(changes, distances, strict=True))
    ]  # fmt: skip
    (finding,) = said("GF203", make_trace(residuals=sites))
    assert finding.message.endswith(words)
    assert find_rule("GF203").code == finding.rule
