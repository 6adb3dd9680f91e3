"""A baseline knows a finding again wherever it moved, and a worse one it does not know."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow import baseline
from gradflow.baseline import KnownFinding, compare, dumps, known_findings, load, loads, renewed, save
from gradflow.errors import UsageError
from gradflow.findings import Finding, Location, Severity
from gradflow.trace_model import Trace
from tests.traces import make_layer, make_trace

CODES = ("GF101", "GF103", "GF204")
KINDS = ("Linear", "Block", "Attention")


def make_finding(place: str, severity: str = "error", rule: str = "GF101", **changes: object) -> Finding:
    first, _, last = place.partition("–")
    values: dict[str, object] = {"value": 1e-6, "threshold": 1e-5}
    return Finding(
        rule=rule,
        slug="some-rule",
        severity=Severity(severity),
        location=Location(first=first, last=last),
        message="m",
        why="w",
        hint="h",
        **(values | changes),  # type: ignore[arg-type]
    )


def trace_of(*names: str, type: str = "Linear") -> Trace:
    return make_trace(layers=[make_layer(name, order, type=type) for order, name in enumerate(names)])


def accept(*findings: Finding, trace: Trace | None = None) -> tuple[KnownFinding, ...]:
    return known_findings("net", findings, trace or trace_of("blocks.0"))


def new_and_gone(
    known: Sequence[KnownFinding], *findings: Finding, trace: Trace | None = None, target: str = "net"
) -> tuple[list[str], list[str]]:
    result = compare(target, findings, trace or trace_of("blocks.0"), known, codes=CODES)
    new = [str(finding.location) for finding in result.findings if not finding.known]
    return new, [line.location for line in result.gone]


@pytest.mark.parametrize(
    ("accepted", "found", "new", "gone"),
    [
        (["blocks.3"], ["blocks.3"], [], []),
        (["blocks.3"], ["blocks.4"], [], []),
        (["blocks.3–blocks.8"], ["blocks.4–blocks.11"], [], []),
        (["layer1.0.conv1"], ["layer2.1.conv2"], [], []),
        (["blocks.3"], ["head"], ["head"], ["blocks.3"]),
        (["blocks.3"], ["blocks.3", "blocks.5"], ["blocks.5"], []),
        (["blocks.5"], ["blocks.3", "blocks.5"], ["blocks.3"], []),
        (["blocks.3", "blocks.5"], ["blocks.5"], [], ["blocks.3"]),
        ([], ["blocks.3"], ["blocks.3"], []),
        (["blocks.3"], [], [], ["blocks.3"]),
        ([""], [""], [], []),
    ],
)
def test_like_findings_are_counted(
    accepted: list[str], found: list[str], new: list[str], gone: list[str]
) -> None:
    known = accept(*map(make_finding, accepted))
    assert new_and_gone(known, *map(make_finding, found)) == (new, gone)


@pytest.mark.parametrize(
    ("before", "after", "is_new"),
    [
        ({"severity": "warning"}, {"severity": "error", "value": 1e-3}, True),
        ({"severity": "error"}, {"severity": "warning", "value": 1e-3}, False),
        ({"value": 1e-6}, {"value": 3e-7}, False),
        ({"severity": "warning", "value": 1.02e-5}, {"severity": "error", "value": 0.99e-5}, False),
        ({"severity": "warning", "value": 1.2e-5}, {"severity": "error", "value": 0.99e-5}, True),
        ({"severity": "warning", "value": None}, {"severity": "error", "value": None}, True),
        ({}, {"rule": "GF204"}, True),
        ({"evidence": (("cause", "unused"),)}, {"evidence": (("cause", "graph cut"),)}, True),
        ({"evidence": (("width", 3),)}, {"evidence": (("width", 4),)}, False),
    ],
)
def test_what_makes_a_finding_another(
    before: dict[str, object], after: dict[str, object], is_new: bool
) -> None:
    known = accept(make_finding("blocks.0", **before))  # type: ignore[arg-type]
    assert bool(new_and_gone(known, make_finding("blocks.0", **after))[0]) is is_new  # type: ignore[arg-type]


def test_another_kind_of_module_or_another_target_is_another_finding() -> None:
    known = accept(make_finding("net.0"), trace=trace_of("net.0"))
    assert new_and_gone(known, make_finding("net.3"), trace=trace_of("net.3", type="Conv2d"))[0]
    assert new_and_gone(known, make_finding("net.0"), trace=trace_of("net.0"), target="other") == (
        ["net.0"],
        [],
    )


def test_a_milder_finding_does_not_use_up_the_place_of_a_worse_one() -> None:
    known = accept(make_finding("b.1", "warning"), make_finding("b.2", "error"))
    moved = [make_finding("b.2", "warning", value=5.0), make_finding("b.3", "error", value=6.0)]
    assert new_and_gone(known, *moved) == ([], [])


def test_a_rule_that_did_not_run_is_not_gone() -> None:
    known = accept(make_finding("blocks.0", rule="GF204"))
    assert compare("net", (), trace_of("blocks.0"), known, codes=("GF101",)).gone == ()


layer_findings = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.sampled_from(["", "norm1", "attn.q"]),
        st.sampled_from(list(Severity)),
        st.sampled_from(CODES),
        st.sampled_from(KINDS),
        st.floats(1e-12, 1e12),
    ),
    max_size=12,
)


def network(
    rows: Sequence[tuple[int, str, Severity, str, str, float]], shift: int
) -> tuple[list[Finding], Trace]:
    """The findings of a network with ``shift`` more layers in front, and its trace."""
    names = [".".join(filter(None, ("blocks", str(number + shift), tail))) for number, tail, *_ in rows]
    kinds = {name: row[4] for name, row in zip(names, rows, strict=True)}
    layers = [make_layer(name, order, type=kind) for order, (name, kind) in enumerate(kinds.items())]
    found = [
        make_finding(name, row[2].value, row[3], value=row[5]) for name, row in zip(names, rows, strict=True)
    ]
    return found, make_trace(layers=layers or [make_layer("blocks.0")])


@given(layer_findings, st.integers(0, 5), st.randoms(use_true_random=False), st.floats(0.5, 2.0))
def test_renumbered_reordered_and_moving_numbers_are_nothing_new(
    rows: list[tuple[int, str, Severity, str, str, float]],
    shift: int,
    shuffle: random.Random,
    factor: float,
) -> None:
    before, old = network(rows, 0)
    known = loads(dumps(known_findings("net", before, old)))
    after, new = network(rows, shift)
    after = [replace(finding, value=(finding.value or 0) * factor) for finding in after]
    shuffle.shuffle(after)
    assert new_and_gone(known, *after, trace=new) == ([], [])


@given(layer_findings, st.integers(0, 5), st.sampled_from(CODES))
def test_one_more_is_new_and_only_it(
    rows: list[tuple[int, str, Severity, str, str, float]], shift: int, rule: str
) -> None:
    before, old = network(rows, 0)
    known = known_findings("net", before, old)
    after, new = network(rows, shift)
    assert new_and_gone(known, *after, make_finding("head", rule=rule), trace=new) == (["head"], [])


names = st.text(st.characters(codec="utf-8"), max_size=30)


@given(st.lists(st.builds(lambda *row: row, names, names, st.floats() | st.none()), max_size=6))
def test_a_file_reads_back_as_it_was_one_finding_a_line(rows: list[tuple[str, str, float | None]]) -> None:
    known = [
        replace(
            accept(make_finding("x"))[0], target=target, location=place, value=value and float(f"{value:.3g}")
        )
        for target, place, value in rows
    ]
    text = dumps(known)
    assert len(text.split("\n")) == 3 + max(1, len(known))
    assert len(json.loads(text)["findings"]) == len(known)
    assert sorted(map(repr, loads(text))) == sorted(map(repr, known))
    assert dumps(reversed(known)) == text


def test_the_file_is_sorted_as_a_reader_counts() -> None:
    known = accept(make_finding("blocks.10"), make_finding("blocks.9"), make_finding("a"))
    assert [line.location for line in loads(dumps(known))] == ["a", "blocks.9", "blocks.10"]


def test_a_merge_by_hand_may_lose_commas_and_order() -> None:
    ours, theirs = accept(make_finding("a")), accept(make_finding("b"))
    head, line_a, tail, _ = dumps(ours).split("\n")
    line_b = dumps(theirs).split("\n")[1]
    merged = "\r\n".join([head, line_b, f"  {line_a},", tail, ""])
    assert {line.location for line in loads(merged)} == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 1, "findings": [\n<<<<<<< HEAD\n]}\n', "base.json:2: a merge conflict is left"),
        ('{"schema": 1, "findings": [\n{"target": "x"}\n]}\n', "base.json:2: not a finding of a baseline"),
        ('{"schema": 1, "findings": [\n{"target"\n]}\n', "base.json:2: not a finding"),
        ('{"schema": 2, "findings": [\n]}\n', "base.json:1: schema 2, and this gradflow reads 1"),
        ("", "base.json is no baseline"),
        ("[]", "base.json:1: not a finding of a baseline"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        loads(text, name="base.json")
    assert said in str(caught.value)


def test_a_missing_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No such file.*--write-baseline"):
        load(tmp_path / "none.json")
    save(accept(make_finding("a")), tmp_path / "b.json")
    assert load(tmp_path / "b.json") == accept(make_finding("a"))


def test_writing_again_keeps_what_was_not_looked_at() -> None:
    old = [
        replace(accept(make_finding("x", rule=rule))[0], target=target)
        for target, rule in [("a", "GF101"), ("a", "GF204"), ("b", "GF101"), ("removed", "GF101")]
    ]
    new = [replace(accept(make_finding("y"))[0], target="a")]
    judged = {("a", "GF101")}

    def kept(**options: object) -> list[tuple[str, str, str]]:
        lines = renewed(old, new, judged=judged, **options)  # type: ignore[arg-type]
        return [(line.target, line.rule, line.location) for line in lines]

    everything = [("a", "GF101", "y"), ("a", "GF204", "x"), ("b", "GF101", "x")]
    assert kept(whole=False) == [*everything, ("removed", "GF101", "x")]
    assert kept(whole=True, unjudged={"b"}) == everything
    assert baseline.DEFAULT_NAME == "gradflow-baseline.json"
