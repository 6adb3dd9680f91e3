"""What the fixture ``gradflow_check`` does: record, judge, write the tables, fail the test in words."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest

from gradflow.analyzer import analyze
from gradflow.config import Config
from gradflow.errors import GradflowError, ModelError
from gradflow.findings import Finding
from gradflow.integrations.pytest_options import CheckOptions, merged
from gradflow.report import Report
from gradflow.reporters.finding_text import title
from gradflow.reporters.number_text import count_text
from gradflow.reporters.screen import NARROWEST, WIDEST, Screen, encodable, rendered
from gradflow.reporters.terminal_findings import beside_threshold, finding_lines, ranked

if TYPE_CHECKING:
    import torch
    from torch import nn

MARKER = "gradflow"
_LONGEST_NAME = 100


@dataclass(slots=True, kw_only=True)
class Checker:
    """What the fixture hands to one test: call it once for each model."""

    request: pytest.FixtureRequest
    calls: int = 0
    """How many were made, so that each has a folder of its own."""

    def __call__(
        self,
        model: nn.Module,
        inputs: Any,
        loss: Callable[..., torch.Tensor] | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        **options: Any,
    ) -> Report:
        """Run forward and backward, and fail the test for findings at or above ``fail_on``.

        The model, its gradients, buffers and modes and every random number generator are left as found.

        Args:
            model: Any module, in the modes it is to be measured in.
            inputs: A tensor, a tuple of positional arguments, a dict of keyword arguments, or an iterable of such.
            loss: ``loss(outputs, inputs)`` -> scalar tensor. Without it the output's own ``.loss`` is taken, else
                a seeded N(0, 1) cotangent on every floating output.
            optimizer: To tell parameters that it does not update.
            **options: Fields of :class:`~gradflow.integrations.pytest_options.CheckOptions`; they win over those
                of the ``gradflow`` marker. ``select`` and ``ignore`` are "GF1,GF201" or a list of such.

        Returns:
            The report, for whatever else the test wants to know.
        """
        __tracebackhide__ = True
        self.calls += 1
        caller = _place(sys._getframe(1), self.request.config)
        try:
            wanted = merged(_marked(self.request), options)
            report = _report(model, inputs, loss, optimizer, wanted)
            tables = self._write(report)
            failure = _failure(report, wanted, tables, self.request.config)
        except GradflowError as error:
            failure = _said(error)
        if failure:  # out of the handler, or pytest would show the error's own traceback too
            pytest.fail(_readable(f"{failure}\n\n{caller}: gradflow_check"), pytrace=False)
        return report

    def _write(self, report: Report) -> Path | None:
        parent = self.request.config.getoption("gradflow_csv")
        if parent is None:
            return None
        folder = Path(parent) / folder_name(self.request.node.nodeid, self.calls)
        report.to_csv(folder)
        return folder


def folder_name(test: str, call: int = 1) -> str:
    """Name a folder after a test: safe on every file system, another for each test and call.

    Args:
        test: pytest's name of it, "tests/test_net.py::test_depth[50]".
        call: Which ``gradflow_check`` of the test, from 1.
    """
    file, _, function = test.partition("::")
    readable = re.sub(r"[^A-Za-z0-9.]+", "_", f"{file.rpartition('/')[2]}_{function}")[:_LONGEST_NAME].strip(
        "._"
    )
    digest = hashlib.sha256(test.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{readable}-{digest}" if call == 1 else f"{readable}-{digest}-{call}"


def _marked(request: pytest.FixtureRequest) -> list[pytest.Mark]:
    """The markers of the test, its class and its module, the farthest first."""
    return list(request.node.iter_markers(MARKER))[::-1]


def _report(
    model: nn.Module,
    inputs: Any,
    loss: Callable[..., torch.Tensor] | None,
    optimizer: torch.optim.Optimizer | None,
    wanted: CheckOptions,
) -> Report:
    from gradflow.recording.execution import record
    from gradflow.recording.target import target_from_objects

    target = target_from_objects(model, inputs, loss, optimizer=optimizer, seed=wanted.seed)
    trace = record(target, seed=wanted.seed, steps=wanted.steps, trained=wanted.trained)
    return analyze(trace, Config(select=wanted.select, ignore=wanted.ignore, fail_on=wanted.fail_on))


def _failure(report: Report, wanted: CheckOptions, tables: Path | None, config: pytest.Config) -> str:
    """Why the test fails; "" when it does not."""
    if not report.fails(wanted.fail_on):
        return ""
    writer = config.get_terminal_writer()
    screen = Screen(
        width=max(NARROWEST, min(writer.fullwidth - 1, WIDEST)),
        # Colour codes would stand in a JUnit file as they are.
        colour=writer.hasmarkup and not config.getoption("xmlpath", None),
    )
    table = rendered(finding_lines(report, screen), screen).rstrip("\n")
    written = f"\n\nCSV tables: {tables}" if tables is not None else ""
    return f"{_headline(report, wanted)}\n\n{table}{written}"


def _headline(report: Report, wanted: CheckOptions) -> str:
    """The line that pytest repeats in its summary: the worst finding, and how many more fail the test."""
    failing = [
        f for f in (p.finding for p in ranked(report.findings)) if f.severity.rank >= wanted.fail_on.rank
    ]
    more = f" and {count_text(len(failing) - 1, 'more finding')}" if failing[1:] else ""
    return f"{_worst_in_words(failing[0])}{more}"


def _worst_in_words(finding: Finding) -> str:
    number = beside_threshold(finding)
    return f"{title(finding)} ({number})" if number else title(finding)


def _said(error: GradflowError) -> str:
    trace = error.trace_text.rstrip("\n") if isinstance(error, ModelError) else ""
    return f"gradflow: {error}\n\n{trace}".rstrip("\n")


def _readable(text: str) -> str:
    """Text that the terminal can show: pytest would escape all of it, line ends too, for one character."""
    stream = sys.__stdout__
    return encodable(text, getattr(stream, "encoding", None) or "utf-8")


def _place(frame: FrameType, config: pytest.Config) -> str:
    """Where the test made the call: "tests/test_net.py:12"."""
    path = frame.f_code.co_filename
    with suppress(ValueError):  # another drive
        path = os.path.relpath(path, config.invocation_params.dir)
    return f"{Path(path).as_posix()}:{frame.f_lineno}"
