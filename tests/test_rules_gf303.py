"""GF303 on literal traces: who is blamed, and which -inf is a mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
from traces import make_layer, make_layers, make_origin, make_parameter, make_trace

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules import find_rule
from gradflow.rules.nonfinite import GENERAL_HINT, OP_HINTS, op_hint
from gradflow.trace_model import LayerRecord, TensorStatistics, Trace

NAN, INF = math.nan, math.inf


def said(trace: Trace) -> list[Finding]:
    return list(find_rule("GF303").check(trace, Config()))


def places(trace: Trace) -> list[str]:
    findings = said(trace)
    assert all(f.severity is Severity.ERROR and f.threshold == 0 for f in findings)
    return [str(f.location) for f in findings]


def bad(name: str, order: int, mean: float = NAN, count: int = 4, **changes: Any) -> LayerRecord:
    return make_layer(name, order, activation=TensorStatistics(mean=mean, nonfinite=count), **changes)


def test_the_recorded_producer_is_blamed_and_what_follows_is_counted() -> None:
    layers = [make_layer("a", 0), bad("b", 1), bad("c", 2), bad("d", 3), bad("", 4)]
    origin = make_origin("forward", "b", op="log", value="-inf", count=12, last_finite="a")
    (finding,) = said(make_trace(layers=layers, origins=[origin]))
    assert str(finding.location) == "b"
    assert finding.message == (
        "log in b (model.py:31) makes 12 elements -inf from finite inputs (0 allowed); the last finite one "
        "is a; it is carried on by 2 other modules"
    )
    assert "log_softmax" in finding.hint
    assert (finding.value, finding.severity) == (12.0, Severity.ERROR)
    assert {"op", "source", "value", "last_finite", "modules_after"} == {name for name, _ in finding.evidence}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([make_layer("a", 0), bad("b", 1), bad("c", 2)], ["b"]),
        ([bad("", 0), make_layer("a", 1), bad("block", 2), bad("block.norm", 3)], ["block.norm"]),
        ([bad("", 5), bad("c", 4), bad("b", 3)], ["b"]),  # rows need not be in order
        ([bad("", 2), make_layer("a", 0), make_layer("b", 1)], [""]),  # the root's own ops
        ([bad("a", 0, mean=INF, count=1)], ["a"]),
        ([bad("a", 0, count=0)], []),
        ([make_layer("a", 0, activation=None)], []),
        ([make_layer("a", 0, activation=TensorStatistics())], []),  # not measured is not a fault
        (make_layers("a", "b"), []),
    ],
)
def test_without_an_origin_the_first_module_is_blamed(layers: list[LayerRecord], expected: list[str]) -> None:
    assert places(make_trace(layers=layers)) == expected


def test_parameters_that_already_hold_it_are_named_instead_of_what_they_poison() -> None:
    layers = [make_layer("a", 0), bad("b", 1), bad("c", 2)]
    parameters = [
        make_parameter("a.weight"),
        make_parameter("b.weight", value_nonfinite=2, norm=NAN),
        make_parameter("b.bias"),
        make_parameter("c.weight"),
    ]
    (finding,) = said(make_trace(layers=layers, parameters=parameters))
    assert str(finding.location) == "b.weight"
    assert finding.value == 2.0
    assert "Before anything ran, b.weight already held 2" in finding.message
    from_origin = make_trace(layers=layers, origins=[make_origin("parameter", "b.weight", op="", source="")])
    assert places(from_origin) == ["b.weight"]


def test_a_diverged_model_is_one_finding() -> None:
    parameters = [make_parameter(f"layers.{k}.weight", value_nonfinite=256) for k in range(12)]
    (finding,) = said(make_trace(parameters=parameters))
    assert str(finding.location) == "layers"
    assert finding.value == 12 * 256


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mask_mean": -INF}, []),  # a mask that softmax absorbs
        ({"mask_mean": NAN}, ["mask"]),
        ({"mask_mean": INF}, ["mask"]),
        ({"mask_mean": -INF, "loss": NAN}, ["mask"]),
        ({"mask_mean": -INF, "gradient": 3}, ["mask"]),
        ({"mask_mean": -INF, "parameter_gradient": 3}, ["mask"]),
    ],
)
def test_a_mask_is_no_fault_until_it_is_carried_on(changes: dict[str, Any], expected: list[str]) -> None:
    layers = [
        bad("mask", 0, mean=changes["mask_mean"]),
        make_layer("softmax", 1, gradient_nonfinite=changes.get("gradient", 0)),
        make_layer("", 2),
    ]
    weight = make_parameter("fc.weight", gradient_nonfinite=changes.get("parameter_gradient", 0))
    trace = make_trace(layers=layers, parameters=[weight], loss_values=(changes.get("loss", 1.0),))
    assert places(trace) == expected


def test_minus_infinity_that_reaches_the_outputs_is_the_fault_of_the_op_that_made_it() -> None:
    layers = [bad("log", 0, mean=-INF), bad("", 1, mean=-INF)]
    assert places(make_trace(layers=layers)) == []  # masked logits
    assert places(make_trace(layers=layers, origins=[make_origin("forward", "log", value="-inf")])) == ["log"]


@pytest.mark.parametrize(("losses", "expected"), [((1.0, NAN), [""]), ((INF,), [""]), ((1.0,), []), ((), [])])
def test_a_loss_that_is_not_finite_on_its_own(losses: tuple[float, ...], expected: list[str]) -> None:
    trace = make_trace(layers=make_layers("a", "b"), loss_values=losses)
    assert places(trace) == expected
    assert all("The loss is" in f.message for f in said(trace))


@pytest.mark.parametrize(
    ("op", "word"),
    [
        ("log", "log_softmax"),
        ("div", "divisor"),
        ("sqrt", "root"),
        ("softmax", "masked"),
        ("linear", "range"),
    ],
)
def test_the_hint_fits_the_op(op: str, word: str) -> None:
    assert word in op_hint(op)


def test_every_op_has_one_hint_and_an_unknown_one_general_advice() -> None:
    ops = [op for names, _ in OP_HINTS for op in names]
    assert len(ops) == len(set(ops))
    assert {op_hint(op) for op in ops} == {hint for _, hint in OP_HINTS}
    assert op_hint("") == op_hint("my_own_op") == GENERAL_HINT
    assert op_hint("log_") == op_hint("log")
