"""Which rules speak, in which order, and who is the root cause."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from traces import (
    make_layer,
    make_layers,
    make_origin,
    make_parameter,
    make_residual,
    make_trace,
    make_trunk,
)

from gradflow.analyzer import analyze, find
from gradflow.config import Config
from gradflow.errors import UsageError
from gradflow.findings import Finding, Location, Severity
from gradflow.rules import RULES, find_rule, select_rules
from gradflow.rules.pages import pages, render_page
from gradflow.rules.places import ancestry, place_of, runs, span_of, spans
from gradflow.rules.precedence import CONSEQUENCES, Consequence, anywhere, attribute
from gradflow.trace_model import (
    ActivationRecord,
    Coverage,
    GraphCut,
    ParameterRecord,
    ResidualRecord,
    TensorStatistics,
    Trace,
)
from gradflow.trunk_profile import profile

DOCS = Path(__file__).resolve().parents[1] / "docs" / "rules"
CUT = GraphCut(op="detach", module="layers.1", where="", source="")
NAMES = [f"layers.{k}" for k in range(6)]


def lost(name: str, cut: GraphCut | None = None) -> ParameterRecord:
    return make_parameter(
        name,
        coverage=Coverage.NO_GRAD if cut else Coverage.NEVER_CALLED,
        gradient_norm=None,
        gradient_nonfinite=None,
        cut=cut,
    )


def told(trace: Trace, config: Config | None = None) -> list[tuple[str, str, str, str | None]]:
    findings = find(trace, config or Config())
    return [(f.rule, f.severity.value, str(f.location), f.consequence_of) for f in findings]


def sick() -> Trace:
    """Vanishes, has an unused head, a frozen part and a cut."""
    parameters = [
        lost("layers.0.weight", CUT),
        make_parameter("layers.3.weight"),
        make_parameter("stem.weight", requires_grad=False, gradient_norm=None, coverage=Coverage.FROZEN),
        lost("aux.weight"),
    ]
    trunk = make_trunk([None, None, 1e-6, 1e-4, 1e-2, 1.0])
    return make_trace(layers=make_layers("stem", *NAMES, "aux"), parameters=parameters, trunk=trunk)


def test_a_healthy_trace_has_no_findings_and_a_profile() -> None:
    trace = make_trace(parameters=[make_parameter("layers.0.weight")])
    report = analyze(trace, Config())
    assert report.findings == ()
    assert report.trace is trace
    assert report.profile == profile(trace.trunk)


def test_findings_come_worst_first_then_in_execution_order() -> None:
    assert told(sick()) == [
        ("GF103", "error", "layers.1", None),
        ("GF101", "error", "layers.2–layers.5", None),  # after the cut: not its consequence
        ("GF103", "warning", "aux", None),
        ("GF103", "info", "stem", None),
    ]


def test_the_order_of_the_rows_moves_nothing() -> None:
    trace = sick()
    shuffled = list(trace.layers)
    random.Random(0).shuffle(shuffled)
    assert told(replace(trace, layers=tuple(shuffled))) == told(trace)
    assert find(trace, Config()) == find(trace, Config())


@pytest.mark.parametrize(
    ("select", "ignore", "codes"),
    [
        (("GF",), (), [rule.code for rule in RULES]),
        (("GF1",), (), ["GF101", "GF102", "GF103", "GF104", "GF105", "GF106"]),
        (("GF103", "GF303"), (), ["GF103", "GF303"]),
        (("gf101",), (), ["GF101"]),
        (("GF",), ("GF1", "GF3", "GF4"), ["GF201", "GF202", "GF203", "GF204", "GF205", "GF206", "GF207"]),
        (("GF101",), ("GF101",), []),
        ((), (), []),
    ],
)
def test_selecting(select: tuple[str, ...], ignore: tuple[str, ...], codes: list[str]) -> None:
    assert [rule.code for rule in select_rules(select, ignore)] == codes


@pytest.mark.parametrize(
    ("config", "nearest"),
    [
        (Config(select=("GF1O1",)), "GF101"),
        (Config(select=("",)), "GF"),
        (Config(ignore=("GF333",)), "GF303"),
        (Config(select=("GF9",)), "GF1, GF2, GF3?"),
        (Config(select=("gf",), ignore=("G7",)), "GF"),
    ],
)
def test_a_selector_of_nothing_names_the_nearest(config: Config, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"selects no rule; did you mean {nearest}"):
        find(make_trace(), config)


def test_finding_a_rule() -> None:
    assert find_rule("gf102").code == find_rule("exploding-gradient").code == "GF102"
    with pytest.raises(UsageError, match="did you mean vanishing-gradient"):
        find_rule("vanishing-gradients")
    with pytest.raises(UsageError, match="did you mean GF103"):
        find_rule("GF1O3")


def test_only_the_selected_rules_speak() -> None:
    assert {rule for rule, *_ in told(sick(), Config(ignore=("GF103",)))} == {"GF101"}


# Root causes


def nan_from(name: str) -> Trace:
    """A log of zero in the middle: everything after it is NaN, and so is every gradient."""
    at = NAMES.index(name)
    layers = [
        make_layer(
            n,
            k,
            activation=TensorStatistics(nonfinite=4 * (k >= at)),
            gradient_norm=math.nan,
            gradient_nonfinite=9,
        )
        for k, n in enumerate(NAMES)
    ]
    origins = [make_origin("forward", name), make_origin("backward", NAMES[-1], op="linear")]
    trunk = make_trunk([math.inf] * 5 + [1.0], names=NAMES)
    return make_trace(layers=layers, trunk=trunk, origins=origins, loss_values=(math.nan,))


def test_a_nan_of_the_forward_explains_every_gradient() -> None:
    assert told(nan_from("layers.2")) == [
        ("GF303", "error", "layers.2", None),
        ("GF102", "info", "layers.0–layers.5", "GF303 layers.2"),
        ("GF104", "info", "layers.5", "GF303 layers.2"),
    ]


def test_a_rule_that_may_not_speak_explains_nothing() -> None:
    without = told(nan_from("layers.2"), Config(ignore=("GF303",)))
    assert without == [
        ("GF104", "error", "layers.5", None),
        ("GF102", "info", "layers.0–layers.5", "GF104 layers.5"),
    ]


@pytest.mark.parametrize(("at", "explained"), [("layers.3", True), ("layers.0", False)])
def test_a_nan_of_the_backward_explains_what_lies_before_it(at: str, explained: bool) -> None:
    trunk = make_trunk([1e-6, 1e-4, 1e-2, 1.0], names=NAMES[1:5])
    trace = make_trace(layers=make_layers(*NAMES), trunk=trunk, origins=[make_origin("backward", at)])
    found = {rule: (severity, cause) for rule, severity, _, cause in told(trace)}
    assert found["GF104"] == ("error", None)
    assert found["GF101"] == (("info", f"GF104 {at}") if explained else ("error", None))


@pytest.mark.parametrize(("cut_at", "explained"), [("layers.4", True), ("layers.3", False)])
def test_a_cut_explains_only_what_lies_wholly_before_it(cut_at: str, explained: bool) -> None:
    trunk = make_trunk([1e-6, 1e-4, 1e-2, 1.0], names=NAMES[1:5])
    cut = replace(CUT, module=cut_at)
    trace = make_trace(
        layers=make_layers(*NAMES),
        trunk=trunk,
        parameters=[lost("layers.0.weight", cut), make_parameter("layers.5.weight")],
    )
    found = {rule: (severity, cause) for rule, severity, _, cause in told(trace)}
    assert found["GF101"] == (("info", f"GF103 {cut_at}") if explained else ("error", None))


def growing(std: float = 2.0) -> list[ResidualRecord]:
    return [make_residual(f"layers.{k}", k, std=std**k) for k in range(16)]


def test_growth_and_explosion_are_both_reported() -> None:
    trunk = make_trunk([2.0 ** (20 - 20 * k / 15) for k in range(16)], kind="residual")
    assert told(make_trace(trunk=trunk, residuals=growing())) == [
        ("GF102", "error", "layers.0–layers.15", None),
        ("GF202", "error", "layers.8–layers.15", None),
    ]


@pytest.mark.parametrize("at", [0, 7, 12])
def test_a_nan_of_the_forward_explains_the_growth_after_it(at: int) -> None:
    origin = make_origin("forward", f"layers.{at}")
    layers = [
        make_layer(f"layers.{k}", k, activation=TensorStatistics(nonfinite=4 * (k >= at))) for k in range(16)
    ]
    trace = make_trace(layers=layers, residuals=growing(), origins=[origin])
    found = {rule: (severity, cause) for rule, severity, _, cause in told(trace)}
    assert found["GF202"] == ("info", f"GF303 layers.{at}")


@pytest.mark.parametrize(
    ("block", "unit", "explained"),
    [
        ("blocks.4", "blocks.4.act", True),
        ("blocks.4", "blocks.4", True),  # a function called in the forward that adds
        ("blocks.4", "blocks.5.act", False),
        ("", "blocks.4.act", False),  # the model's own forward adds
    ],
)
def test_a_dead_branch_explains_the_dead_units_in_it(block: str, unit: str, explained: bool) -> None:
    where = [f"blocks.{k}.{part}" for k in range(8) for part in ("norm", "linear", "act")]
    corpse = make_residual(block, branch_norm=0.0, branch_parameters=("blocks.4.linear.weight",))
    units = ActivationRecord(
        order=0, name=unit, op="relu", call=0, layer=None, units=16, observations=1000, inactive=1.0
    )
    trace = make_trace(
        layers=make_layers(*where),
        residuals=[corpse],
        parameters=[make_parameter("blocks.4.linear.weight", gradient_norm=0.0)],
    )
    found = {
        rule: (severity, cause) for rule, severity, _, cause in told(replace(trace, activations=(units,)))
    }
    assert found["GF204"] == ("error", None)
    assert found["GF301"] == (("info", f"GF204 {block}") if explained else ("error", None))


def test_an_unused_head_explains_nothing() -> None:
    trunk = make_trunk([1e-6, 1.0], names=NAMES[:2])
    trace = make_trace(
        layers=make_layers(*NAMES, "aux"),
        trunk=trunk,
        parameters=[lost("aux.weight"), make_parameter("layers.0.weight")],
    )
    assert told(trace) == [
        ("GF101", "error", "layers.0–layers.1", None),
        ("GF103", "warning", "aux", None),
    ]


def test_a_chain_of_consequences_names_the_root() -> None:
    def finding(rule: str) -> Finding:
        where = Location(first="a")
        return Finding(
            rule=rule, slug="", severity=Severity.ERROR, location=where, message="", why="", hint=""
        )

    rows = (
        Consequence(cause="GF901", effects=("GF902",), region=anywhere),
        Consequence(cause="GF902", effects=("GF903",), region=anywhere),
    )
    found = attribute([finding("GF903"), finding("GF902"), finding("GF901")], {}, rows)
    assert [f.consequence_of for f in found] == ["GF901 a", "GF901 a", None]
    assert [f.severity for f in found] == [Severity.INFO, Severity.INFO, Severity.ERROR]


def test_causes_never_lead_back_and_name_rules_that_exist() -> None:
    codes = {rule.code for rule in RULES}
    effects: dict[str, set[str]] = {}
    for row in CONSEQUENCES:
        assert {row.cause, *row.effects} <= codes
        effects.setdefault(row.cause, set()).update(row.effects)

    def reached(code: str) -> set[str]:
        direct = effects.get(code, set())
        return direct.union(*(reached(effect) for effect in direct))

    assert not [code for code in effects if code in reached(code)]


# Places


def test_spans_hold_what_is_inside() -> None:
    known = spans(make_trace(layers=make_layers("a", "b.0", "b.1.norm", "c")))
    assert known["b"] == (1, 2)
    assert known[""] == (0, 3)
    assert span_of(Location(first="a", last="b"), known) == (0, 2)
    assert span_of(Location(first="b.1.norm.weight"), known) == (2, 2)  # a parameter: its module
    assert span_of(Location(first="nowhere.at.all"), known) == (0, 3)


def test_ancestry_ends_at_the_root() -> None:
    assert list(ancestry("a.b.c")) == ["a.b.c", "a.b", "a", ""]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [({"a"}, [("a",)]), ({"a", "b"}, [("a", "b")]), ({"a", "c", "d"}, [("a",), ("c", "d")]), (set(), [])],
)
def test_runs_of_neighbours(wanted: set[str], expected: list[tuple[str, ...]]) -> None:
    assert runs(wanted, ["a", "b", "c", "d"]) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x.a", "x.b"], "x"),  # all of x
        (["x.a", "x.b", "y"], "x.a–y"),
        (["y", "z.q.a"], "y–z.q.a"),
        (["z.q.a", "z.q.b"], "z.q"),  # the innermost that holds them, though z holds nothing else
        (["z.q.a"], "z.q.a"),
    ],
)
def test_the_shortest_location(names: list[str], expected: str) -> None:
    everything = ["x.a", "x.b", "y", "z.q.a", "z.q.b"]
    assert str(place_of(names, everything)) == expected


# Pages


def test_codes_and_slugs_are_unique_and_in_order() -> None:
    codes = [rule.code for rule in RULES]
    assert codes == sorted(set(codes))
    assert len({rule.slug for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_page_is_whole(rule: object) -> None:
    assert rule in RULES
    page = render_page(rule)
    for section in ("What it means", "Formula", "Thresholds", "What to try", "A failing example", "Sources"):
        body = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
        assert len(body.strip()) > 10, section
    for limit in rule.thresholds:
        assert f"| {limit.severity} | {limit.name} {limit.value:g} | " in page
        assert f" | {limit.source} |" in page


def test_the_pages_in_docs_are_the_rules_own() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
    assert written == pages(), "run `python -m gradflow.rules.pages docs/rules`"
