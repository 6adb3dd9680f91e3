"""GF201 to GF207 on literal traces: one row on each side of every limit, and every exemption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from traces import BATCH, make_layer, make_parameter, make_residual, make_trace, make_trunk

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules import find_rule
from gradflow.rules.gf202_residual_growth import measure
from gradflow.rules.sites import main_stream
from gradflow.trace_model import Coverage, OverwrittenSkip, ResidualRecord, Trace

INFO, WARNING, ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR


def said(code: str, trace: Trace) -> list[Finding]:
    return list(find_rule(code).check(trace, Config()))


def told(code: str, residuals: Sequence[ResidualRecord], **trace: Any) -> list[tuple[Severity, str]]:
    found = said(code, make_trace(residuals=residuals, **trace))
    return [(finding.severity, str(finding.location)) for finding in found]


def blocks(rhos: Sequence[float | None], **changes: Any) -> list[ResidualRecord]:
    """One identity site a block with these rho, ``blocks.0``, ``blocks.1`` ..."""
    return [make_residual(f"blocks.{k}", k, **({"rho": rho} | changes)) for k, rho in enumerate(rhos)]


# GF201


@pytest.mark.parametrize(
    ("rho", "usual", "severity"),
    [
        (0.0249, 0.5, WARNING),
        (0.0251, 0.5, INFO),  # above 0.05 of the usual: small, and does not stand out
        (0.051, 0.5, None),
        (0.049, 2.0, WARNING),
        (0.051, 2.0, None),  # below 0.05 of the usual, but not small
        (0.5, 0.5, None),
    ],
)
def test_a_block_that_stands_out_at_initialisation(
    rho: float, usual: float, severity: Severity | None
) -> None:
    expected = [] if severity is None else [(severity, "blocks.3")]
    assert told("GF201", blocks([usual, usual, usual, rho, usual])) == expected


@pytest.mark.parametrize(
    ("rho", "usual", "severity"),
    [
        (0.0099, 0.1, WARNING),
        (0.0101, 0.1, None),  # no info about trained blocks
        (0.0499, 1.0, WARNING),
        (0.0501, 1.0, None),
    ],
)
def test_a_trained_block(rho: float, usual: float, severity: Severity | None) -> None:
    expected = [] if severity is None else [(severity, "blocks.3")]
    assert told("GF201", blocks([usual, usual, usual, rho, usual]), trained=True) == expected


@pytest.mark.parametrize(("rho", "severity"), [(0.0499, INFO), (0.0501, None)])
def test_evenly_small_blocks(rho: float, severity: Severity | None) -> None:
    expected = [] if severity is None else [(severity, "blocks.0–blocks.5")]
    assert told("GF201", blocks([rho] * 6)) == expected


def test_evenly_small_blocks_after_training_are_one_warning() -> None:
    assert told("GF201", blocks([0.0099] * 6), trained=True) == [(WARNING, "blocks.0–blocks.5")]


@pytest.mark.parametrize(("others", "severity"), [(1, INFO), (2, WARNING)])
def test_fewer_than_three_alike_have_no_usual_value(others: int, severity: Severity) -> None:
    sites = blocks([0.5] * others + [1e-4])
    assert told("GF201", sites) == [(severity, f"blocks.{others}")]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("weak", "expected"),
    [
        ([4], ["blocks.4"]),
        (range(6, 12), ["blocks.6–blocks.11"]),  # the deep half
        (range(3, 12), ["blocks.3–blocks.11"]),  # most of them: the median itself is weak
        ([0, 5, 11], ["blocks.0", "blocks.5", "blocks.11"]),
    ],
)
def test_what_stands_out_is_located(weak: Sequence[int], expected: list[str], trained: bool) -> None:
    """Two sites a block, each judged against those at its own place."""
    sites = []
    for block in range(12):
        for index, usual in enumerate((0.2, 0.6)):
            rho = usual * (1e-3 if block in weak else 1 / math.sqrt(block + 1))
            like = f"Block #{index} identity"
            sites.append(make_residual(f"blocks.{block}", len(sites), index=index, rho=rho, like=like))
    assert told("GF201", sites, trained=trained) == [(WARNING, place) for place in expected]


def test_another_make_is_no_measure() -> None:
    strong = blocks([1.0] * 6)
    weak = [make_residual(f"late.{k}", 6 + k, rho=0.04, like="Other #0 identity") for k in range(6)]
    assert told("GF201", [*strong, *weak]) == [(INFO, "late.0–late.5")]


@pytest.mark.parametrize(
    ("small", "stages", "trained", "expected"),
    [
        ([0, 1], (2, 4, 4), False, [(INFO, "blocks.0–blocks.1")]),  # the whole stage: its width
        ([0], (2, 4, 4), False, [(WARNING, "blocks.0")]),  # one of the two
        ([0], (1, 4, 5), False, [(WARNING, "blocks.0")]),  # a stage of one tells nothing of its width
        ([0, 1], (10,), False, [(WARNING, "blocks.0–blocks.1")]),  # no stages
        (
            [0, 1],
            (2, 4, 4),
            True,
            [(WARNING, "blocks.0–blocks.1")],
        ),  # what training left so small is another matter
    ],
)
def test_a_whole_stage_is_small_by_its_width(
    small: Sequence[int], stages: Sequence[int], trained: bool, expected: list[tuple[Severity, str]]
) -> None:
    sites = blocks([0.002 if k in small else 0.5 for k in range(10)])
    shapes = [(4, 8 * 2**stage, 6, 6) for stage, depth in enumerate(stages) for _ in range(depth)]
    sites = [replace(site, shape=shape) for site, shape in zip(sites, shapes, strict=True)]
    assert told("GF201", sites, trained=trained) == expected


@pytest.mark.parametrize(("weak", "severity"), [(4, INFO), (3, WARNING)])
def test_a_whole_tower_is_small_by_its_stream(weak: int, severity: Severity) -> None:
    """An image's patches are 35 times as large as a text's embeddings, and the blocks of both one class: AIMv2."""
    text = [make_residual(f"text.layers.{k}", k, rho=0.5) for k in range(6)]
    vision = [make_residual(f"vision.layers.{k}", 6 + k, rho=0.01 if k < weak else 0.4) for k in range(4)]
    assert told("GF201", [*text, *vision]) == [(severity, f"vision.layers.0–vision.layers.{weak - 1}")]


HEALTHY_RHO = {
    "depth alone": [1 / math.sqrt(k + 1) for k in range(48)],
    "zero-gamma after 60 steps": [0.058, 0.093, 0.07, 0.06, 0.081, 0.075, 0.09, 0.064, 0.071],
    "GPT-2": [0.15 + 0.005 * k for k in range(12)],
    "ResNet-20": [0.69, 1.4, 0.9, 0.8, 0.71, 1.1, 1.0, 0.75, 0.7],
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rhos", HEALTHY_RHO.values(), ids=HEALTHY_RHO)
def test_healthy_blocks(rhos: list[float], trained: bool) -> None:
    assert told("GF201", blocks(rhos), trained=trained) == []


@pytest.mark.parametrize("rho", [None, 0.0, math.nan, math.inf])
def test_a_rho_that_says_nothing_about_the_block(rho: float | None) -> None:
    assert told("GF201", blocks([0.5, 0.5, rho, 0.5])) == []


@pytest.mark.parametrize("kind", ["gated", "concat", "low_rank", "opaque"])
def test_kinds_without_a_rho(kind: str) -> None:
    assert told("GF201", blocks([0.5, 0.5, 1e-6, 0.5], kind=kind)) == []


def test_the_message_ranks_and_states_what_it_leaves_out() -> None:
    sites = [
        *blocks([0.5, 0.25, 1e-4, 0.5]),
        make_residual("gate", 4, rho=0.0, branch_norm=0.0, opened_by=("gate.bn2.weight",)),
    ]
    (finding,) = said("GF201", make_trace(residuals=sites))
    facts = dict(finding.evidence)
    assert (
        "0.0001 of the skip's norm (warning below 0.025); 0.5 is usual among the 4 alike" in finding.message
    )
    assert (finding.value, finding.threshold) == (1e-4, pytest.approx(0.025))
    assert facts["ranking"] == "gate 0, blocks.2 0.0001, blocks.1 0.25, blocks.0 0.5, blocks.3 0.5"
    assert facts["not_reported"] == "zero-initialised gate, opens by bn2.weight"


def test_a_layer_scale_is_named() -> None:
    (finding,) = said("GF201", make_trace(residuals=blocks([1e-5] * 6, branch_scale=1e-5)))
    assert finding.severity is INFO
    assert "gated; the factor on it is 1e-05" in finding.message


# GF202


def stream(variances: Sequence[float], **changes: Any) -> list[ResidualRecord]:
    return [make_residual(f"blocks.{k}", k, std=math.sqrt(v), **changes) for k, v in enumerate(variances)]


@pytest.mark.parametrize(
    ("gamma", "severity"), [(1.149, None), (1.151, INFO), (1.249, INFO), (1.251, WARNING), (2.0, WARNING)]
)
def test_growth(gamma: float, severity: Severity | None) -> None:
    expected = [] if severity is None else [(severity, "blocks.8–blocks.15")]
    assert told("GF202", stream([gamma**k for k in range(16)])) == expected


@pytest.mark.parametrize(("gain", "severity"), [(0.99e4, WARNING), (1.01e4, ERROR)])
def test_growth_with_an_exploding_gradient(gain: float, severity: Severity) -> None:
    trunk = make_trunk([gain, 1.0], kind="residual")
    sites = stream([2.0**k for k in range(16)])
    assert told("GF202", sites, trunk=trunk) == [(severity, "blocks.8–blocks.15")]
    # Without growth the gradient is left to GF102.
    assert told("GF202", stream([1.2**k for k in range(16)]), trunk=trunk) == [(INFO, "blocks.8–blocks.15")]
    assert told("GF202", stream([1.0] * 16), trunk=trunk) == []


@pytest.mark.parametrize(("last", "severity"), [(65400.0, WARNING), (65600.0, ERROR)])
def test_growth_out_of_float16(last: float, severity: Severity) -> None:
    sites = stream([last**2 / 4.0 ** (15 - k) for k in range(16)])
    assert told("GF202", sites, dtype="float16") == [(severity, "blocks.8–blocks.15")]
    under_autocast = [make_layer("blocks.0", dtype="float16")]
    assert told("GF202", sites, layers=under_autocast) == [(severity, "blocks.8–blocks.15")]
    assert told("GF202", sites, dtype="bfloat16") == [(WARNING, "blocks.8–blocks.15")]


def test_the_projection_goes_on_where_float16_has_overflowed() -> None:
    sites = stream([4.0**k for k in range(16)])
    lost = [make_residual(f"blocks.{16 + k}", 16 + k, std=math.inf) for k in range(2)]
    (finding,) = said("GF202", make_trace(residuals=[*sites, *lost], dtype="float16"))
    assert finding.severity is ERROR
    assert "it reaches 1.31e+05" in finding.message  # 2^17


@pytest.mark.parametrize(("sites", "judged"), [(6, False), (7, True), (8, True)])
def test_a_trend_needs_four_sites_in_the_last_half(sites: int, judged: bool) -> None:
    assert bool(told("GF202", stream([2.0**k for k in range(sites)]))) is judged


@pytest.mark.parametrize(
    ("power", "sites", "severity"),
    [
        (1, 8, None),  # independent branches: variance l + 1
        (1, 48, None),
        (2, 8, INFO),  # all aligned: (l + 1)^2
        (2, 12, INFO),
        (2, 48, None),
    ],
)
def test_a_normalised_stream(power: int, sites: int, severity: Severity | None) -> None:
    found = told("GF202", stream([(k + 1.0) ** power for k in range(sites)]))
    assert [found_severity for found_severity, _ in found] == [severity] * (severity is not None)


def test_one_block_is_no_trend() -> None:
    assert told("GF202", stream([1.0] * 12 + [50.0] + [50.0] * 3)) == []


STAGES = [2.0**stage * (1 + 0.02 * block) for stage in range(8) for block in range(4)]
"""Eight stages of four blocks; the variance doubles only from stage to stage."""


def test_a_projection_and_another_shape_give_the_stream_a_new_variance() -> None:
    plain = stream(STAGES)
    projected = [
        make_residual(s.name, k, std=s.std, kind="identity" if k % 4 else "projection")
        for k, s in enumerate(plain)
    ]
    reshaped = [
        make_residual(s.name, k, std=s.std, shape=(BATCH, 2 ** (k // 4))) for k, s in enumerate(plain)
    ]
    assert measure(tuple(plain)).gamma == pytest.approx(2**0.25, rel=0.02)
    assert measure(tuple(projected)).gamma == measure(tuple(reshaped)).gamma == pytest.approx(1.02, rel=0.01)


@pytest.mark.parametrize(
    ("stages", "growth", "severity"),
    [
        ([3, 4, 6, 3], 2.0, WARNING),  # ResNet-50 without normalisation
        ([3, 4, 6, 3], 0.0, None),  # and with it: 2, 3, 4 ... in each stage
        ([9, 9, 9], 0.0, None),  # ResNet-56
        ([1, 2, 3, 2, 2], 2.0, None),  # MobileNetV2: no stretch is long enough
        ([2, 2, 2, 2], 2.0, None),  # ResNet-18
    ],
)
def test_networks_in_stages(stages: list[int], growth: float, severity: Severity | None) -> None:
    variances = [growth**k if growth else k + 2.0 for length in stages for k in range(length)]
    first = {sum(stages[:k]) for k in range(len(stages))}
    sites = [
        make_residual(f"blocks.{k}", k, std=math.sqrt(v), kind="projection" if k in first else "identity")
        for k, v in enumerate(variances)
    ]
    assert [found for found, _ in told("GF202", sites)] == [severity] * (severity is not None)


def test_the_stream_is_not_what_stands_inside_its_branches() -> None:
    outer = stream([1.0 + k for k in range(20)])
    inner = [make_residual(f"blocks.0.inner.{k}", 20 + k, std=2.0**k, parent=0) for k in range(10)]
    assert told("GF202", [*outer, *inner]) == []
    growth = measure(main_stream(make_trace(residuals=[*outer, *inner])))
    assert growth is not None
    assert [site.name for site in growth.sites] == [f"blocks.{k}" for k in range(10, 20)]


@pytest.mark.parametrize(("enters", "names"), [(1.0, "text.layers"), (math.sqrt(16), "vision.layers")])
def test_streams_are_told_apart(enters: float, names: str) -> None:
    """Another list of blocks is another stream where it does not go on from the last sum."""
    vision = [make_residual(f"vision.layers.{k}", k, std=math.sqrt(k + 1)) for k in range(16)]
    text = [
        make_residual(f"text.layers.{k}", 16 + k, std=math.sqrt(k + 2), source_std=enters if k == 0 else 1.0)
        for k in range(20)
    ]
    stream_found = main_stream(make_trace(residuals=[*vision, *text]))
    assert stream_found[0].name == f"{names}.0"
    assert len(stream_found) == (20 if enters == 1.0 else 36)


def test_a_long_skip_around_everything_leaves_the_stream_to_be_judged() -> None:
    inner = [make_residual(f"blocks.{k}", k, std=2.0**k, parent=16) for k in range(16)]
    assert told("GF202", [*inner, make_residual("", 16)]) == [(WARNING, "blocks.8–blocks.15")]


def test_thousands_of_blocks_are_fitted_at_once() -> None:
    growth = measure(tuple(stream([1.01**k for k in range(5000)])))
    assert growth is not None
    assert growth.gamma == pytest.approx(1.01)


@pytest.mark.parametrize(
    ("rho", "severity"), [(9.99, None), (10.01, WARNING), (1e6, WARNING), (math.inf, None), (math.nan, None)]
)
def test_a_branch_that_drowns_its_skip(rho: float, severity: Severity | None) -> None:
    expected = [] if severity is None else [(severity, "blocks.1")]
    assert told("GF202", blocks([0.5, rho, 0.5])) == expected


@pytest.mark.parametrize(
    ("enters", "trained", "severity"),
    [(0.099, False, INFO), (0.101, False, WARNING), (0.02, True, WARNING), (None, False, WARNING)],
)
def test_a_branch_over_a_small_embedding(enters: float | None, trained: bool, severity: Severity) -> None:
    sites = blocks([15.0, 0.5, 0.5], source_std=enters)
    assert told("GF202", sites, trained=trained) == [(severity, "blocks.0")]


def test_the_share_of_the_skip_is_stated() -> None:
    (finding,) = said("GF202", make_trace(residuals=blocks([0.5, 20.0, 0.5])))
    assert "20 times as large as the skip (warning above 10)" in finding.message
    assert "0.249% of the energy" in finding.message


# GF203


def overwritten(rebound: bool | None, line: int = 12) -> OverwrittenSkip:
    source = "" if rebound is None else f"model.py:{line}"
    return OverwrittenSkip(op="relu", name="blocks.0.body.0", source=source, rebound=rebound)


@pytest.mark.parametrize(("rebound", "severity"), [(True, None), (False, WARNING), (None, INFO)])
def test_an_overwritten_skip(rebound: bool | None, severity: Severity | None) -> None:
    sites = [make_residual("blocks.0", overwritten=overwritten(rebound)), make_residual("blocks.1", 1)]
    assert told("GF203", sites) == ([] if severity is None else [(severity, "blocks.0")])


def test_one_line_that_overwrites_many_skips_is_one_finding() -> None:
    sites = [make_residual(f"blocks.{k}", k, overwritten=overwritten(False)) for k in range(4)]
    other = make_residual("head", 4, source="model.py:50", overwritten=overwritten(False, 44))
    found = said("GF203", make_trace(residuals=[*sites, other]))
    assert [str(f.location) for f in found] == ["blocks.0–blocks.3", "head"]
    assert "overwritten by the in-place relu at model.py:12" in found[0].message
    assert "in blocks.0.body.0 at model.py:44" in found[1].message


# GF204

GATE = ("blocks.0.bn2.weight",)
OWN = ("blocks.0.conv2.weight", "blocks.0.bn2.weight", "blocks.0.bn2.bias")


def dead(**changes: Any) -> ResidualRecord:
    values = {"branch_norm": 0.0, "rho": 0.0, "branch_parameters": OWN}
    return make_residual("blocks.0", **(values | changes))


MEASURED = [make_parameter(name, gradient_norm=0.0) for name in OWN[:2]] + [make_parameter(OWN[2])]
FROZEN = [make_parameter(name, requires_grad=False, gradient_norm=None) for name in OWN]
DETACHED = [make_parameter(name, gradient_norm=None, coverage=Coverage.NO_GRAD) for name in OWN]


@pytest.mark.parametrize(
    ("site", "parameters", "trained", "severity", "words"),
    [
        (
            dead(opened_by=GATE),
            MEASURED,
            False,
            INFO,
            "not reported: zero-initialised gate, opens by bn2.weight",
        ),
        (dead(opened_by=GATE), MEASURED, True, ERROR, "still does after training"),
        (dead(), MEASURED, False, ERROR, "dead"),
        (dead(), MEASURED, True, ERROR, "dead"),
        (dead(), FROZEN, False, INFO, "frozen"),
        (dead(), DETACHED, False, INFO, "no gradient was measured"),
        (dead(branch_parameters=()), MEASURED, False, INFO, "no gradient was measured"),
        (dead(gradient_norm=0.0), MEASURED, False, INFO, "no gradient arrives"),
        (dead(kind="low_rank", opened_by=GATE), MEASURED, False, INFO, "zero-initialised gate"),
        (dead(branch_norm=1e-30), MEASURED, False, None, ""),
        (dead(branch_norm=None), MEASURED, False, None, ""),
        (dead(kind="concat"), MEASURED, False, None, ""),
    ],
)
def test_a_branch_of_zeros(
    site: ResidualRecord, parameters: list[Any], trained: bool, severity: Severity | None, words: str
) -> None:
    found = said("GF204", make_trace(residuals=[site], parameters=parameters, trained=trained))
    assert [f.severity for f in found] == [severity] * (severity is not None)
    assert [f.message for f in found if words not in f.message] == []


@pytest.mark.parametrize(("mode", "severity"), [("train", INFO), ("mixed", INFO), ("eval", ERROR)])
@pytest.mark.parametrize("drop", ["StochasticDepth", "DropPath", "SwinDropPath"])
def test_a_branch_left_out_at_random(mode: str, severity: Severity, drop: str) -> None:
    layers = [make_layer("blocks.0.drop", type=drop), make_layer("blocks.0", 1)]
    sites = [dead()]
    assert told("GF204", sites, parameters=MEASURED, layers=layers, mode=mode) == [(severity, "blocks.0")]


def test_zero_initialised_sites_are_one_finding_and_dead_ones_are_located() -> None:
    gates = [
        make_residual(f"blocks.{k}", k, branch_norm=0.0, opened_by=(f"blocks.{k}.bn2.weight",), kind=kind)
        for k, kind in enumerate(["identity", "projection", "identity", "identity"])
    ]
    (finding,) = said("GF204", make_trace(residuals=gates))
    assert str(finding.location) == "blocks.0–blocks.3"
    assert finding.message.startswith("The branches of 4 sites in blocks.0–blocks.3 return exactly 0")
    assert dict(finding.evidence)["not_reported"] == "zero-initialised gate, opens by bn2.weight"

    corpses = [
        make_residual(f"blocks.{k}", k, branch_parameters=OWN, branch_norm=0.0 if k in (1, 2, 5) else 1.0)
        for k in range(6)
    ]
    found = told("GF204", corpses, parameters=MEASURED)
    assert found == [(ERROR, "blocks.1–blocks.2"), (ERROR, "blocks.5")]


# GF207


def test_a_broadcast_stream() -> None:
    sites = [
        make_residual("blocks.0"),
        make_residual("blocks.1", 1, broadcast=True, shape=(BATCH, BATCH)),
        make_residual("blocks.2", 2, broadcast=True, shape=(BATCH, BATCH)),
    ]
    (finding,) = said("GF207", make_trace(residuals=sites))
    assert (finding.severity, str(finding.location)) == (WARNING, "blocks.1–blocks.2")
    assert f"broadcast to {BATCH}×{BATCH}" in finding.message


@pytest.mark.parametrize("code", ["GF201", "GF202", "GF203", "GF204", "GF207"])
def test_healthy_sites_and_no_sites(code: str) -> None:
    assert told(code, []) == []
    assert told(code, blocks([0.5] * 12)) == []
    unmeasured = [
        make_residual(f"blocks.{k}", k, rho=None, branch_norm=None, skip_norm=None, std=None)
        for k in range(12)
    ]
    assert told(code, unmeasured) == []


def test_several_adds_of_the_root_are_told_apart() -> None:
    sites = [
        make_residual("", k, index=k, rho=1e-5 if k == 2 else 0.5, like="Net identity") for k in range(5)
    ]
    (finding,) = said("GF201", make_trace(residuals=sites))
    assert finding.message.startswith("The branch of the model (add 2) (model.py:31) adds 1e-05")
