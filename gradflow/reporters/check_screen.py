"""A check in the terminal: a screen a target, and what it comes to in a line each."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.text import Text

from gradflow.checking.outcome import CheckedTarget, CheckOutcome
from gradflow.findings import Severity
from gradflow.metric_gates import gate_sentence
from gradflow.reporters import terminal
from gradflow.reporters.number_text import count_text, number_text
from gradflow.reporters.screen import Screen, rendered
from gradflow.reporters.severity_style import COLOURS, HEADING, LABEL, MARKS
from gradflow.reporters.terminal_findings import counted
from gradflow.reporters.text_lines import hanging, one_line


def render(outcome: CheckOutcome, screen: Screen) -> str:
    """The screens in turn, then the summary; of a lone target with nothing to add, its screen alone.

    Of several targets, one that passed with nothing new to say has its line in the summary and no screen, unless
    all is to be shown.
    """
    alone = len(outcome.targets) == 1
    parts = []
    for target in outcome.targets:
        if target.report is not None and (alone or screen.show_all or _has_news(target)):
            own = screen if alone else replace(screen, command=f"gradflow check {shlex.quote(target.name)}")
            heading = [] if alone else [_heading(target.name, screen.width)]
            parts.append(rendered(heading, screen) + terminal.render(target.report, own))
    if not alone or any(_notes(outcome.targets[0])):
        parts.append(rendered(list(summary_lines(outcome, screen.width)), screen))
    return "\n".join(parts)


def _has_news(target: CheckedTarget) -> bool:
    findings = target.report.findings if target.report is not None else ()
    return any(not finding.known for finding in findings)


def _heading(name: str, width: int) -> Text:
    title = f"── {one_line(name)} "
    return Text(title + "─" * max(2, width - len(title)), style=HEADING, no_wrap=True, overflow="crop")


def summary_lines(outcome: CheckOutcome, width: int) -> Iterator[Text]:
    """How many passed, then a line a target with what else there is to say of it."""
    yield Text.assemble(("Check", HEADING), f"  {_totals(outcome.targets)}")
    for target in outcome.targets:
        yield from _target_lines(target, width)


def _totals(targets: Sequence[CheckedTarget]) -> str:
    passed = sum(target.exit_code == 0 for target in targets)
    failed = sum(target.exit_code == 1 for target in targets)
    broken = len(targets) - passed - failed
    counts = (f"{passed} passed", f"{failed} failed" if failed else "", f"{broken} not run" if broken else "")
    return f"{count_text(len(targets), 'target')}: {', '.join(filter(None, counts))}"


def _target_lines(target: CheckedTarget, width: int) -> Iterator[Text]:
    severity = None if target.exit_code == 0 else Severity.ERROR
    mark = Text.assemble((f"{MARKS[severity]} ", COLOURS[severity]), (f"{one_line(target.name)}  ", HEADING))
    yield from hanging(mark, _said(target), width)
    for label, note in _notes(target):
        yield from hanging(Text.assemble("    ", (f"{label}  ", LABEL)), one_line(note), width)


def _said(target: CheckedTarget) -> str:
    if target.failure is not None:
        return f"exit {target.exit_code}: {one_line(target.failure.message)}"
    findings = target.report.findings if target.report is not None else ()
    known = [finding for finding in findings if finding.known]
    new = counted([finding for finding in findings if not finding.known])
    counts = [new or "no findings", f"{len(known)} known" if known else ""]
    counts.append(f"{len(target.ignored)} ignored" if target.ignored else "")
    counts.append(_gain(target) if not findings else "")
    return ", ".join(filter(None, counts))


def _gain(target: CheckedTarget) -> str:
    gain = target.report.profile.gain if target.report is not None else math.nan
    return f"gain {number_text(gain)}" if math.isfinite(gain) else ""


def _notes(target: CheckedTarget) -> Iterator[tuple[str, str]]:
    """Label and text of what the target's own screen does not say."""
    for item in target.ignored:
        place = item.finding.location
        yield "ignored", f"{item.finding.rule} at {str(place) or '(model)'}: {item.reason}"
    for line in target.gone:
        yield "gone", f"{line.rule} {line.slug} at {line.location or '(model)'}; --write-baseline drops it"
    for result in target.gates:
        yield "gate", gate_sentence(result)
