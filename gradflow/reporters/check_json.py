"""A check as one JSON object, for programs."""

from __future__ import annotations

import json
from typing import Any

from gradflow.checking.outcome import CheckedTarget, CheckOutcome
from gradflow.plain_values import to_plain
from gradflow.reporters.json_file import contents, finding_objects
from gradflow.trace_file import finding_rows
from gradflow.trace_model import SCHEMA_VERSION


def render(outcome: CheckOutcome) -> str:
    """``schema``, ``exit_code``, ``targets`` in their order, ``unused_ignores`` and ``stale``; all ASCII.

    A target has ``name``, ``target``, ``exit_code`` and ``error`` (null where it ran), then what the JSON of
    ``inspect`` has, then ``ignored``, ``gone`` and ``gates``. Each of its findings says whether it is ``known``.
    """
    whole = {
        "schema": SCHEMA_VERSION,
        "exit_code": outcome.exit_code,
        "targets": [_target(target) for target in outcome.targets],
        "unused_ignores": outcome.unused_ignores,
        "stale": outcome.stale,
    }
    return json.dumps(to_plain(whole), allow_nan=False, indent=1) + "\n"


def _target(target: CheckedTarget) -> dict[str, Any]:
    head: dict[str, Any] = {
        "name": target.name,
        "target": target.target,
        "exit_code": target.exit_code,
        "error": None,
    }
    if target.failure is not None:
        said = () if target.failure.finding is None else (target.failure.finding,)
        error = {"error": target.failure.message, "traceback": target.failure.trace_text}
        return head | error | {"findings": [{**row, "known": False} for row in finding_objects(said)]}
    if target.report is None:
        return head
    whole = head | contents(target.report)
    pairs = zip(whole["findings"], target.report.findings, strict=True)
    ignored = zip(finding_rows(item.finding for item in target.ignored), target.ignored, strict=True)
    return whole | {
        "findings": [{**row, "known": finding.known} for row, finding in pairs],
        "ignored": [{**row, "reason": item.reason} for row, item in ignored],
        "gone": target.gone,
        "gates": target.gates,
    }
