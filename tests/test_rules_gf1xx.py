"""GF101 to GF104 on literal traces: one row on each side of every limit, and every exemption."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import (
    BATCH,
    make_activation,
    make_layer,
    make_layers,
    make_origin,
    make_parameter,
    make_trace,
    make_trunk,
)

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules import find_rule
from gradflow.trace_model import Coverage, GraphCut, ParameterRecord, TensorStatistics, Trace, Trunk

INFO, WARNING, ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR


def said(code: str, trace: Trace) -> list[Finding]:
    return list(find_rule(code).check(trace, Config()))


def verdict(code: str, trunk: Trunk, **run: Any) -> Severity | None:
    findings = said(code, make_trace(trunk=trunk, **run))
    assert len(findings) <= 1
    return findings[0].severity if findings else None


def even(gain: float, tensors: int) -> list[float]:
    """Gradients that lose the same share in every layer, ``gain`` in all."""
    steps = tensors - 1
    return [gain ** ((steps - k) / steps) for k in range(tensors)]


# GF101


@pytest.mark.parametrize(
    ("gain", "severity"),
    [
        (1.0, None),
        (0.0201, None),
        (0.0199, INFO),
        (0.009, INFO),  # default-initialised VGG-6
        (1.01e-3, INFO),
        (0.99e-3, WARNING),
        (1.01e-5, WARNING),
        (0.99e-5, ERROR),
        (1e-30, ERROR),
    ],
)
def test_vanishing_by_what_is_left_in_all(gain: float, severity: Severity | None) -> None:
    assert verdict("GF101", make_trunk(even(gain, 60))) is severity


@pytest.mark.parametrize(
    ("gain", "share", "severity"),
    [
        (2.9e-5, 0.99e-3, ERROR),
        (2.9e-5, 1.01e-3, WARNING),
        (3.1e-5, 0.99e-3, WARNING),
        (0.5, 1e-9, None),
        (2.9e-5, None, WARNING),
    ],
)
def test_vanishing_where_the_signal_is_lost_too(
    gain: float, share: float | None, severity: Severity | None
) -> None:
    """Biases hold up the size of what no longer differs between samples."""
    trunk = make_trunk(even(gain, 60), signals=[1.0] * 59 + [share])
    assert verdict("GF101", trunk) is severity
    if severity is ERROR:
        (finding,) = said("GF101", make_trace(trunk=trunk))
        assert "where samples have become alike" in finding.message


@pytest.mark.parametrize(
    ("gain", "tensors", "severity"),
    [
        (0.271, 3, None),
        (0.269, 3, WARNING),
        (0.269, 2, None),  # one layer is no slope
        (0.408, 3, None),  # nn.Linear as it comes, ReLU
        (0.236, 4, WARNING),  # sigmoid
    ],
)
def test_vanishing_by_the_slope(gain: float, tensors: int, severity: Severity | None) -> None:
    assert verdict("GF101", make_trunk([gain ** (tensors - 1 - k) for k in range(tensors)])) is severity


@pytest.mark.parametrize(
    ("drop", "severity"),
    [(9.9, None), (10.1, WARNING), (990.0, WARNING), (1010.0, ERROR)],
)
def test_vanishing_by_one_layer(drop: float, severity: Severity | None) -> None:
    # What comes before it grows again, so that only the drop speaks.
    gradients = [drop, drop, 1.0, 1.0, drop, drop]
    findings = said("GF101", make_trace(trunk=make_trunk(gradients)))
    assert [f.severity for f in findings] == [severity] * (severity is not None)
    if findings:
        assert str(findings[0].location) == "layers.3–layers.4"
        assert findings[0].value == pytest.approx(drop)


def test_a_loss_in_one_place_is_located_there_and_an_even_one_is_not() -> None:
    single = said("GF101", make_trace(trunk=make_trunk([1e-6] * 5 + [1.0] * 5)))[0]
    evenly = said("GF101", make_trace(trunk=make_trunk(even(1e-6, 10))))[0]
    assert str(single.location) == "layers.4–layers.5"
    assert str(evenly.location) == "layers.0–layers.9"
    assert single.severity is evenly.severity is ERROR
    assert (evenly.value, evenly.threshold) == (pytest.approx(1e-6), 1e-5)


@pytest.mark.parametrize(
    ("gain", "width", "severity"),
    [
        # Ten layers: sd = 0.5·sqrt(50/width); 3 sd is 5.303 at width 4 and 0.530 at width 400.
        (math.exp(-5.2), 4, None),
        (math.exp(-5.4), 4, INFO),
        (math.exp(-5.2), 400, INFO),
        (math.exp(-5.2), 0, INFO),  # no width known: nothing is excused
        (0.6e-3, 2, None),  # warning level, and still within 3 sd = 7.5
    ],
)
def test_what_a_narrow_net_does_by_chance(gain: float, width: int, severity: Severity | None) -> None:
    assert verdict("GF101", make_trunk(even(gain, 11), width=width)) is severity


def test_chance_never_excuses_an_error() -> None:
    gain = 0.9e-5
    assert abs(math.log(gain)) < 3 * 0.5 * math.sqrt(5 * 20 / 1)
    assert verdict("GF101", make_trunk(even(gain, 21), width=1)) is ERROR


def test_averaging_over_positions_is_no_loss() -> None:
    sides = [(BATCH, 16, 28, 28), (BATCH, 16, 14, 14), (BATCH, 16, 7, 7), (BATCH, 16, 1, 1)]
    pooled = make_trunk([0.4**3 / 28, 0.4**2 / 14, 0.4 / 7, 1.0], shapes=sides, width=16)
    lost = make_trunk([0.4**3 / 28, 0.4**2 / 14, 0.4 / 7, 1.0])
    assert verdict("GF101", replace(pooled, points=pooled.points[1:])) is INFO  # J is 0.011
    assert verdict("GF101", replace(lost, points=lost.points[1:])) is WARNING
    assert (
        verdict("GF101", make_trunk([1 / 20, 1.0], shapes=[(BATCH, 16, 20, 20), (BATCH, 16)], width=16))
        is None
    )
    assert verdict("GF101", make_trunk([1 / 20, 1.0])) is WARNING


def test_the_time_axis_is_info_only() -> None:
    names = ["cell"] * 100
    calls = tuple(make_layer("cell", order=k, call=k, type="LSTMCell") for k in range(100))
    trunk = make_trunk(even(6e-21, 100), names=names, op="lstm_cell")
    for trace in (
        make_trace(trunk=trunk, layers=calls),
        make_trace(trunk=replace(trunk, points=tuple(replace(p, layer=None) for p in trunk.points))),
    ):
        (finding,) = said("GF101", trace)
        assert finding.severity is INFO
        assert str(finding.location) == "cell"
        assert ("axis", "time") in finding.evidence
    stacked = make_trunk(even(6e-21, 4), names=["lstm.0", "lstm.1", "lstm.2", "lstm.3"], op="lstm")
    assert verdict("GF101", stacked) is ERROR


def test_a_functional_net_in_one_module_is_depth_and_not_time() -> None:
    assert verdict("GF101", make_trunk(even(1e-6, 10), names=[""] * 10)) is ERROR


def test_an_exact_zero_is_an_error_where_the_gradient_ends() -> None:
    (finding,) = said("GF101", make_trace(trunk=make_trunk([0.0, 0.0, 0.5, 1.0])))
    assert finding.severity is ERROR
    assert str(finding.location) == "layers.1–layers.2"
    assert "exactly 0" in finding.message


def test_a_zero_initialised_layer_is_info() -> None:
    trunk = make_trunk([0.0, 0.0, 0.5, 1.0])
    zero = make_parameter("layers.2.weight", norm=0.0)
    awake = make_parameter("layers.2.weight")
    assert [f.severity for f in said("GF101", make_trace(trunk=trunk, parameters=[zero]))] == [INFO]
    assert [f.severity for f in said("GF101", make_trace(trunk=trunk, parameters=[awake]))] == [ERROR]


@pytest.mark.parametrize(
    "gradients",
    [
        [],
        [1.0],
        [None, None, 1.0],
        [0.0, 0.0, 0.0],
        [math.nan, math.nan, 1.0],
        [math.inf, 1.0],
        [0.5, math.inf],
        [0.9, 0.0, 1.0],  # the gradient took another way around the zero
        [1.0, 0.0],
    ],
)
def test_vanishing_is_silent_where_nothing_can_be_said(gradients: Sequence[float | None]) -> None:
    assert verdict("GF101", make_trunk(gradients)) is None


def test_unmeasured_tensors_are_stepped_over() -> None:
    (finding,) = said("GF101", make_trace(trunk=make_trunk([None, 1e-6, None, 1e-3, 1.0])))
    assert finding.severity is ERROR
    assert str(finding.location).startswith("layers.1")


@pytest.mark.parametrize(
    ("gain", "signal", "half", "words"),
    [
        (1e-6, 1e-6, "forward", "fades alike going forward (×1e-06)"),
        (1e-6, 0.95, "backward", "survives going forward (×0.95)"),
        (1e4, 0.95, "backward", "does not grow alike going forward (×0.95)"),
        (1e4, 1e4, "forward", "grows alike going forward (×1e+04)"),
    ],
)
def test_the_responsible_half_is_named(gain: float, signal: float, half: str, words: str) -> None:
    trunk = make_trunk(even(gain, 10), signals=[signal ** (k / 9) for k in range(10)])
    (finding,) = said("GF101" if gain < 1 else "GF102", make_trace(trunk=trunk))
    assert ("responsible_half", half) in finding.evidence
    assert words in finding.message


def test_the_two_halves_add_up_to_ln_j() -> None:
    shapes = [(BATCH, 16 * (k + 1)) for k in range(5)]
    trunk = make_trunk(even(1e-4, 5), shapes=shapes)
    rms = [1.0, 0.5, 0.3, 0.2, 0.1]
    points = tuple(
        replace(p, activation=TensorStatistics(rms=r)) for p, r in zip(trunk.points, rms, strict=True)
    )
    facts = dict(said("GF101", make_trace(trunk=replace(trunk, points=points)))[0].evidence)
    assert facts["ln_forward_half"] == pytest.approx(math.log(0.1 * math.sqrt(5)))
    assert facts["ln_forward_half"] + facts["ln_backward_half"] == pytest.approx(math.log(1e-4))
    assert "signal_gain" not in facts  # not measured is left out


@pytest.mark.parametrize(
    ("types", "kind", "word"),
    [
        (["Linear", "Sigmoid"], "weights", "sigmoid"),
        (["Linear", "Tanh"], "weights", "xavier"),
        (["Linear", "ReLU"], "weights", "kaiming"),
        (["Linear", "ReLU"], "residual", "pre-norm"),
    ],
)
def test_the_hint_fits_the_net(types: list[str], kind: str, word: str) -> None:
    layers = tuple(make_layer(f"layers.{k}", order=k, type=types[k % 2]) for k in range(30))
    (finding,) = said("GF101", make_trace(trunk=make_trunk(even(1e-6, 30), kind=kind), layers=layers))
    assert word in finding.hint


# GF102


@pytest.mark.parametrize(
    ("gain", "severity"),
    [
        (1.0, None),
        (9.6, None),  # ResNet-20 without batch normalisation
        (19.9, None),
        (20.1, INFO),
        (74.0, INFO),  # 26 layers of plain batch normalisation
        (99.0, INFO),
        (101.0, WARNING),
        (5e4, WARNING),
        (0.99e5, WARNING),
        (1.01e5, ERROR),
        (math.inf, ERROR),
    ],
)
def test_exploding_behind_skips(gain: float, severity: Severity | None) -> None:
    gradients = [math.inf, 1.0, 1.0] if gain == math.inf else even(gain, 30)
    assert verdict("GF102", make_trunk(gradients, kind="residual")) is severity
    # Batch normalisation relaxes in a few steps, and has the same limit.
    plain = make_trunk(gradients, batch_norm=True)
    assert verdict("GF102", plain) is severity


@pytest.mark.parametrize(
    ("gain", "severity"),
    [
        (19.9, None),
        (20.1, INFO),
        (99.0, INFO),
        (101.0, WARNING),
        (0.99e4, WARNING),
        (1.01e4, ERROR),
        (math.inf, ERROR),
    ],
)
def test_exploding_without_skips(gain: float, severity: Severity | None) -> None:
    trunk = make_trunk([math.inf, 1.0, 1.0]) if gain == math.inf else make_trunk(even(gain, 30))
    assert verdict("GF102", trunk) is severity


@pytest.mark.parametrize(
    ("gain", "first", "last", "severity"),
    [
        (39.0, 0.5, 0.01, INFO),
        (41.0, 0.5, 0.01, WARNING),
        (41.0, 0.5, 0.049, WARNING),
        (41.0, 0.5, 0.051, INFO),  # keeps a tenth of what was common
        (41.0, 0.21, 0.01, WARNING),
        (41.0, 0.19, 0.01, INFO),  # little was common to begin with
        (41.0, None, None, INFO),
        (1.01e4, 0.5, 0.01, ERROR),
    ],
)
def test_layers_that_make_like_samples_unlike(
    gain: float, first: float | None, last: float | None, severity: Severity
) -> None:
    trunk = make_trunk(even(gain, 48))
    points = [
        replace(point, activation=TensorStatistics(rms=1.0, signal=1.0, common_mode=mode))
        for point, mode in zip(trunk.points, (first, *[last] * 47), strict=True)
    ]
    chaotic = replace(trunk, points=tuple(points))
    assert verdict("GF102", chaotic) is severity
    if severity is WARNING:
        assert verdict("GF102", chaotic, trained=True) is INFO
        assert verdict("GF102", replace(chaotic, kind="residual")) is INFO
        assert verdict("GF102", replace(chaotic, batch_norm=True)) is INFO


@pytest.mark.parametrize(
    ("gain", "width", "severity"),
    [(math.exp(5.2), 4, None), (math.exp(5.4), 4, WARNING), (math.exp(5.2), 400, WARNING), (2e5, 1, ERROR)],
)
def test_exploding_by_chance(gain: float, width: int, severity: Severity | None) -> None:
    assert verdict("GF102", make_trunk(even(gain, 11), width=width)) is severity


def test_plain_batch_norm_is_named_and_to_be_measured_again() -> None:
    plain = make_trunk(even(4e2, 32), batch_norm=True)
    (finding,) = said("GF102", make_trace(trunk=plain))
    assert finding.severity is WARNING
    assert "batch normalisation without skips" in finding.message
    assert "after 20" in finding.hint
    (trained,) = said("GF102", make_trace(trunk=plain, trained=True))
    assert "after 20" not in trained.hint
    (skips,) = said("GF102", make_trace(trunk=make_trunk(even(4e4, 32), batch_norm=True, kind="residual")))
    assert "batch normalisation" not in skips.message


@pytest.mark.parametrize(
    ("gain", "trained", "severity"),
    [
        (503.0, False, INFO),  # ResNet-101 as torchvision initialises it
        (1904.0, False, INFO),  # ResNet-152
        (503.0, True, WARNING),
        (0.99e4, False, INFO),
        (1.01e4, False, WARNING),
        (1.01e5, False, ERROR),
    ],
)
def test_normalised_residual_blocks_grow_at_first(gain: float, trained: bool, severity: Severity) -> None:
    trunk = make_trunk(even(gain, 32), batch_norm=True, kind="residual")
    (finding,) = said("GF102", make_trace(trunk=trunk, trained=trained))
    assert finding.severity is severity


def test_one_rise_is_located() -> None:
    (finding,) = said("GF102", make_trace(trunk=make_trunk([1e4, 1e4, 1.0, 1.0])))
    assert str(finding.location) == "layers.1–layers.2"


@pytest.mark.parametrize("gradients", [[], [1.0], [5.0, 0.0], [math.nan, 1.0], [None, 1.0], [1e9, math.inf]])
def test_exploding_is_silent_where_nothing_can_be_said(gradients: Sequence[float | None]) -> None:
    assert verdict("GF102", make_trunk(gradients)) is None


@pytest.mark.parametrize("gradients", [[1e-300, 1e300], [1e300, 1e-300], [5e-324, 1.0, 1.7e308]])
def test_the_ends_of_the_float_range_raise_nothing(gradients: list[float]) -> None:
    expected = "GF101" if gradients[0] < 1 else "GF102"
    assert verdict(expected, make_trunk(gradients)) is ERROR


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=14), st.sampled_from([1e4, 1e-4]))
def test_the_loss_scale_moves_no_verdict(logs: list[float], scale: float) -> None:
    plain = make_trunk([10**x for x in logs], width=64)
    scaled = make_trunk([scale * 10**x for x in logs], width=64)
    for code in ("GF101", "GF102"):
        before, after = said(code, make_trace(trunk=plain)), said(code, make_trace(trunk=scaled))
        assert [(f.severity, f.location) for f in before] == [(f.severity, f.location) for f in after]


# GF103

DETACH = GraphCut(op="detach", module="encoder", where="", source="model.py:31")
LOST: dict[str, Any] = {
    "gradient_norm": None,
    "gradient_nonfinite": None,
    "elasticity": None,
    "gradient_ratio": None,
}


def lost(name: str, coverage: Coverage = Coverage.NO_GRAD, **changes: Any) -> ParameterRecord:
    return make_parameter(name, coverage=coverage, **LOST, **changes)


def frozen(name: str) -> ParameterRecord:
    return lost(name, Coverage.FROZEN, requires_grad=False)


def zero(name: str) -> ParameterRecord:
    return make_parameter(name, gradient_norm=0.0, elasticity=0.0, gradient_ratio=0.0)


GOOD = make_parameter("head.weight")


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ([GOOD], []),
        ([GOOD, make_parameter("a.weight", gradient_norm=0.0)], []),  # exactly zero is a gradient
        ([GOOD, make_parameter("a.weight", in_optimizer=True)], []),
        ([GOOD, make_parameter("a.weight", in_optimizer=None)], []),  # not checked
        ([GOOD, lost("a.weight", shape=(0, 4))], []),
        ([GOOD, make_parameter("a.weight", coverage=Coverage.BYPASSED)], []),
        ([frozen("a.weight"), GOOD], [(INFO, "a", "frozen")]),
        ([frozen("a.weight"), frozen("b.weight")], [(INFO, "a–b", "frozen")]),
        ([lost("a.weight", Coverage.NEVER_CALLED), GOOD], [(WARNING, "a", "never called")]),
        ([lost("mask_token", Coverage.UNUSED), GOOD], [(INFO, "mask_token", "not consumed")]),
        ([lost("pooler.dense.weight"), GOOD], [(WARNING, "pooler.dense", "output not used by the loss")]),
        (
            [lost("pooler.dense.weight", cut=GraphCut(op="", module="pooler", where="", source="")), GOOD],
            [(WARNING, "pooler.dense", "output not used by the loss")],
        ),
        ([lost("encoder.fc.weight", cut=DETACH), GOOD], [(ERROR, "encoder", "graph cut")]),
        ([lost("encoder.fc.weight", cut=DETACH)], [(ERROR, "encoder", "graph cut")]),
        ([lost("a.weight"), lost("b.weight")], [(ERROR, "a–b", "no gradient anywhere")]),
        ([zero("a.weight"), zero("b.weight")], [(ERROR, "a–b", "zero gradient everywhere")]),
        ([zero("a.weight"), GOOD], []),
        (
            [zero("a.weight"), frozen("b.weight"), lost("c.weight", Coverage.NEVER_CALLED)],
            [
                (INFO, "b", "frozen"),
                (ERROR, "a", "zero gradient everywhere"),
                (WARNING, "c", "never called"),
            ],
        ),
        (
            [lost("a.weight"), frozen("b.weight"), lost("c.weight", Coverage.NEVER_CALLED)],
            [
                (INFO, "b", "frozen"),
                (ERROR, "a", "no gradient anywhere"),
                (ERROR, "c", "no gradient anywhere"),
            ],
        ),
        ([make_parameter("a.weight", in_optimizer=False), GOOD], [(ERROR, "a", "not in the optimizer")]),
        # Named once, by the first cause that applies.
        (
            [lost("a.weight", Coverage.NEVER_CALLED, in_optimizer=False), GOOD],
            [(WARNING, "a", "never called")],
        ),
        (
            [lost("a.weight", Coverage.FROZEN, requires_grad=False, in_optimizer=False), GOOD],
            [(INFO, "a", "frozen")],
        ),
    ],
)
def test_each_cause_is_told_apart(
    parameters: list[ParameterRecord], expected: list[tuple[Severity, str, str]]
) -> None:
    findings = said("GF103", make_trace(parameters=parameters))
    assert [(f.severity, str(f.location), dict(f.evidence)["cause"]) for f in findings] == expected


@pytest.mark.parametrize(
    "why",
    [
        {"loss_values": (0.0,)},  # nothing left to learn
        {"activations": [make_activation("a", inactive=1.0)]},  # GF301 says so
        {"layers": [make_layer("a", activation=TensorStatistics(absmax=0.0))]},  # GF304 says so
    ],
)
def test_zeros_that_something_else_explains_are_left_to_it(why: dict[str, Any]) -> None:
    assert said("GF103", make_trace(parameters=[zero("a.weight")], **why)) == []
    # A probe has no loss values, and its gradient is never 0 by itself.
    (finding,) = said("GF103", make_trace(parameters=[zero("a.weight")], loss_values=()))
    assert finding.severity is ERROR


def test_a_cut_names_the_op_the_place_and_what_it_costs() -> None:
    parameters = [lost("encoder.a.weight", cut=DETACH), lost("encoder.b.weight", cut=DETACH), GOOD]
    (finding,) = said("GF103", make_trace(parameters=parameters))
    assert finding.message == (
        "The graph is cut after encoder by detach in the model's own forward (model.py:31): 2 parameters "
        "(512 elements) before it without a gradient (0 allowed)"
    )
    assert (finding.value, finding.threshold) == (2.0, 0.0)
    assert "detach" in finding.hint


def test_two_cuts_are_two_findings() -> None:
    argmax = GraphCut(op="argmax", module="router", where="router", source="")
    parameters = [lost("encoder.weight", cut=DETACH), lost("router.weight", cut=argmax), GOOD]
    findings = said("GF103", make_trace(parameters=parameters))
    assert [str(f.location) for f in findings] == ["encoder", "router"]
    assert "softmax" in findings[1].hint


def test_a_whole_encoder_under_no_grad_is_one_finding() -> None:
    names = [f"encoder.layers.{k}" for k in range(6)]
    cuts = [GraphCut(op="no_grad", module=name, where=name, source="") for name in names]
    parameters = [lost(f"{name}.weight", cut=cut) for name, cut in zip(names, cuts, strict=True)]
    (finding,) = said("GF103", make_trace(parameters=[*parameters, GOOD]))
    assert str(finding.location) == "encoder.layers"
    assert finding.severity is ERROR
    assert "no_grad" in finding.message


@pytest.mark.parametrize(
    ("names", "bad", "expected"),
    [
        (["a.weight", "a.bias", "b.weight"], {"a.weight", "a.bias"}, ["a"]),
        (["a.weight", "a.bias", "b.weight"], {"a.bias"}, ["a.bias"]),
        (["a.weight", "b.weight", "c.weight"], {"a.weight", "b.weight"}, ["a–b"]),
        (["a.weight", "b.weight", "c.weight"], {"a.weight", "c.weight"}, ["a", "c"]),
        (["aux.0.weight", "aux.2.weight", "head.weight"], {"aux.0.weight", "aux.2.weight"}, ["aux"]),
        (["scale", "head.weight"], {"scale"}, ["scale"]),
    ],
)
def test_neighbours_with_one_cause_are_one_finding(
    names: list[str], bad: set[str], expected: list[str]
) -> None:
    parameters = [lost(n, Coverage.NEVER_CALLED) if n in bad else make_parameter(n) for n in names]
    findings = said("GF103", make_trace(parameters=parameters))
    assert [str(f.location) for f in findings] == expected
    assert sum(int(f.value or 0) for f in findings) == len(bad)


def test_many_frozen_runs_are_one_finding() -> None:
    parameters = []
    for k in range(10):
        parameters += [frozen(f"layers.{k}.base.weight"), make_parameter(f"layers.{k}.lora.weight")]
    (finding,) = said("GF103", make_trace(parameters=parameters))
    assert finding.value == 10.0
    assert str(finding.location) == "layers.0.base–layers.9.base"


def drop_layers(mode: str, ran: int) -> list[tuple[Severity, str]]:
    parameters = [make_parameter(f"layers.{k}.fc.weight") for k in range(ran)]
    parameters += [lost(f"layers.{ran}.fc.weight", Coverage.NEVER_CALLED), GOOD]
    return [
        (f.severity, str(f.location)) for f in said("GF103", make_trace(parameters=parameters, mode=mode))
    ]


def test_layer_drop_is_info_in_train_mode_only() -> None:
    assert drop_layers("train", 4) == [(INFO, "layers.4.fc")]
    assert drop_layers("train", 3) == [(WARNING, "layers.3.fc")]
    assert drop_layers("eval", 4) == [(WARNING, "layers.4.fc")]


# GF104


def bad_gradient(name: str, order: int, count: int = 5) -> Any:
    return make_layer(name, order, gradient_norm=math.nan, gradient_nonfinite=count)


def test_the_backward_blames_its_first_producer() -> None:
    layers = [bad_gradient("a", 0), bad_gradient("b", 1), make_layer("c", 2), make_layer("", 3)]
    origin = make_origin("backward", "b", op="sqrt", value="nan", count=7, last_finite="c")
    (finding,) = said("GF104", make_trace(layers=layers, origins=[origin]))
    assert (finding.severity, str(finding.location), finding.value) == (ERROR, "b", 7.0)
    assert "sqrt in b (model.py:31)" in finding.message
    assert "the last finite one is c" in finding.message
    assert "eps" in finding.hint


def test_without_an_origin_the_last_layer_is_blamed() -> None:
    layers = [bad_gradient("a", 0), bad_gradient("b.0", 1), bad_gradient("b", 2), make_layer("c", 3)]
    (finding,) = said("GF104", make_trace(layers=layers))
    assert str(finding.location) == "b.0"  # b only passes on what b.0 has
    assert ("last_finite", "c") in finding.evidence


def test_gradients_of_parameters_alone_are_named() -> None:
    parameters = [make_parameter("a.weight", gradient_nonfinite=2, gradient_norm=math.nan), GOOD]
    (finding,) = said("GF104", make_trace(parameters=parameters))
    assert (str(finding.location), finding.value) == ("a", 2.0)


@pytest.mark.parametrize(
    "trace",
    [
        make_trace(layers=make_layers("a", "b"), parameters=[GOOD]),
        make_trace(layers=[make_layer("a", gradient_norm=None, gradient_nonfinite=None)]),
        make_trace(origins=[make_origin("forward", "a")]),
    ],
)
def test_finite_gradients_are_silent(trace: Trace) -> None:
    assert said("GF104", trace) == []


# What every finding of these rules holds


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("GF101", lambda: make_trace(trunk=make_trunk(even(1e-6, 10)))),
        ("GF102", lambda: make_trace(trunk=make_trunk(even(1e6, 10)))),
        ("GF103", lambda: make_trace(parameters=[lost("encoder.fc.weight", cut=DETACH), GOOD])),
        ("GF104", lambda: make_trace(layers=[bad_gradient("a", 0)])),
    ],
)
def test_a_finding_is_whole(code: str, make: Callable[[], Trace]) -> None:
    (finding,) = said(code, make())
    rule = find_rule(code)
    assert (finding.rule, finding.slug) == (rule.code, rule.slug)
    assert finding.message and finding.why and finding.hint
    assert finding.value is not None
    assert finding.threshold in {limit.value for limit in rule.thresholds}
    assert all(fact == fact for _, fact in finding.evidence)
