"""GF301, GF302 and GF304 on literal traces: both sides of every limit, what is exempt, what explains what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from traces import (
    make_activation,
    make_layer,
    make_layers,
    make_parameter,
    make_residual,
    make_trace,
    make_trunk,
)

from gradflow.analyzer import find
from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules import find_rule
from gradflow.trace_model import ActivationRecord, TensorStatistics, Trace, Trunk

INFO, WARNING, ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR


def said(rule: str, trace: Trace) -> list[Finding]:
    return list(find_rule(rule).check(trace, Config()))


def severity(rule: str, trace: Trace) -> Severity | None:
    findings = said(rule, trace)
    assert len(findings) < 2
    return findings[0].severity if findings else None


def with_units(*activations: ActivationRecord, common_mode: float = 0.3, **changes: Any) -> Trace:
    layers = [
        make_layer(record.name, record.order, activation=TensorStatistics(common_mode=common_mode))
        for record in activations
    ]
    return make_trace(layers=layers, activations=activations, **changes)


def tanh(**changes: Any) -> ActivationRecord:
    return make_activation("act", **({"op": "tanh", "inactive": None, "always_active": None} | changes))


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, None),
        (0.1, None),
        (0.101, INFO),
        (0.5, INFO),
        (0.501, WARNING),
        (0.95, WARNING),
        (0.951, ERROR),
        (1.0, ERROR),
        (None, None),
    ],
)
@pytest.mark.parametrize("field", ["inactive", "sunk", "dormant"])
def test_dead_units(field: str, share: float | None, expected: Severity | None) -> None:
    changes: dict[str, Any] = {
        "inactive": {"inactive": share},
        "sunk": {"inactive": 1.0, "sunk": share, "observations": 297},
        "dormant": {"op": "gelu", "inactive": None, "dormant": share},
    }[field]
    for trained in (False, True):
        assert severity("GF301", with_units(make_activation("act", **changes), trained=trained)) is expected


def test_a_share_of_inactive_units_counts_from_298_observations() -> None:
    enough = make_activation("act", inactive=0.6, observations=298)
    assert severity("GF301", with_units(enough)) is WARNING
    assert severity("GF301", with_units(replace(enough, observations=297))) is None
    (finding,) = said("GF301", with_units(replace(enough, observations=100, sunk=0.6)))
    assert "100 observations" in finding.message
    assert "3%" in finding.message
    assert "298" in finding.message


@pytest.mark.parametrize(
    ("share", "common_mode", "expected"),
    [(0.6, 0.9, WARNING), (0.6, 0.901, INFO), (0.2, 0.99, INFO), (0.96, 0.99, ERROR)],
)
def test_alignment_is_not_bias_death(share: float, common_mode: float, expected: Severity) -> None:
    trace = with_units(make_activation("act", inactive=share), common_mode=common_mode)
    assert severity("GF301", trace) is expected
    (finding,) = said("GF301", trace)
    assert ("look alike" in finding.message) == (common_mode > 0.9 and expected is INFO)


@pytest.mark.parametrize(("always", "expected"), [(0.29, WARNING), (0.3, INFO)])
def test_without_a_row_units_that_are_always_on_tell_alignment(always: float, expected: Severity) -> None:
    record = make_activation("block", layer=None, inactive=0.6, always_active=always)
    assert severity("GF301", make_trace(layers=make_layers("block"), activations=[record])) is expected


def test_a_shut_gate_is_dormant_and_no_fault_but_a_dead_rectifier_is_one() -> None:
    gate = make_activation("act", op="silu", inactive=None, dormant=0.99, is_gate=True)
    assert severity("GF301", with_units(gate)) is INFO
    assert severity("GF301", with_units(replace(gate, is_gate=False))) is ERROR
    assert severity("GF301", with_units(make_activation("act", inactive=0.99, is_gate=True))) is ERROR


def test_neighbours_of_one_severity_are_one_finding() -> None:
    shares = (0.6, 0.7, 0.0, 0.6, 0.99, 0.2)
    records = [make_activation(f"a{k}", k, inactive=share) for k, share in enumerate(shares)]
    findings = said("GF301", with_units(*records))
    assert [(str(f.location), f.severity, f.value) for f in findings] == [
        ("a4", ERROR, 0.99),
        ("a0–a1", WARNING, 0.7),
        ("a3", WARNING, 0.6),
        ("a5", INFO, 0.2),
    ]
    assert "70% of the 100 units" in findings[1].message


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.25, None),
        (0.251, INFO),
        (0.5, INFO),
        (0.501, WARNING),
        (0.9, WARNING),
        (0.901, ERROR),
        (None, None),
    ],
)
@pytest.mark.parametrize("op", ["tanh", "sigmoid"])
def test_saturated_elements(op: str, share: float | None, expected: Severity | None) -> None:
    assert severity("GF302", with_units(tanh(op=op, saturated=share))) is expected
    gate = severity("GF302", with_units(tanh(op=op, saturated=share, is_gate=True)))
    assert gate is (None if expected is None else INFO)


def test_stuck_units_are_told_and_not_judged() -> None:
    (finding,) = said("GF302", with_units(tanh(saturated=0.6, stuck=0.25)))
    assert finding.message == (
        "60% of the elements are saturated (|z| above 2.5) in the tanh of act (warning above 50%); "
        "25% of the units never leave one side"
    )
    assert severity("GF302", with_units(tanh(saturated=0.2, stuck=1.0))) is None


@pytest.mark.parametrize(("saturated", "expected"), [(0.3, INFO), (0.51, INFO), (0.91, WARNING)])
def test_a_bare_skip_leads_past_saturated_units(saturated: float, expected: Severity) -> None:
    record = replace(tanh(saturated=saturated), name="blocks.3.branch.1")
    site = make_residual("blocks.3", branch_ops=("tanh", "linear"))
    assert severity("GF302", replace(with_units(record), residuals=(site,))) is expected


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "blocks.30"},
        {"name": ""},
        {"kind": "projection"},
        {"branch_ops": ("relu", "linear")},
        {"activation_after": "tanh"},
    ],
)
def test_only_what_stands_in_the_branch_of_a_bare_skip_is_passed_by(changes: dict[str, Any]) -> None:
    record = replace(tanh(saturated=0.91), name="blocks.3.branch.1")
    site = replace(make_residual("blocks.3", branch_ops=("tanh", "linear")), **changes)
    assert severity("GF302", replace(with_units(record), residuals=(site,))) is ERROR


def stream(
    common: Sequence[float | None], signal: Sequence[float | None], *, over: str = "samples", rms: float = 1.0
) -> Trunk:
    trunk = make_trunk([1.0] * len(common))
    points = [
        replace(
            point,
            activation=TensorStatistics(rms=rms, absmax=1.0, common_mode=c, signal=s),
        )
        if over == "samples"
        else replace(
            point,
            activation=TensorStatistics(rms=rms, absmax=1.0),
            token_common_mode=c,
            token_signal=s,
        )
        for point, c, s in zip(trunk.points, common, signal, strict=True)
    ]
    return replace(trunk, points=tuple(points))


@pytest.mark.parametrize(
    ("common", "kept", "expected"),
    [
        (0.95, 1e-3, None),
        (0.951, 1.0, INFO),
        (0.99, 1e-3, INFO),
        (0.991, 1e-2, INFO),
        (0.991, 9.9e-3, WARNING),
        (0.9996, 0.03, INFO),  # a healthy residual sigmoid net
        (1.0, 1e-5, WARNING),  # never an error by itself
    ],
)
@pytest.mark.parametrize("over", ["samples", "tokens"])
def test_collapse(over: str, common: float, kept: float, expected: Severity | None) -> None:
    trunk = stream((0.1, 0.5, common), (1.0, 0.5, kept), over=over)
    assert severity("GF304", make_trace(trunk=trunk)) is expected
    trained = severity("GF304", make_trace(trunk=trunk, trained=True))
    assert trained is (None if expected is None else INFO)


def test_collapse_needs_eight_samples_but_tokens_count_alone() -> None:
    numbers = (0.1, 0.999), (1.0, 1e-3)
    assert severity("GF304", make_trace(trunk=stream(*numbers), batch_size=8)) is WARNING
    assert severity("GF304", make_trace(trunk=stream(*numbers), batch_size=7)) is None
    assert severity("GF304", make_trace(trunk=stream(*numbers, over="tokens"), batch_size=1)) is WARNING


def test_inputs_that_are_alike_have_nothing_to_lose() -> None:
    assert severity("GF304", make_trace(trunk=stream((0.999, 1.0), (1.0, 1e-3)))) is None
    assert severity("GF304", make_trace(trunk=stream((1.0, 1.0), (0.0, 0.0)))) is None
    assert severity("GF304", make_trace(trunk=stream((None, None), (None, None)))) is None
    assert severity("GF304", make_trace(trunk=stream((math.nan, math.nan), (math.nan, math.nan)))) is None


def test_the_collapse_is_located_where_it_begins() -> None:
    trunk = stream((0.1, 0.5, 0.96, 0.9999), (1.0, 0.5, 0.1, 1e-4))
    (finding,) = said("GF304", make_trace(trunk=trunk))
    assert str(finding.location) == "layers.2–layers.3"
    assert finding.value == 0.9999
    assert "99.9% of the last tensor is common to all samples" in finding.message
    assert "0.0001 times what it was at layers.0" in finding.message


@pytest.mark.parametrize(("share", "expected"), [(1.1e-6, None), (1e-6, WARNING), (0.0, WARNING)])
def test_constant_activations(share: float, expected: Severity | None) -> None:
    trunk = stream((0.1, 0.1), (1.0, share))
    assert severity("GF304", make_trace(trunk=trunk)) is expected
    assert severity("GF304", make_trace(trunk=trunk, trained=True)) is (expected and INFO)
    assert severity("GF304", make_trace(trunk=trunk, batch_size=7)) is None


def zero_at(k: int) -> Trunk:
    trunk = make_trunk([1.0, 1.0, 1.0])
    zero = TensorStatistics(rms=0.0, absmax=0.0, signal=0.0)
    return replace(
        trunk, points=tuple(replace(p, activation=zero) if i == k else p for i, p in enumerate(trunk.points))
    )


@pytest.mark.parametrize("k", [0, 1, 2])
def test_an_exact_zero_is_an_error_unless_its_weight_opens(k: int) -> None:
    trunk = zero_at(k)
    weight = make_parameter(f"layers.{k}.weight", norm=0.0, gradient_norm=0.1)
    assert severity("GF304", make_trace(trunk=trunk)) is ERROR
    assert severity("GF304", make_trace(trunk=trunk, trained=True)) is ERROR
    assert severity("GF304", make_trace(trunk=trunk, parameters=[weight])) is INFO
    shut = replace(weight, gradient_norm=0.0)
    assert severity("GF304", make_trace(trunk=trunk, parameters=[shut])) is ERROR


# What explains what
def vanishing(*, lost_at: int) -> Trunk:
    """Five tensors whose gradient falls by 1e-4 between two neighbours; the activations stand between."""
    gradients = [1e-4 if k <= lost_at else 1.0 for k in range(5)]
    trunk = make_trunk(gradients)
    return replace(trunk, points=tuple(replace(p, layer=2 * k) for k, p in enumerate(trunk.points)))


def rows() -> list[Any]:
    return [make_layer(f"layers.{k // 2}" if k % 2 == 0 else f"act.{k}", k) for k in range(10)]


@pytest.mark.parametrize(("rule", "changes"), [("GF301", {"inactive": 0.99}), ("GF302", {"saturated": 0.95})])
def test_units_explain_the_gradient_that_is_lost_at_them(rule: str, changes: dict[str, Any]) -> None:
    for at, explained in ((5, True), (3, False)):
        record = make_activation(f"act.{at}", at, **changes)
        trace = make_trace(layers=rows(), trunk=vanishing(lost_at=2), activations=[record])
        causes = {f.rule: f.consequence_of for f in find(trace, Config())}
        assert causes[rule] is None
        assert causes["GF101"] == (f"{rule} act.{at}" if explained else None)


def test_a_loss_that_is_even_is_not_put_down_to_one_activation() -> None:
    trunk = make_trunk([1e-8, 1e-6, 1e-4, 1e-2, 1.0])
    trunk = replace(trunk, points=tuple(replace(p, layer=2 * k) for k, p in enumerate(trunk.points)))
    one = make_trace(layers=rows(), trunk=trunk, activations=[make_activation("act.5", 5, inactive=0.99)])
    assert {f.rule for f in find(one, Config()) if f.consequence_of is None} == {"GF101", "GF301"}
    every = [make_activation(f"act.{k}", k, inactive=0.99) for k in (1, 3, 5, 7)]
    whole = make_trace(layers=rows(), trunk=trunk, activations=every)
    assert {f.rule for f in find(whole, Config()) if f.consequence_of is None} == {"GF301"}


def test_a_lost_signal_is_a_consequence_of_a_lost_gradient_and_never_its_cause() -> None:
    trunk = stream((0.1, 0.9, 0.96, 0.9999), (1.0, 0.3, 0.1, 1e-4))
    trunk = replace(
        trunk,
        points=tuple(
            replace(p, gradient_norm=g) for p, g in zip(trunk.points, (1e-6, 1e-4, 1e-2, 1.0), strict=True)
        ),
    )
    found = {f.rule: f for f in find(make_trace(trunk=trunk), Config())}
    assert found["GF101"].consequence_of is None
    assert found["GF304"].severity is INFO
    assert str(found["GF304"].consequence_of).startswith("GF101")


@pytest.mark.parametrize("rule", ["GF301", "GF302"])
@pytest.mark.parametrize("gradients", [(math.inf, 1.0), (1.0, math.inf), (1e300, 1e-300), (math.nan, 1.0)])
def test_a_gradient_that_overflowed_explains_no_loss(rule: str, gradients: tuple[float, float]) -> None:
    """A ratio of two finite norms may be zero, and one of them may be none."""
    record = make_activation("layers.1", op="tanh", inactive=0.99, saturated=0.95, always_active=None)
    points = [replace(p, layer=k) for k, p in enumerate(make_trunk(list(gradients)).points)]
    trunk = replace(make_trunk(list(gradients)), points=tuple(points))
    trace = with_units(replace(record, layer=1), trunk=trunk)
    (finding,) = said(rule, trace)
    assert "cause" not in dict(finding.evidence)
