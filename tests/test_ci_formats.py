"""SARIF, JUnit, GitLab, GitHub and comments: valid by their published schemas, whatever a name holds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import xmlschema
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradflow.config import Config
from gradflow.findings import Finding, Location, Severity
from gradflow.report import Report
from gradflow.reporters import JOINT_REPORTERS, github, gitlab, junit, markdown, sarif
from gradflow.reporters.failed_target import FailedTarget
from gradflow.reporters.finding_places import fingerprints, source_place, target_file
from gradflow.reporters.finding_text import sentences
from gradflow.rules import RULES
from tests.screens import SCREENS, make_finding, make_report
from tests.traces import make_layer, make_run, make_trace

DATA = Path(__file__).parent / "data"
SOURCES = (("", "models/net.py:40"), ("blocks.0", "models/block.py:7"), ("blocks.1", "models/block.py:7"))
CODE_QUALITY = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["description", "check_name", "fingerprint", "severity", "location"],
        "properties": {
            "description": {"type": "string", "minLength": 1},
            "check_name": {"type": "string", "minLength": 1},
            "fingerprint": {"type": "string", "minLength": 1},
            "severity": {"enum": ["info", "minor", "major", "critical", "blocker"]},
            "location": {
                "type": "object",
                "required": ["path", "lines"],
                "properties": {
                    "path": {"type": "string", "pattern": r"^(?!\./)"},
                    "lines": {
                        "type": "object",
                        "required": ["begin"],
                        "properties": {"begin": {"type": "integer", "minimum": 1}},
                    },
                },
            },
        },
    },
}
"""What GitLab's page on the code quality report format asks for."""

AWKWARD_NAMES = (
    "=1+1",
    "+cmd|' /C calc'!A0",
    "@SUM(A1)",
    "a,b;c\td",
    'say "it"',
    "it's",
    "a\nb\r\nc",
    "x" * 300,
    ".".join(["layer"] * 60),
    "blöcke.0.Слой.层.🙂",
    "\x00\x1b[31m\x7f\x85\u2028\u200f\ufeff",
    "\ud800",
    "%0A::error::no",
    "::warning file=a::b",
    "a|b`c<script>*d*_e_ # [g](h) @octocat",
    "{0} {{1}} [a](1) \\[",
    "]]> <!-- -->",
    " leading and trailing ",
    "%25 100%",
    "-",
)
names = st.one_of(
    st.sampled_from(AWKWARD_NAMES),
    st.text(st.characters(), max_size=300),
    st.text("=+-@,;.\"'\n\r\t\\|[](){}%:`<>&", max_size=20),
)


@cache
def sarif_validator() -> jsonschema.Draft4Validator:
    schema = json.loads((DATA / "sarif-2.1.0-rtm.5.json").read_text(encoding="utf-8"))
    return jsonschema.Draft4Validator(schema)


@cache
def junit_schema() -> xmlschema.XMLSchema:
    return xmlschema.XMLSchema(DATA / "jenkins-junit.xsd")


def check_sarif(reports: Sequence[Report]) -> dict[str, Any]:
    """The log's only run, once the log is valid and its cross-references hold."""
    log = json.loads(sarif.render(reports), parse_constant=pytest.fail)
    sarif_validator().validate(log)
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    return dict(run)


def check_junit(reports: Sequence[Report]) -> ElementTree.Element:
    text = junit.render(reports)
    junit_schema().validate(text)
    root = ElementTree.fromstring(text.encode())
    for suite in root:
        cases = suite.findall("testcase")
        assert int(suite.get("tests", -1)) == len(cases)
        assert int(suite.get("failures", -1)) == len(suite.findall("testcase/failure"))
    assert int(root.get("tests", -1)) == len(root.findall("testsuite/testcase"))
    return root


def check_gitlab(reports: Sequence[Report]) -> list[dict[str, Any]]:
    entries = json.loads(gitlab.render(reports), parse_constant=pytest.fail)
    jsonschema.Draft202012Validator(CODE_QUALITY).validate(entries)
    assert len({entry["fingerprint"] for entry in entries}) == len(entries)
    return list(entries)


def check_github(reports: Sequence[Report]) -> list[tuple[str, dict[str, str], str]]:
    """Every line read as GitHub's runner does: command, properties and message, unescaped."""
    *lines, last = github.render(reports).removesuffix("\n").split("\n")
    assert last.startswith("gradflow: ")
    return [read_command(line) for line in lines]


def read_command(line: str) -> tuple[str, dict[str, str], str]:
    match = re.fullmatch(r"::(error|warning|notice) ([^\r\n]*?)::([^\r\n]*)", line)
    assert match, line
    properties = dict(part.split("=", 1) for part in match[2].split(","))
    return match[1], {key: unescaped(value) for key, value in properties.items()}, unescaped(match[3])


def unescaped(text: str) -> str:
    for code, char in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
        text = text.replace(code, char)
    return text


def check_markdown(reports: Sequence[Report]) -> str:
    text = markdown.render_all(reports)
    assert text.startswith(markdown.MARKER + "\n")
    assert len(text.encode("utf-8", "replace")) < 65_536
    assert "<script" not in text and "\x1b" not in text
    assert text.count("<details>") == text.count("</details>")
    return text


def judged(*findings: Finding, **run: Any) -> Report:
    return make_report(make_trace(**{"target": "./models/net.py:build", "sources": SOURCES} | run), *findings)


def at(first: str, last: str = "", **changes: Any) -> Finding:
    return make_finding(location=Location(first=first, last=last), **changes)


def two_targets() -> tuple[Report, Report]:
    cause = at("blocks.0", rule="GF303", slug="non-finite-activation")
    effect = at("blocks.1.fc", "blocks.4", severity=Severity.INFO, consequence_of="GF303 blocks.0")
    return judged(cause, effect), judged(at("head", severity=Severity.WARNING), target="other.py")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blocks.0", "models/block.py:7"),
        ("blocks.0.fc.weight", "models/block.py:7"),
        ("blocks.10", "models/net.py:40"),
        ("blocks", "models/net.py:40"),
        ("", "models/net.py:40"),
    ],
)
def test_a_finding_stands_at_the_nearest_class_of_the_users(name: str, place: str) -> None:
    found = source_place(at(name), make_run(sources=SOURCES))
    assert found is not None
    assert f"{found.path}:{found.line}" == place


@pytest.mark.parametrize(
    ("target", "file"),
    [
        ("model.py", "model.py"),
        ("./a/model.py:build", "a/model.py"),
        ("a\\model.py:build", "a/model.py"),
        ("package.module:Net", ""),
        ("package.python:Net", ""),
        ("Net", ""),
    ],
)
def test_without_a_class_the_target_itself_is_the_place(target: str, file: str) -> None:
    run = make_run(target=target)
    assert target_file(target) == file
    found = source_place(at("a"), run)
    assert (found.path if found else "") == file


def prints(*findings: Finding, **run: Any) -> tuple[str, ...]:
    return fingerprints((judged(*findings, **run),))[0]


def test_fingerprints_outlive_order_and_numbers() -> None:
    findings = [at("blocks.9"), at("blocks.10"), at("blocks.9", rule="GF204"), at("head")]
    before = prints(*findings)
    assert len(set(before)) == 4
    assert prints(*findings[::-1]) == before[::-1]
    later = [at("blocks.11"), at("blocks.12"), at("blocks.11", rule="GF204"), at("head")]
    assert prints(*later) == before
    assert set(prints(*findings, target="other.py")).isdisjoint(before)
    assert set(prints(at("tail"))).isdisjoint(before)
    louder = [replace(finding, message="other words", value=1.0) for finding in findings]
    assert prints(*louder) == before


def test_fingerprints_differ_between_two_checks_of_one_target() -> None:
    both = fingerprints((judged(at("a")), judged(at("a"))))
    assert [len(each) for each in both] == [1, 1] and both[0] != both[1]


def test_a_target_that_failed_is_in_every_form() -> None:
    failed = (
        FailedTarget(target="bad.py:build", message="bad.py raised\nat 3: 100%", traceback="File bad.py"),
    )
    log = json.loads(sarif.render((), failed))
    sarif_validator().validate(log)
    invocation = log["runs"][0]["invocations"][0]
    assert invocation["executionSuccessful"] is False
    assert "bad.py raised" in invocation["toolExecutionNotifications"][0]["message"]["text"]
    text = junit.render(two_targets(), failed)
    junit_schema().validate(text)
    suite = ElementTree.fromstring(text.encode())[2]
    assert (suite.get("name"), suite.get("errors")) == ("bad.py:build", "1")
    assert suite.findtext("testcase/error") == "File bad.py"
    entries = json.loads(gitlab.render((), failed))
    jsonschema.Draft202012Validator(CODE_QUALITY).validate(entries)
    assert (entries[0]["severity"], entries[0]["location"]["path"]) == ("blocker", "bad.py")
    first, last = github.render((), failed).splitlines()
    assert read_command(first)[1:] == (
        {"file": "bad.py", "title": "bad.py:build was not checked"},
        "bad.py raised\nat 3: 100%",
    )
    assert last == "gradflow: 1 target not checked"
    assert "**not checked**: bad.py raised at 3: 100%" in markdown.render_all((), failed)


def test_sarif_says_where_what_and_why() -> None:
    first, second = two_targets()
    run = check_sarif((first, second))
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [rule.code for rule in RULES]
    cause, effect, other = run["results"]
    assert [result["level"] for result in run["results"]] == ["error", "note", "warning"]
    assert cause["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "models/block.py"},
        "region": {"startLine": 7},
    }
    logical = effect["locations"][0]["logicalLocations"]
    assert [place["fullyQualifiedName"] for place in logical] == ["blocks.1.fc", "blocks.4"]
    related = effect["relatedLocations"][0]
    assert related["logicalLocations"][0]["fullyQualifiedName"] == "blocks.0"
    assert "4.13e-9" not in cause["message"]["text"] and "4.13e-09 < 1e-05" in cause["message"]["text"]
    assert cause["properties"]["value"] == 4.13e-9 and cause["properties"]["threshold"] == 1e-5
    assert other["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "models/net.py"
    assert "baselineState" not in cause


@pytest.mark.parametrize(
    ("message", "said"),
    [("Too small", "Too small (2 < 3)."), ("2 is too small, below 3", "2 is too small, below 3.")],
)
def test_a_number_is_said_once(message: str, said: str) -> None:
    assert sentences(at("a", message=message, value=2.0, threshold=3.0))[0] == said


def test_sarif_tells_new_findings_from_known_ones() -> None:
    run = check_sarif((judged(at("a", known=True), at("b")),))
    assert [result["baselineState"] for result in run["results"]] == ["unchanged", "new"]


def test_sarif_knows_what_no_rule_says() -> None:
    run = check_sarif((judged(at("a", rule="GF999", slug="of-another-kind")),))
    assert run["tool"]["driver"]["rules"][-1]["id"] == "GF999"


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("my models/nét#1.py:3", "my%20models/n%C3%A9t%231.py"),
        ("/data/net.py:3", "file:///data/net.py"),
        ("C:/data/net.py:3", "file:///C:/data/net.py"),
        ("a:b/net.py:3", "a%3Ab/net.py"),
    ],
)
def test_sarif_paths_are_uris(path: str, uri: str) -> None:
    run = check_sarif((judged(at("a"), sources=(("", path),)),))
    assert run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri


def test_an_invalid_log_is_seen() -> None:
    log = json.loads(sarif.render(two_targets()))
    log["runs"][0]["results"][0]["level"] = "fatal"
    with pytest.raises(jsonschema.ValidationError):
        sarif_validator().validate(log)
    with pytest.raises(xmlschema.XMLSchemaException):
        junit_schema().validate("<testsuites><testsuite tests='1'/></testsuites>")


def test_junit_has_a_suite_a_target_and_a_case_a_rule() -> None:
    root = check_junit(two_targets())
    assert [suite.get("name") for suite in root] == ["./models/net.py:build", "other.py"]
    first, second = root
    assert [case.get("name", "")[:5] for case in first.findall("testcase")] == [rule.code for rule in RULES]
    (failure,) = root.iter("failure")
    assert failure.get("type") == "error" and "blocks.0" in failure.get("message", "")
    assert "models/block.py:7" in (failure.text or "")
    assert "head" in (second.findtext("testcase/system-out") or "")
    assert second.get("failures") == "0"


def test_junit_fails_at_the_threshold_of_the_run_and_lists_the_rules_that_ran() -> None:
    report = judged(at("a", severity=Severity.WARNING), at("b", severity=Severity.WARNING, known=True))
    strict = replace(report, config=Config(select=("GF1",), ignore=("GF102",), fail_on=Severity.WARNING))
    (suite,) = check_junit((strict,))
    assert {case.get("name", "")[:5] for case in suite.findall("testcase")} == {
        rule.code for rule in RULES if rule.code.startswith("GF1") and rule.code != "GF102"
    }
    assert suite.get("failures") == "1"
    assert "b (in the baseline)" in (suite.findtext("testcase/system-out") or "").replace(
        "(models/net.py:40) ", ""
    )
    (lenient,) = check_junit((replace(report, config=Config()),))
    assert lenient.get("failures") == "0"


def test_github_annotates_the_worst_first() -> None:
    commands = check_github(two_targets())
    assert [command for command, _, _ in commands] == ["error", "warning", "notice"]
    properties = commands[0][1]
    assert (properties["file"], properties["line"]) == ("models/block.py", "7")
    assert properties["title"] == "GF303 non-finite-activation at blocks.0"
    assert len(commands[0][2].split("\n")) == 3
    assert github.render(two_targets()).endswith("gradflow: 1 error, 1 warning, 1 info in 2 targets\n")


def test_github_passes_over_what_the_baseline_knows() -> None:
    report = judged(at("a", known=True))
    assert check_github((report,)) == []
    assert (
        github.render((report,))
        == "gradflow: no findings in ./models/net.py:build (1 more in the baseline)\n"
    )


@pytest.mark.parametrize(
    ("environ", "form"),
    [
        ({}, "table"),
        ({"GITHUB_ACTIONS": "true"}, "github"),
        ({"GITHUB_ACTIONS": "false"}, "table"),
        ({"CI": "true"}, "table"),
    ],
)
def test_annotations_are_chosen_in_a_github_workflow(environ: dict[str, str], form: str) -> None:
    assert github.default_format(environ) == form


def test_the_step_summary_is_added_to_what_is_there(tmp_path: Path) -> None:
    page = tmp_path / "summary.md"
    page.write_text("# earlier\n", encoding="utf-8")
    assert github.write_step_summary(two_targets(), {"GITHUB_STEP_SUMMARY": str(page)})
    assert page.read_text(encoding="utf-8") == "# earlier\n" + markdown.render_all(two_targets())
    assert not github.write_step_summary(two_targets(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["summary.md"]


def test_a_location_is_not_said_twice() -> None:
    """Of parameters the message begins with where they are."""
    finding = make_finding(
        location=Location(first="auxiliary"), message="auxiliary: 2 parameters are not trained"
    )
    report = replace(make_report(make_trace()), findings=(finding,))
    (entry,) = json.loads(gitlab.render([report]))
    assert "auxiliary: 2 parameters" in entry["description"]
    (result,) = json.loads(sarif.render([report]))["runs"][0]["results"]
    for text in (entry["description"], result["message"]["text"]):
        assert text.count("auxiliary") == 1


def test_gitlab_gets_a_relative_path_and_a_severity_of_its_own() -> None:
    entries = check_gitlab(two_targets())
    assert [entry["severity"] for entry in entries] == ["critical", "info", "major"]
    assert entries[0]["location"] == {"path": "models/block.py", "lines": {"begin": 7}}
    assert check_gitlab((judged(at("a"), target="Net", sources=()),))[0]["location"]["path"] == "Net"


def test_a_comment_tells_the_worst_target_first() -> None:
    known = judged(at("a", known=True), target="known.py")
    warned = judged(at("a", severity=Severity.WARNING), target="warned.py")
    text = markdown.render_all(
        (judged(target="clean.py"), known, warned, judged(at("a"), target="broken.py"))
    )
    assert re.findall(r"^## gradflow: (\w+)", text, re.MULTILINE) == ["broken", "warned", "clean", "known"]


def test_a_comment_folds_away_what_is_not_the_answer() -> None:
    text = check_markdown(two_targets())
    head, details = text.split("<details>", 1)
    assert "### Findings" in head and "### Layers" not in head
    assert "### Layers" in details and "### Run" in details
    assert "<details>\n<summary>Layers, residual blocks and run</summary>\n\n###" in text


@pytest.mark.parametrize(("targets", "findings"), [(1, 2000), (40, 50), (3, 3000), (2000, 2)])
def test_a_comment_is_never_too_long(targets: int, findings: int) -> None:
    several = [at(f"{'x' * 280}.{number}") for number in range(findings)]
    trace = make_trace(layers=[make_layer(f"{'y' * 280}.{number}", number) for number in range(300)])
    text = check_markdown([make_report(trace, *several)] * targets)
    assert "more rows in" in text
    assert len(text) > 20_000


@pytest.mark.parametrize("name", SCREENS)
def test_every_screen_is_valid_in_every_form(name: str) -> None:
    reports = (SCREENS[name](),)
    check_everything(reports)
    for form, render in JOINT_REPORTERS.items():
        assert render(reports, ()).endswith("\n"), form


@pytest.mark.parametrize("name", AWKWARD_NAMES)
def test_an_awkward_name_is_valid_in_every_form(name: str) -> None:
    check_everything((named(name, name),))


@settings(max_examples=60, deadline=None)
@given(name=names, words=names)
@example(name="./", words="=1+1")
def test_any_name_is_valid_in_every_form(name: str, words: str) -> None:
    check_everything((named(name, words),))


def named(name: str, words: str) -> Report:
    """A report in which everything that a user may name is called this."""
    findings = [
        at(name, message=words, hint=words, why=words, slug=words, consequence_of=f"GF101 {name}"),
        at(f"{name}.a", name, rule="GF204", evidence=((name, float("nan")),)),
    ]
    trace = make_trace(
        layers=[make_layer(name, type=name)],
        target=name,
        model=name,
        notes=(words,),
        sources=(("", f"{name}:1"),),
    )
    return make_report(trace, *findings)


def check_everything(reports: Sequence[Report]) -> None:
    count = sum(len(report.findings) for report in reports)
    assert len(check_sarif(reports)["results"]) == count
    assert len(check_gitlab(reports)) == count
    assert len(check_github(reports)) == count
    assert len(check_junit(reports)) == len(reports)
    check_markdown(reports)


def test_no_reports_are_no_reason_to_fail() -> None:
    check_everything(())


def test_the_page_names_every_form() -> None:
    page = (DATA.parents[1] / "docs" / "ci.md").read_text(encoding="utf-8")
    section = page.split("## Formats that CI reads\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == {*JOINT_REPORTERS, "json"}
