"""What was run, and the verdict in one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.text import Text

from gradflow.findings import Severity
from gradflow.report import Report
from gradflow.reporters.number_text import count_text, number_text
from gradflow.reporters.severity_style import COLOURS, HEADING, LABEL, MARKS
from gradflow.reporters.text_lines import breakable, hanging, one_line
from gradflow.trace_model import RunInfo

_OPENINGS = ("A", "All", "An", "Each", "Every", "No", "Of", "The")


_FLOWING = (1e-3, 1e4)
"""Gains beyond which GF101 and GF102 warn of any model: where an ignore silences them, nothing says that it flows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One sentence, and the finding it rests on."""

    severity: Severity | None
    """None where nothing is wrong."""
    subject: str
    """"vanishing gradient"."""
    sentence: str
    rule: str = ""


def verdict(report: Report) -> Verdict:
    """The worst finding in words, or how well the gradient flows where there is no warning or error."""
    worst = report.worst
    if worst is None or worst is Severity.INFO:
        return Verdict(severity=None, subject=_healthy(report), sentence=_kept(report))
    root = [f for f in report.findings if f.severity is worst and f.consequence_of is None]
    finding = (root or [f for f in report.findings if f.severity is worst])[0]
    return Verdict(
        severity=worst,
        subject=finding.slug.replace("-", " ").replace("non finite", "non-finite"),
        sentence=_continued(one_line(finding.message).rstrip(".")),
        rule=finding.rule,
    )


def _continued(sentence: str) -> str:
    """A sentence as it stands after a colon; only these words, for a name must keep its case."""
    first = sentence.partition(" ")[0]
    return first.lower() + sentence[len(first) :] if first in _OPENINGS else sentence


def _healthy(report: Report) -> str:
    if not report.trace.run.trainable:
        return "nothing to train"
    least, most = _FLOWING
    return "the gradient flows" if least <= report.profile.gain <= most else "nothing found"


def _kept(report: Report) -> str:
    run, gain = report.trace.run, report.profile.gain
    if not run.parameters:
        return "the model has no parameters"
    if not run.trainable:
        return f"all {count_text(run.parameters, 'parameter')} are frozen"
    if math.isfinite(gain):
        return f"the trunk's first tensor gets {number_text(gain)} × the last one's"
    return "the trunk has fewer than two tensors with a gradient, so there is no gain to judge"


def verdict_lines(report: Report, width: int) -> list[Text]:
    """The verdict, wrapped, with its rule's code at the end."""
    said = verdict(report)
    colour = f"bold {COLOURS[said.severity]}"
    body = Text.assemble((f"{said.subject}: ", colour), breakable(said.sentence, width - 2))
    if said.rule:
        body.append(f"  {said.rule}", style=colour)
    return hanging(Text.assemble((MARKS[said.severity], colour), " "), body, width)


def header_rows(run: RunInfo) -> Iterator[tuple[str, str]]:
    """Label and value of each line."""
    frozen = f" ({run.trainable:,} trainable)" if run.trainable != run.parameters else ""
    yield "target", run.target
    yield "model", f"{run.model} · {count_text(run.parameters, 'parameter')}{frozen}"
    if run.checkpoint is not None:
        yield "checkpoint", run.checkpoint
    yield "inputs", f"{', '.join(run.inputs) or 'none'} · {_origin(run.inputs_from)}"
    yield "loss", f"{run.loss}{_loss_values(run)}"
    yield "optimizer", run.optimizer or "not checked"
    yield "run", " · ".join(_circumstances(run))
    for note in run.notes:
        yield "note", note


def _origin(source: str) -> str:
    """ "inferred" and "given" say it themselves; a place wants its "from"."""
    return source if source in ("inferred", "given") else f"from {source}"


def _loss_values(run: RunInfo) -> str:
    values = [number_text(value) for value in run.loss_values]
    shown = ", ".join(values) if len(values) <= 4 else f"{values[0]} to {values[-1]}"
    return f" · {shown}" if shown else ""


def _circumstances(run: RunInfo) -> list[str]:
    trained = ["trained weights"] if run.trained else []
    steps = [count_text(run.steps, "step")] if run.steps > 1 else []
    facts = [f"seed {run.seed}", *steps, run.device, run.dtype, f"{run.mode} mode", *trained]
    return [fact for fact in facts if fact]


def header_lines(run: RunInfo, width: int) -> list[Text]:
    """Title and facts."""
    lines = [Text.assemble(("gradflow", HEADING), f" {run.gradflow_version} · torch {run.torch_version}")]
    for label, value in header_rows(run):
        lines += hanging(Text.assemble("  ", (f"{label:<11}", LABEL)), one_line(value), width)
    return lines
