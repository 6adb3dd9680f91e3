"""Findings that are known and accepted: what ``gradflow check`` compares with, as a file that people merge.

The file is JSON with one finding a line, sorted, so that two branches that accept different findings touch
different lines. It is read line by line, so that a comma lost or left over in a merge does no harm.

A finding is known again by target, rule, kind of module and place, in which numbers do not count: a layer put in
before it moves ``blocks.3`` to ``blocks.4`` and makes nothing new. Findings that are then alike are counted.
A known finding that became more severe is new, unless its number moved by less than ``NOISE``.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from gradflow.atomic_files import write_text
from gradflow.errors import UsageError
from gradflow.findings import Finding, Severity
from gradflow.plain_values import to_plain
from gradflow.rules.places import ancestry
from gradflow.trace_model import Trace

DEFAULT_NAME = "gradflow-baseline.json"
SCHEMA = 1
NOISE = 0.1
"""Engineering choice: run to run, on other machines, a finding's number moves by less than this share."""

_DIGITS = re.compile(r"\d+")
_MAY_BE_LEFT_OUT = ("type", "cause", "value")
_CONFLICT = ("<<<<<<<", "=======", ">>>>>>>", "|||||||")

Key: TypeAlias = tuple[str, ...]
_Fits: TypeAlias = Callable[["KnownFinding", "KnownFinding"], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFinding:
    """One line of a baseline."""

    target: str
    """Name of the target, or the target as given on the command line."""
    rule: str
    slug: str
    severity: Severity
    location: str
    """Where it was when it was accepted."""
    type: str
    """Class names of the modules at the ends of the location; "" where unknown."""
    cause: str = ""
    """What the rule tells apart in its evidence ("unused", "graph cut"); "" for most rules."""
    value: float | None = None
    """Three digits of the number that was judged."""

    @property
    def key(self) -> Key:
        """What it is known by; equal keys are counted."""
        return (self.target, self.rule, self.slug, _DIGITS.sub("#", self.location), self.type, self.cause)

    def __str__(self) -> str:
        return f"{self.target}: {self.rule} {self.slug} at {self.location or '(model)'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The findings of one target beside a baseline."""

    findings: tuple[Finding, ...]
    """The same, in their order; those that the baseline holds are marked as known."""
    gone: tuple[KnownFinding, ...]
    """What the baseline holds and nothing says any more."""


def known_findings(target: str, findings: Iterable[Finding], trace: Trace) -> tuple[KnownFinding, ...]:
    """The lines that stand for these findings, in their order."""
    types = {parameter.module: parameter.module_type for parameter in trace.parameters}
    types |= {layer.name: layer.type for layer in trace.layers}
    return tuple(_known(target, finding, types) for finding in findings)


def _known(target: str, finding: Finding, types: Mapping[str, str]) -> KnownFinding:
    ends = dict.fromkeys((finding.location.first, finding.location.last or finding.location.first))
    classes = dict.fromkeys(_class_at(name, types) for name in ends)
    return KnownFinding(
        target=target,
        rule=finding.rule,
        slug=finding.slug,
        severity=finding.severity,
        location=str(finding.location),
        type=" ".join(filter(None, classes)),
        cause=next((str(fact) for name, fact in finding.evidence if name == "cause"), ""),
        value=None if finding.value is None else float(f"{finding.value:.3g}"),
    )


def _class_at(name: str, types: Mapping[str, str]) -> str:
    return next((types[near] for near in ancestry(name) if near in types), "")


def compare(
    target: str,
    findings: Sequence[Finding],
    trace: Trace,
    baseline: Sequence[KnownFinding],
    *,
    codes: Collection[str],
) -> Comparison:
    """Mark the findings of a target that the baseline knows.

    Args:
        target: Its name in the baseline.
        findings: What counts, in any order.
        trace: What they were found in.
        baseline: All its lines.
        codes: The rules that could speak; lines of others are not said to be gone.
    """
    left: dict[Key, list[KnownFinding]] = defaultdict(list)
    for known in baseline:
        if known.target == target:
            left[known.key].append(known)
    current = known_findings(target, findings, trace)
    matched: set[int] = set()
    # Pairs of one severity leave as many others possible; then each takes the mildest line that will do.
    order = sorted(range(len(current)), key=lambda at: current[at].severity.rank)
    for fits in (_unmoved, _no_worse, _within_noise):
        for at in order:
            if at not in matched and _take(left[current[at].key], current[at], fits):
                matched.add(at)
    gone = [known for lines in left.values() for known in lines if known.rule in codes]
    return Comparison(
        findings=tuple(replace(f, known=True) if at in matched else f for at, f in enumerate(findings)),
        gone=tuple(sorted(gone, key=_order)),
    )


def _take(lines: list[KnownFinding], current: KnownFinding, fits: _Fits) -> bool:
    """Use up the mildest line that fits."""
    fitting = [line for line in lines if fits(line, current)]
    if fitting:
        lines.remove(min(fitting, key=lambda line: line.severity.rank))
    return bool(fitting)


def _unmoved(line: KnownFinding, current: KnownFinding) -> bool:
    return line.location == current.location and line.severity is current.severity


def _no_worse(line: KnownFinding, current: KnownFinding) -> bool:
    return line.severity.rank >= current.severity.rank


def _within_noise(line: KnownFinding, current: KnownFinding) -> bool:
    if line.value is None or current.value is None:
        return False
    return line.value == current.value or math.isclose(line.value, current.value, rel_tol=NOISE)


def _order(line: KnownFinding) -> tuple[Any, ...]:
    """By target, rule and place, blocks.10 after blocks.9."""
    place = tuple(
        (1, int(part), "") if part.isdecimal() else (0, 0, part)
        for part in _DIGITS.sub(r"\0\g<0>\0", line.location).split("\0")
    )
    return (line.target, line.rule, place, line.type, line.cause, -line.severity.rank, repr(line.value))


def renewed(
    old: Sequence[KnownFinding],
    new: Sequence[KnownFinding],
    *,
    judged: Collection[tuple[str, str]],
    unjudged: Collection[str] = (),
    whole: bool = False,
) -> tuple[KnownFinding, ...]:
    """What a baseline holds after a run.

    Args:
        old: What it held.
        new: Everything that was found.
        judged: Target and rule of everything that could have been found.
        unjudged: Targets that could not be run.
        whole: Every target there is was asked for; lines of others are then out of date.
    """
    current = {target for target, _ in judged} | set(unjudged)
    kept = [
        line
        for line in old
        if (line.target, line.rule) not in judged and (line.target in current or not whole)
    ]
    return tuple(sorted([*kept, *new], key=_order))


def dumps(lines: Iterable[KnownFinding]) -> str:
    """A baseline as text: JSON, one finding a line, in a fixed order."""
    rows = [
        json.dumps(_plain(line), allow_nan=False, ensure_ascii=False) for line in sorted(lines, key=_order)
    ]
    body = ",\n".join(rows)
    return f'{{"schema": {SCHEMA}, "findings": [\n{body}\n]}}\n'


def _plain(line: KnownFinding) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(line)
    return {
        name: value
        for name, value in plain.items()
        if name not in _MAY_BE_LEFT_OUT or value not in ("", None)
    }


def save(lines: Iterable[KnownFinding], path: str | Path) -> None:
    """Write a baseline; the file appears whole or not at all.

    Raises:
        TraceFileError: It cannot be written there.
    """
    write_text(path, dumps(lines))


def load(path: str | Path) -> tuple[KnownFinding, ...]:
    """Read a baseline.

    Raises:
        UsageError: There is no such file, or a line is none of a baseline's.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"cannot read the baseline {path}: {reason}; `gradflow check --write-baseline` writes one"
        ) from error
    return loads(text, name=str(path))


def loads(text: str, *, name: str = "the baseline") -> tuple[KnownFinding, ...]:
    """Read what :func:`dumps` wrote, also where hands have merged it.

    Raises:
        UsageError: A line is none of a baseline's; the sentence names it.
    """
    known, opened = [], False
    for number, line in enumerate(text.split("\n"), start=1):
        written = line.strip().rstrip(",")
        if written.startswith('{"schema"'):
            _check_schema(written, f"{name}:{number}")
            opened = True
        elif written not in ("", "]}"):
            known.append(_known_line(written, f"{name}:{number}"))
    if not opened:
        raise UsageError(f"{name} is no baseline; `gradflow check --write-baseline` writes one")
    return tuple(known)


def _check_schema(written: str, where: str) -> None:
    found = re.match(r'\{"schema": *(\d+)', written)
    schema = int(found[1]) if found else None
    if schema != SCHEMA:
        raise UsageError(
            f"{where}: schema {schema}, and this gradflow reads {SCHEMA}; write the baseline again"
        )


def _known_line(written: str, where: str) -> KnownFinding:
    if written.startswith(_CONFLICT):
        raise UsageError(f"{where}: a merge conflict is left; keep the lines of both sides")
    try:
        plain = json.loads(written)
        return KnownFinding(
            target=plain["target"],
            rule=plain["rule"],
            slug=plain["slug"],
            severity=Severity(plain["severity"]),
            location=plain["location"],
            type=plain.get("type", ""),
            cause=plain.get("cause", ""),
            value=None if plain.get("value") is None else float(plain["value"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{where}: not a finding of a baseline ({error}); mend the line, or delete the file and write it again"
        ) from error
