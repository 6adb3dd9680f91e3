"""Where a finding stands in the user's files, and what it is called from one run to the next."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gradflow.findings import Finding
from gradflow.report import Report
from gradflow.reporters.failed_target import FailedTarget
from gradflow.trace_model import RunInfo

_HERE = re.compile(r"^(?:\./+)+")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlace:
    """A line of a file."""

    path: str
    """With forward slashes; relative to the working folder of the run where it lies below it."""
    line: int
    """From 1."""


def source_place(finding: Finding, run: RunInfo) -> SourcePlace | None:
    """The line that defines the class of the module a finding starts at, or of the nearest one around it.

    Where no class of the model is the user's own it is the start of the target's file; None without a file.
    """
    sources = dict(run.sources)
    name = finding.location.first
    while name and name not in sources:
        name = name.rpartition(".")[0]
    path, _, line = sources.get(name, "").rpartition(":")
    if path:
        return SourcePlace(path=_below(path), line=int(line))
    file = target_file(run.target)
    return SourcePlace(path=file, line=1) if file else None


def target_file(target: str) -> str:
    """ "models/net.py" of the target "./models/net.py:build"; "" for a target that is no file."""
    head, suffix, tail = target.rpartition(".py")
    if not suffix or (tail and not tail.startswith(":")):
        return ""
    return _below(f"{head}.py".replace("\\", "/"))


def _below(path: str) -> str:
    """A path as these readers take it: without "./" in front; "." for what is then empty."""
    return _HERE.sub("", path) or "."


def failed_place(failed: FailedTarget) -> SourcePlace | None:
    """The line that raised, where it is one of the user's; else the start of the target's file, None without one."""
    path, _, line = failed.place.rpartition(":")
    if path:
        return SourcePlace(path=_below(path), line=int(line))
    file = target_file(failed.target)
    return SourcePlace(path=file, line=1) if file else None


def failed_fingerprint(failed: FailedTarget) -> str:
    """What a later run knows the finding about a failed target by; as :func:`fingerprints`."""
    said = failed.finding
    place = "" if said is None else f"{said.rule}\n{_NUMBER.sub('#', str(said.location))}"
    return _digest(f"{failed.label}\n{place}\n0")


def fingerprints(reports: Sequence[Report]) -> tuple[tuple[str, ...], ...]:
    """One text a finding of each report, in their order, by which a later run knows it; no two are equal.

    It is made from target, rule and place. Numbers in the place do not count, so that a layer put in before it
    does not make an old finding new; findings that are then alike are counted in the order of their places.
    """
    every = [(report.label, finding) for report in reports for finding in report.findings]
    keys = [_key(label, finding) for label, finding in every]
    seen: Counter[str] = Counter()
    known = [""] * len(keys)
    for at in sorted(range(len(keys)), key=lambda at: (keys[at], _natural(str(every[at][1].location)), at)):
        known[at] = _digest(f"{keys[at]}\n{seen[keys[at]]}")
        seen[keys[at]] += 1
    ordered = iter(known)
    return tuple(tuple(next(ordered) for _ in report.findings) for report in reports)


def _key(label: str, finding: Finding) -> str:
    place = _NUMBER.sub("#", str(finding.location))
    return "\n".join((label, finding.rule, place))


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Orders blocks.10 after blocks.9."""
    return tuple(
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in _NUMBER.sub(r"\0\g<0>\0", name).split("\0")
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
