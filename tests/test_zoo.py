"""The zoo: every faulty model gets its finding first, every healthy one gets silence."""

from __future__ import annotations

import math

import pytest
import zoo
import zoo_attention
import zoo_residual
import zoo_units

import gradflow
from gradflow.findings import Finding, Severity

SEEDS = (0, 1, 2)
FAULTY = zoo.FAULTY + zoo_residual.FAULTY + zoo_units.FAULTY + zoo_attention.FAULTY
HEALTHY = zoo.HEALTHY + zoo_residual.HEALTHY


def loud(report: gradflow.Report) -> list[Finding]:
    """Root causes that a user is warned about, as ranked."""
    return [
        finding
        for finding in report.findings
        if finding.consequence_of is None and finding.severity.rank >= Severity.WARNING.rank
    ]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", FAULTY, ids=lambda case: case.name)
def test_faulty_model_gets_its_finding_first(case: zoo.Case, seed: int) -> None:
    report = gradflow.inspect(*case.build(seed), seed=seed, trained=case.trained)
    findings = loud(report)
    assert findings, f"nothing said; gain {report.profile.gain:g}"
    assert findings[0].rule in (case.rule, *case.also), findings[0].message
    first = next(finding for finding in findings if finding.rule == case.rule)
    assert first.severity.rank >= case.severity.rank, first.message
    assert not case.exactly or first.severity is case.severity, first.message
    assert first.location.first.startswith(case.region)
    assert (first.location.last or first.location.first).startswith(case.region)
    assert {finding.rule for finding in findings} == {case.rule, *case.also}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
def test_healthy_model_gets_silence(case: zoo.Case, seed: int) -> None:
    report = gradflow.inspect(*case.build(seed), seed=seed, trained=case.trained)
    assert [f"{finding.rule} {finding.location}: {finding.message}" for finding in loud(report)] == []
    trainable = report.parameters[report.parameters["coverage"] != "frozen"]
    assert trainable["gradient_norm"].map(math.isfinite).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", zoo_units.INFORMED, ids=lambda case: case.name)
def test_what_is_true_and_no_fault_is_info(case: zoo.Case, seed: int) -> None:
    report = gradflow.inspect(*case.build(seed), seed=seed)
    assert loud(report) == []
    said = [finding for finding in report.findings if finding.rule == case.rule]
    assert [finding.severity for finding in said] == [case.severity]
    assert said[0].location.first.startswith(case.region)


def test_cut_graph_names_the_encoder_and_the_op() -> None:
    report = gradflow.inspect(*zoo.cut_trunk(0))
    finding = loud(report)[0]
    assert str(finding.location) == "encoder"
    assert "detach" in finding.message


def test_unused_head_is_named_whole() -> None:
    report = gradflow.inspect(*zoo.unused_head(0))
    assert [str(finding.location) for finding in loud(report)] == ["auxiliary"]
    rows = report.parameters.set_index("name")
    assert set(rows.loc[["auxiliary.weight", "auxiliary.bias"], "coverage"]) == {"never called"}
    assert rows.loc["auxiliary.weight", "gradient_norm"] is None or math.isnan(
        rows.loc["auxiliary.weight", "gradient_norm"]
    )


def test_symmetric_attenuation_is_seen_where_parameter_gradients_are_level() -> None:
    """V2: the ratio of parameter gradients stays near 1 while the gradient falls by a thousand."""
    report = gradflow.inspect(*zoo.FAULTY[2].build(0))
    weights = report.parameters.set_index("name")["gradient_norm"].filter(regex=r"layers.*weight")
    assert 0.2 < weights.iloc[0] / weights.iloc[-1] < 5
    assert report.profile.gain < 1e-3


@pytest.mark.parametrize(
    ("name", "expected"), [("I1a", "blocks.5"), ("I1b", "blocks.6–blocks.11"), ("Z1a", "blocks.4")]
)
def test_weak_and_dead_blocks_are_located(name: str, expected: str) -> None:
    case = next(case for case in FAULTY if case.name == name)
    report = gradflow.inspect(*case.build(0), trained=case.trained)
    assert [str(finding.location) for finding in loud(report)] == [expected]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("H6", "not reported: zero-initialised gate, opens by norm2.weight"),
        ("H7", "not reported: zero-initialised gate, opens by alpha"),
        ("H8", "no gradient arrives at the add"),
        ("H15", "not reported: zero-initialised gate, opens by up.weight"),
    ],
)
def test_a_zero_branch_of_a_healthy_model_is_said_to_be_one(name: str, words: str) -> None:
    case = next(case for case in HEALTHY if case.name == name)
    found = [f for f in gradflow.inspect(*case.build(0)).findings if f.rule == "GF204"]
    assert found
    assert [f.message for f in found if words not in f.message or f.severity is not Severity.INFO] == []
