"""The findings, each consequence under its cause, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from gradflow.findings import Finding, Severity
from gradflow.report import Report
from gradflow.reporters.layer_choice import shown
from gradflow.reporters.number_text import count_text, number_text
from gradflow.reporters.screen import Screen
from gradflow.reporters.severity_style import COLOURS, HEADING, LABEL, MARKS
from gradflow.reporters.text_lines import fold_name, hanging, one_line

_MOST_INFOS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedFinding:
    """A finding and how deep it stands under its cause."""

    finding: Finding
    depth: int


def ranked(findings: Sequence[Finding]) -> list[PlacedFinding]:
    """Worst first, each consequence after its cause; every finding exactly once."""
    causes = {f"{finding.rule} {finding.location}": at for at, finding in enumerate(findings)}
    parents = {
        at: causes[finding.consequence_of]
        for at, finding in enumerate(findings)
        if finding.consequence_of in causes and causes[finding.consequence_of] != at
    }
    order = sorted(range(len(findings)), key=lambda at: -findings[at].severity.rank)
    placed: dict[int, int] = {}
    for at in [at for at in order if at not in parents] + order:
        _place(at, 0, order, parents, placed)
    return [PlacedFinding(finding=findings[at], depth=depth) for at, depth in placed.items()]


def _place(at: int, depth: int, order: list[int], parents: dict[int, int], placed: dict[int, int]) -> None:
    if at in placed:
        return
    placed[at] = depth
    for child in order:
        if parents.get(child) == at:
            _place(child, depth + 1, order, parents, placed)


def finding_lines(report: Report, screen: Screen) -> list[Text]:
    """The section; beyond a few, findings of severity info are counted instead of shown, but for --all."""
    placed = ranked(report.findings)
    if not placed:
        return []
    lines = [Text.assemble(("Findings", HEADING), f"  {counted(report.findings)}")]
    infos = [place for place in placed if place.finding.severity is Severity.INFO]
    hidden = [] if screen.show_all else infos[_MOST_INFOS:]
    for place in placed:
        if place not in hidden:
            lines += [Text("")] if place.depth == 0 else []
            lines += _one(place, screen.width)
    if hidden:
        lines += [Text(""), Text(f"  … {len(hidden)} more of severity info: {_everything(screen)}")]
    return lines


def _everything(screen: Screen) -> str:
    return "--all" if screen.command else "report.findings"


def counted(findings: Iterable[Finding]) -> str:
    """ "1 error, 2 warnings, 1 info"."""
    severities = [finding.severity for finding in findings]
    nouns = {Severity.ERROR: "error", Severity.WARNING: "warning"}
    parts = [
        count_text(severities.count(severity), noun)
        for severity, noun in nouns.items()
        if severity in severities
    ]
    infos = severities.count(Severity.INFO)
    return ", ".join([*parts, f"{infos} info"] if infos else parts)


def beside_threshold(finding: Finding) -> str:
    """The number and its limit: "4.1e-09 < 1e-05"; "" where there is no number."""
    if finding.value is None:
        return ""
    if finding.threshold is None:
        return number_text(finding.value)
    sign = "<" if finding.value < finding.threshold else ">"
    sign = "=" if finding.value == finding.threshold else sign
    digits = 3
    while digits < 9 and sign != "=" and _alike(finding.value, finding.threshold, digits):
        digits += 1
    return f"{number_text(finding.value, digits)} {sign} {number_text(finding.threshold, digits)}"


def _alike(value: float, threshold: float, digits: int) -> bool:
    return number_text(value, digits) == number_text(threshold, digits)


def _one(place: PlacedFinding, width: int) -> list[Text]:
    finding, margin = place.finding, "    " * place.depth
    lines = _title(finding, margin, width)
    body = f"{margin}  "
    lines += hanging(Text(body), one_line(finding.message), width)
    for label, text in (("why", finding.why), ("try", finding.hint)):
        if text:
            lines += hanging(Text.assemble(body, (f"{label}  ", LABEL)), one_line(text), width)
    if finding.consequence_of and place.depth == 0:
        lines += hanging(Text(body), f"a consequence of {finding.consequence_of}", width)
    return lines


def _title(finding: Finding, margin: str, width: int) -> list[Text]:
    """Mark, code, slug, place and number; the place goes on lines of its own where it is long."""
    colour = COLOURS[finding.severity]
    mark = "→" if margin else MARKS[finding.severity]
    title = Text.assemble(margin, (f"{mark} ", colour), (f"{finding.rule} {finding.slug}", f"bold {colour}"))
    place = one_line(str(finding.location)) or "(model)"
    number = "  ".join(filter(None, (beside_threshold(finding), "known" if finding.known else "")))
    whole = Text.assemble(title, "  ", (place, HEADING), f"  {number}" if number else "")
    if whole.cell_len <= width:
        return [whole]
    ends = place.replace("–", "–\0").split("\0")
    pieces = [piece for end in ends for piece in fold_name(end, width - len(margin) - 2)]
    return [
        Text.assemble(title, f"  {number}"),
        *(Text.assemble(margin, "  ", (piece, HEADING)) for piece in pieces),
    ]


def next_lines(report: Report, screen: Screen) -> list[Text]:
    """What to do now: commands that can be copied as they stand."""
    steps = list(_next_steps(report, screen))
    widest = max((len(purpose) for purpose, _ in steps), default=0)
    lines = [Text("Next", style=HEADING)] if steps else []
    for purpose, command in steps:
        room = screen.width - widest - 4
        label, *more = _continued(command, room) if screen.command else [command]
        lines.append(Text.assemble("  ", (f"{purpose:<{widest}}", LABEL), f"  {label}"))
        lines += [Text(f"  {'':<{widest}}  {line}") for line in more]
    return lines


def _next_steps(report: Report, screen: Screen) -> Iterator[tuple[str, str]]:
    """Purpose and command."""
    for rule in _rules_to_explain(report.findings):
        yield f"about {rule}", f"gradflow explain {rule}"
    if screen.command is None:
        yield "every layer", "report.layers"
        if report.trace.residuals:
            yield "every site", "report.residuals"
        yield "CSV tables", 'report.to_csv("report")'
        return
    if not screen.show_all and _hides_something(report):
        yield "every layer", f"{screen.command} --all"
    if "--csv" not in screen.command:
        yield "CSV tables", f"{screen.command} --csv report"


def _hides_something(report: Report) -> bool:
    infos = [finding for finding in report.findings if finding.severity is Severity.INFO]
    return len(shown(report)[1]) < len(report.trace.layers) or len(infos) > _MOST_INFOS


def _rules_to_explain(findings: Sequence[Finding]) -> list[str]:
    judged = [
        place.finding
        for place in ranked(findings)
        if place.depth == 0 and place.finding.rule.startswith("GF")  # a failed gate has no page
    ]
    serious = [finding.rule for finding in judged if finding.severity is not Severity.INFO]
    return list(dict.fromkeys(serious or [finding.rule for finding in judged]))[:3]


def _continued(command: str, width: int) -> list[str]:
    """A command on as many lines as it needs, each but the last ended by a backslash."""
    lines: list[str] = []
    for part in _with_values(shlex.split(command)):
        if lines and len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(part if not lines else f"    {part}")
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _with_values(words: Iterable[str]) -> list[str]:
    """Words quoted for a shell, each option together with its value."""
    parts: list[str] = []
    for word in words:
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and not word.startswith("-"):
            parts[-1] += f" {shlex.quote(word)}"
        else:
            parts.append(shlex.quote(word))
    return parts
