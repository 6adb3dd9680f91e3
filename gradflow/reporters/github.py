"""The findings as GitHub workflow commands, and the step summary beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gradflow.atomic_files import write_text
from gradflow.findings import Finding, Severity
from gradflow.report import Report
from gradflow.reporters import markdown
from gradflow.reporters.failed_target import FailedTarget
from gradflow.reporters.finding_places import failed_place, source_place
from gradflow.reporters.finding_text import sentences, title
from gradflow.reporters.number_text import count_text
from gradflow.reporters.terminal_findings import counted
from gradflow.reporters.text_lines import one_line

COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def default_format(environ: Mapping[str, str]) -> str:
    """The form of a check whose ``--format`` was not given: annotations in a GitHub workflow, else the table."""
    return "github" if environ.get("GITHUB_ACTIONS") == "true" else "table"


def render(reports: Sequence[Report], failed: Sequence[FailedTarget] = ()) -> str:
    """One annotation a target that failed and a finding that no baseline knows, and one line in words.

    The worst come first, for GitHub shows ten of a kind in a step.
    """
    every = [(report, finding) for report in reports for finding in report.findings]
    said = [(report, finding) for report, finding in every if not finding.known]
    said.sort(key=lambda pair: -pair[1].severity.rank)
    findings = [finding for _, finding in said]
    targets = count_text(len(reports), "target") if len(reports) != 1 else one_line(reports[0].label)
    lines = [*map(_failure, failed), *(_annotation(finding, report) for report, finding in said)]
    known = f" ({len(every) - len(said)} more in the baseline)" if len(every) > len(said) else ""
    checked = f"{counted(findings) or 'no findings'} in {targets}{known}" if reports else ""
    missing = f"{count_text(len(failed), 'target')} not checked" if failed else ""
    return "\n".join([*lines, f"gradflow: {', '.join(filter(None, (checked, missing)))}"]) + "\n"


def _annotation(finding: Finding, report: Report) -> str:
    source = source_place(finding, report.trace.run)
    place = {"file": source.path, "line": str(source.line)} if source is not None else {}
    properties = place | {"title": title(finding)}
    return _command(COMMANDS[finding.severity], properties, _told(finding, report))


def _told(finding: Finding, which: Report | FailedTarget) -> str:
    named = [f"Target: {one_line(which.name)}"] if which.name else []
    return "\n".join([*sentences(finding), *named])


def _failure(failed: FailedTarget) -> str:
    source = failed_place(failed)
    place = {"file": source.path} if source is not None else {}
    if source is not None and failed.place:
        place["line"] = str(source.line)
    if failed.finding is not None:
        return _command(
            COMMANDS[failed.finding.severity],
            place | {"title": title(failed.finding)},
            _told(failed.finding, failed),
        )
    return _command("error", place | {"title": f"{one_line(failed.label)} was not checked"}, failed.message)


def _command(name: str, properties: Mapping[str, str], message: str) -> str:
    listed = ",".join(f"{key}={_property(value)}" for key, value in properties.items())
    return f"::{name} {listed}::{_data(message)}"


def _data(text: str) -> str:
    """Text after the second ``::``, escaped as the runner's own toolkit does."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def write_step_summary(
    reports: Sequence[Report], environ: Mapping[str, str], failed: Sequence[FailedTarget] = ()
) -> bool:
    """Add the Markdown form to the page of the workflow run; say whether there is one.

    Args:
        reports: One a target.
        environ: The environment; GITHUB_STEP_SUMMARY names the file.
        failed: The targets that have no report.

    Raises:
        TraceFileError: The file cannot be written.
    """
    place = environ.get("GITHUB_STEP_SUMMARY")
    if not place:
        return False
    path = Path(place)
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    write_text(path, before + markdown.render_all(reports, failed))
    return True
