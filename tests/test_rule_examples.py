"""The examples on a rule's page, run for real: the rule speaks on the one and is silent on the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gradflow.analyzer import find
from gradflow.config import Config
from gradflow.failed_add import ResidualShapeError
from gradflow.findings import Finding, Severity
from gradflow.recording.execution import record
from gradflow.recording.shattered import with_correlation
from gradflow.recording.target import Batch, Loss, Target
from gradflow.rules import RULES
from gradflow.rules.gf207_shortcut_shape import failed_add_finding
from gradflow.rules.rule import Rule
from gradflow.trace_model import Trace

INFO_ONLY = ("GF205", "GF206")
"""Rules about designs and depths that are never a fault by themselves."""


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Any]:
    """Runs source as a module file, as a target is, so that findings can name its lines."""
    made: list[str] = []

    def run(source: str) -> ModuleType:
        path = tmp_path / "model.py"
        path.write_text(source, encoding="utf-8")
        module = ModuleType("rule_example")
        made.append(module.__name__)
        sys.modules[module.__name__] = module
        exec(compile(source, str(path), "exec"), vars(module))
        return module

    yield run
    for name in made:
        sys.modules.pop(name, None)


def probe(outputs: torch.Tensor, _batch: Batch) -> torch.Tensor:
    """A fixed N(0, 1) cotangent, as ``inspect`` uses where there is no loss."""
    return (outputs * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))).sum()


PROBE = Loss(description="probe", compute=probe, is_probe=True)


def own_loss(function: Any) -> Loss:
    return Loss(description="loss() of model.py", compute=lambda out, batch: function(out, batch.args[0]))


def recorded(module: Any) -> Trace:
    target = Target(
        name="model.py",
        module=module.model,
        batches=(Batch(args=(module.example_inputs,), kwargs={}),),
        inputs_from="example_inputs",
        loss=own_loss(module.loss) if hasattr(module, "loss") else PROBE,
        forward=lambda model, batch: model(*batch.args, **batch.kwargs),
        optimizer=module.make_optimizer(module.model) if hasattr(module, "make_optimizer") else None,
    )
    trace = record(target, trained=getattr(module, "trained", False))
    return with_correlation(target, trace) if hasattr(module, "shattered") else trace


def findings(module: Any) -> tuple[Finding, ...]:
    try:
        return find(recorded(module), Config())
    except ResidualShapeError as error:
        return (failed_add_finding(error.failed_add),)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_the_rule_is_the_root_cause_of_the_failing_example(rule: Rule, example: Any) -> None:
    worst = max((limit.severity for limit in rule.thresholds), key=lambda severity: severity.rank)
    first = findings(example(rule.failing_example))[0]
    assert (first.rule, first.severity, first.consequence_of) == (rule.code, worst, None)
    assert (worst.rank >= Severity.WARNING.rank) is (rule.code not in INFO_ONLY)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_nothing_is_said_about_the_healthy_example(rule: Rule, example: Any) -> None:
    assert findings(example(rule.healthy_example)) == ()


def test_the_producer_is_blamed_by_name(example: Any) -> None:
    by_code = {rule.code: rule for rule in RULES}
    for code, op in (("GF104", "sqrt"), ("GF303", "log")):
        first = findings(example(by_code[code].failing_example))[0]
        assert (str(first.location), dict(first.evidence)["op"]) == ("1", op)
