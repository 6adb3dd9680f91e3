"""The pytest plugin: a fixture ``gradflow_check``, a marker ``gradflow``, and ``--gradflow-csv DIR``.

pytest loads this module in every project of an environment that gradflow is installed in, so it imports nothing
at its top but pytest; what a check needs is imported by the first test that checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gradflow.integrations.pytest_check import Checker

_MARKER = (
    "gradflow(select=..., ignore=..., fail_on=..., seed=..., steps=..., trained=...): what the gradflow_check "
    "calls of a test are judged by; a call's own arguments win over it."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--gradflow-csv``."""
    parser.getgroup("gradflow", "gradient-flow checks").addoption(
        "--gradflow-csv",
        metavar="DIR",
        help="write the tables of every gradflow_check as CSV files, a folder each, below DIR",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker; make DIR absolute, for tests change folders and xdist hands options to its workers."""
    config.addinivalue_line("markers", _MARKER)
    folder = config.getoption("gradflow_csv")
    if folder is not None:
        config.option.gradflow_csv = str(_checked(config.invocation_params.dir / folder))


def _checked(folder: Path) -> Path:
    from gradflow.atomic_files import check_folder
    from gradflow.errors import TraceFileError

    try:
        check_folder(folder)
    except TraceFileError as error:
        raise pytest.UsageError(f"--gradflow-csv: {error}") from error
    return folder


@pytest.fixture
def gradflow_check(request: pytest.FixtureRequest) -> Checker:
    """Run a model forward and backward once; fail the test for what the gradient does.

    ``report = gradflow_check(model, inputs, loss=None, *, optimizer=None, select=None, ignore=None,
    fail_on="error", seed=0, steps=1, trained=False)``
    """
    from gradflow.integrations.pytest_check import Checker

    return Checker(request=request)
