"""The parts of the screen: numbers, chart, folding, the choice of rows, the order of findings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from gradflow.findings import Location, Severity
from gradflow.reporters import number_text as numbers
from gradflow.reporters.layer_choice import SHORT, choose, located, severity_marks, shown
from gradflow.reporters.layer_folding import fold_layers, unfolded
from gradflow.reporters.site_rows import SHORT as SHORT_SITES
from gradflow.reporters.site_rows import bars, counted, site_marks, site_table
from gradflow.reporters.terminal_chart import chart_lines, shape_chart
from gradflow.reporters.terminal_findings import beside_threshold, ranked
from gradflow.reporters.terminal_header import verdict
from gradflow.reporters.text_lines import fold_name, shorten
from gradflow.trace_model import Coverage, LayerRecord, TensorStatistics
from tests.screens import SCREENS, make_finding, make_report
from tests.traces import make_layer, make_residual, make_trace, make_trunk


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.0, "1"),
        (0.123456, "0.123"),
        (-0.5, "-0.5"),
        (12.3456, "12.3"),
        (999.4, "999"),
        (999.7, "1000"),
        (1234.5, "1234"),
        (12345.0, "1.23e+04"),
        (0.001, "0.001"),
        (0.000999, "9.99e-04"),
        (4.13e-9, "4.13e-09"),
        (4e-9, "4e-09"),
        (5e-324, "4.94e-324"),
        (math.nan, "NaN"),
        (math.inf, "Inf"),
        (-math.inf, "-Inf"),
    ],
)
def test_a_number_in_three_digits(value: float | None, text: str) -> None:
    assert numbers.number_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0%"),
        (1e-9, "<1%"),
        (0.5, "50%"),
        (0.9999, ">99%"),
        (1.0, "100%"),
        (math.nan, "NaN"),
    ],
)
def test_a_share_is_never_rounded_to_none_or_all(value: float | None, text: str) -> None:
    assert numbers.share_text(value) == text


@pytest.mark.parametrize(
    ("values", "middle", "span"),
    [
        ([], None, "–"),
        ([None, None], None, "–"),
        ([1.0, None, 3.0], 2.0, "1..3"),
        ([0.5, 0.501, 0.502], 0.501, "0.501"),
        ([23.0, 451.0], 237.0, "23..451"),
        ([4.1e-9, 1.0], 0.50000000205, "4.1e-09..1"),
    ],
)
def test_several_numbers_as_one(values: list[float | None], middle: float | None, span: str) -> None:
    assert numbers.middle(values) == middle
    assert numbers.range_text(values) == span


def test_a_broken_number_among_several_is_what_shows() -> None:
    assert numbers.range_text([1.0, math.inf, 2.0]) == "Inf"
    assert numbers.range_text([1.0, math.nan]) == "NaN"


GAIN = st.one_of(
    st.floats(min_value=1e-300, max_value=1e300), st.sampled_from([None, 0.0, math.nan, math.inf, 1.0])
)


@given(st.lists(GAIN, min_size=2, max_size=60), st.integers(60, 160), st.integers(1, 40))
def test_any_profile_fits_any_screen(gains: list[float | None], width: int, copies: int) -> None:
    trunk = make_trunk(gains * copies, names=[f"blocks.{k}.mlp" for k in range(len(gains) * copies)])
    lines = chart_lines(make_report(make_trace(trunk=trunk)), width)
    assert max(cell_len(line.plain.rstrip()) for line in lines) <= width


@given(st.lists(GAIN, min_size=2, max_size=2000), st.integers(60, 160))
def test_no_bar_hides_a_broken_gradient(gains: list[float | None], width: int) -> None:
    chart = shape_chart(gains, width, None)
    assert len(chart.bars) * chart.bar_width <= width - 9
    for at, bar in enumerate(chart.bars):
        part = gains[at * chart.tensors_per_bar : (at + 1) * chart.tensors_per_bar]
        broken = [gain for gain in part if gain is not None and not math.isfinite(gain)]
        if broken:
            assert bar is not None and not math.isfinite(bar)
        elif 0.0 in part:
            assert bar == 0.0


@given(st.lists(st.floats(min_value=1e-30, max_value=1e30), min_size=2, max_size=50))
def test_a_higher_gain_is_never_a_lower_bar(gains: list[float]) -> None:
    chart = shape_chart(gains, 80, None)
    heights = [chart.eighths(gain) for gain in sorted(gains)]
    assert heights == sorted(heights)
    assert heights[0] >= 1 and heights[-1] <= 8 * chart.height


def test_a_healthy_profile_looks_flat() -> None:
    heights = {shape_chart([1.1, 0.9, 1.0], 80, None).eighths(gain) for gain in (1.1, 0.9, 1.0)}
    assert max(heights) - min(heights) <= 3


def layers(*names: str, **changes: object) -> list[LayerRecord]:
    return [make_layer(name, order, **changes) for order, name in enumerate(names)]


def labels(rows: Sequence[LayerRecord], marks: dict[int, Severity] | None = None) -> list[str]:
    return [group.label for group in fold_layers(rows, marks or {})]


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a", "b"], ["a", "b"]),
        (["h.0", "h.1"], ["h.0", "h.1"]),
        (["h.0", "h.1", "h.2"], ["h.0–2"]),
        (["h.0", "h.1", "h.2", "h.4"], ["h.0–2", "h.4"]),
        (["h.0.a", "h.1.a", "h.2.a", "h.3.b"], ["h.0–2.a", "h.3.b"]),
        ([f"h.{k}.e.{j}.w" for k in range(3) for j in range(4)], ["h.0–2.e.0–3.w"]),
        ([f"s{k}.0" for k in range(3)], ["s0.0", "s1.0", "s2.0"]),
        (["", "10", "11", "12"], ["(model)", "10–12"]),
    ],
)
def test_numbered_siblings_that_look_alike_fold(names: list[str], folded: list[str]) -> None:
    assert labels(layers(*names)) == folded


def test_blocks_of_another_shape_coverage_or_mark_stay_apart() -> None:
    rows = layers(*(f"h.{k}" for k in range(6)))
    assert labels(rows, {3: Severity.ERROR}) == ["h.0–2", "h.3", "h.4", "h.5"]
    rows[3] = make_layer("h.3", 3, shape=(8, 4))
    assert labels(rows) == ["h.0–2", "h.3", "h.4", "h.5"]
    rows[3] = make_layer("h.3", 3, coverage=Coverage.FROZEN)
    assert labels(rows) == ["h.0–2", "h.3", "h.4", "h.5"]


def test_one_broken_layer_hides_no_sound_one() -> None:
    rows = layers(*(f"h.{k}" for k in range(4)))
    broken = replace(rows[3].activation or TensorStatistics(), rms=math.nan, nonfinite=7)
    rows[3] = make_layer("h.3", 3, activation=broken)
    assert labels(rows) == ["h.0–2", "h.3"]
    rows[3] = make_layer("h.3", 3, gradient_norm=math.nan, gradient_nonfinite=7)
    assert labels(rows) == ["h.0–2", "h.3"]


def test_calls_of_one_module_and_leaves_of_one_output_fold() -> None:
    calls = [make_layer("cell", k, call=k) for k in range(5)]
    assert labels(calls) == ["cell ×5"]
    assert labels(calls[:2]) == ["cell #0", "cell #1"]
    leaves = [make_layer("", k, output=f"hidden_states.{k}") for k in range(4)]
    assert labels([*leaves, make_layer("", 4, output="logits")]) == [
        "(model)[hidden_states.0–3]",
        "(model)[logits]",
    ]
    assert [group.label for group in unfolded(calls[:2], {})] == ["cell #0", "cell #1"]


@pytest.mark.parametrize("name", SCREENS)
def test_folding_loses_no_row(name: str) -> None:
    rows = SCREENS[name]().trace.layers
    groups = fold_layers(rows, {})
    assert sorted(member.order for group in groups for member in group.members) == [row.order for row in rows]


def test_a_range_marks_what_it_covers_and_a_place_wins_over_it() -> None:
    rows = layers("a", "b", "c", "d", "c.inner")
    wide = make_finding(location=Location(first="b", last="d"))
    near = make_finding(severity=Severity.WARNING, location=Location(first="c.weight"))
    assert severity_marks(rows, [wide, near]) == {
        1: Severity.ERROR,
        2: Severity.WARNING,
        3: Severity.ERROR,
    }
    assert located(rows, make_finding(location=Location(first="nowhere"))) == []


def test_a_module_never_called_is_no_end_of_a_range() -> None:
    rows = [
        *layers("h.0.fc", "h.1.fc", "head", ""),
        make_layer("h.1.unused", 4, coverage=Coverage.NEVER_CALLED),
    ]
    assert located(rows, make_finding(location=Location(first="h.0", last="h.1"))) == [0, 1]
    assert located(rows, make_finding(location=Location(first="h.1.unused", last="h.1.unused"))) == [4]


def test_a_finding_about_a_container_marks_what_is_in_it() -> None:
    rows = layers("encoder.stem", "encoder.norm", "encoders", "")
    assert located(rows, make_finding(location=Location(first="encoder"))) == [0, 1]
    assert located(rows, make_finding(location=Location(first="weight"))) == [3]


def test_long_tables_keep_what_findings_name_and_both_ends() -> None:
    rows = layers(*(f"l{k}" for k in range(300)))
    names = [rows[k].name for k in (17, 133, 288)]
    findings = [make_finding(location=Location(first=name)) for name in names]
    trunk = make_trunk([1.0] * 150 + [50.0] * 150, names=[row.name for row in rows])
    report = make_report(make_trace(layers=rows, trunk=trunk), *findings)
    groups, chosen = shown(report)
    assert len(groups) == 300
    assert SHORT - 5 <= len(chosen) <= SHORT + 5
    assert {"l0", "l299", "l149", "l150", *names} <= {group.label for group in chosen}
    assert [group.members[0].order for group in chosen] == sorted(group.members[0].order for group in chosen)


def test_a_short_table_is_whole() -> None:
    report = SCREENS["three_rows"]()
    groups = fold_layers(report.trace.layers, {})
    assert choose(groups, report) == groups


def test_consequences_follow_their_cause_and_none_is_lost() -> None:
    def at(rule: str, place: str, severity: Severity, cause: str | None = None) -> object:
        return make_finding(rule, location=Location(first=place), severity=severity, consequence_of=cause)

    findings = [
        at("GF104", "b", Severity.INFO, "GF303 a"),
        at("GF101", "c", Severity.WARNING),
        at("GF303", "a", Severity.ERROR),
        at("GF301", "x", Severity.INFO, "GF999 nowhere"),
        at("GF201", "p", Severity.INFO, "GF202 q"),
        at("GF202", "q", Severity.INFO, "GF201 p"),
        at("GF203", "self", Severity.INFO, "GF203 self"),
    ]
    placed = [(place.finding.rule, place.depth) for place in ranked(findings)]  # type: ignore[arg-type]
    assert placed[:4] == [("GF303", 0), ("GF104", 1), ("GF101", 0), ("GF301", 0)]
    assert sorted(rule for rule, _ in placed) == sorted(f.rule for f in findings)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "threshold", "text"),
    [
        (4.13e-9, 1e-5, "4.13e-09 < 1e-05"),
        (62.0, 50.0, "62 > 50"),
        (0.0200001, 0.02, "0.0200001 > 0.02"),
        (2.0, 2.0, "2 = 2"),
        (0.3, None, "0.3"),
        (None, 0.3, ""),
        (math.inf, 1e5, "Inf > 1e+05"),
    ],
)
def test_the_number_stands_beside_its_threshold(
    value: float | None, threshold: float | None, text: str
) -> None:
    assert beside_threshold(make_finding(value=value, threshold=threshold)) == text


def test_the_verdict_is_the_worst_root_cause_or_the_flow() -> None:
    assert verdict(SCREENS["non_finite"]()).rule == "GF303"
    assert verdict(SCREENS["non_finite"]()).subject == "non-finite activation"
    assert verdict(SCREENS["vanishing"]()).sentence.startswith("of the gradient at layers.18, 4.1e-09")
    healthy = verdict(SCREENS["healthy"]())
    assert (healthy.severity, healthy.rule) == (None, "")
    assert "2.68 ×" in healthy.sentence
    assert verdict(SCREENS["empty_trunk"]()).subject == "nothing found"


def test_a_long_name_breaks_at_its_dots_and_before_its_brackets() -> None:
    assert fold_name("encoder.layer.3[0]", 14) == ["encoder.layer.", "3[0]"]
    assert fold_name("(model)[encoder_last_hidden_state]", 30) == ["(model)", "[encoder_last_hidden_state]"]


@given(st.text(min_size=1, max_size=200), st.integers(8, 60))
def test_a_folded_name_is_the_name(name: str, limit: int) -> None:
    name = "".join(char for char in name if char.isprintable())
    pieces = fold_name(name, limit)
    assert "".join(pieces) == name
    assert all(cell_len(piece) <= limit for piece in pieces)
    assert cell_len(shorten(name, limit)) <= limit


@pytest.mark.parametrize(
    ("rhos", "width", "drawn"),
    [
        ([0.01, 0.0001, 3.0, 1e9], 8, "▁▁██"),
        ([0.0, None, math.inf, math.nan], 8, "0·✗✗"),
        ([0.5, 0.001, 1.0, 1.0], 2, "▁▇"),  # two sites a bar: the one furthest from 1
        ([0.5, 0.0, math.nan, 0.0], 2, "0✗"),
        ([], 8, ""),
    ],
)
def test_bars_of_rho(rhos: list[float | None], width: int, drawn: str) -> None:
    assert bars(rhos, width) == drawn


@given(st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=40))
def test_a_stronger_branch_is_never_a_lower_bar(rhos: list[float]) -> None:
    drawn = [bars([rho], 1) for rho in sorted(rhos)]
    assert drawn == sorted(drawn)


def test_a_row_of_sites_spans_their_rho_and_leaves_out_what_nobody_measured() -> None:
    sites = [make_residual(f"b.{k}", k, rho=0.1 * (k + 1), cosine=None) for k in range(4)]
    (row,) = site_table(make_report(make_trace(residuals=sites))).rows
    assert (row.cells["name"], row.cells["rho"], row.cells["cosine"]) == ("b.0–3", "0.1..0.4", "")
    assert row.cells["gradient"] == "×1.1"
    assert row.rhos == tuple(0.1 * (k + 1) for k in range(4))


def test_unlike_sites_do_not_share_a_row() -> None:
    """Another kind, another branch, or another finding each ends a range."""
    sites = [make_residual(f"b.{k}", k) for k in range(9)]
    sites[3] = make_residual("b.3", 3, kind="projection")
    sites[6] = make_residual("b.6", 6, branch_ops=("linear",))
    report = make_report(make_trace(residuals=sites))
    assert [row.cells["name"] for row in site_table(report).rows] == [
        "b.0–2",
        "b.3",
        "b.4",
        "b.5",
        "b.6",
        "b.7",
        "b.8",
    ]


def test_only_rules_about_blocks_mark_sites() -> None:
    sites = [make_residual(f"b.{k}", k) for k in range(4)]
    near = make_finding("GF201", location=Location(first="b.1"), severity=Severity.WARNING)
    grows = make_finding("GF202", location=Location(first="b.0", last="b.2"), severity=Severity.ERROR)
    assert site_marks(sites, [near, grows, make_finding("GF101", location=Location(first="b.3"))]) == {
        0: Severity.ERROR,
        1: Severity.WARNING,
        2: Severity.ERROR,
    }


def test_a_long_table_of_sites_keeps_the_ends_and_what_findings_name() -> None:
    sites = [make_residual(f"b{k}", k) for k in range(90)]
    finding = make_finding("GF201", location=Location(first="b47"))
    table = site_table(make_report(make_trace(residuals=sites), finding))
    names = [row.cells["name"] for row in table.rows]
    assert len(names) == SHORT_SITES and table.left_out == 90 - SHORT_SITES
    assert {"b0", "b47", "b89"} <= set(names)
    assert len(site_table(make_report(make_trace(residuals=sites)), show_all=True).rows) == 90


def test_sites_are_counted_by_kind() -> None:
    sites = [make_residual("a", kind="projection"), make_residual("b"), make_residual("c")]
    assert counted(sites) == "3 sites: 1 projection, 2 identity"
    assert counted(sites[1:]) == "2 identity sites"
    assert counted(sites[:1]) == "1 projection site"


@pytest.mark.parametrize(("gain", "flows"), [(2e-3, True), (9e-4, False), (9e3, True), (2e4, False)])
def test_a_silenced_rule_is_no_proof_that_the_gradient_flows(gain: float, flows: bool) -> None:
    said = verdict(make_report(make_trace(trunk=make_trunk([gain, 1.0]))))
    assert said.severity is None
    assert said.subject == ("the gradient flows" if flows else "nothing found")
