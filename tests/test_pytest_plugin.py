"""The pytest plugin: what a failing check shows, where its tables go, and that it costs others nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch  # noqa: F401  # before any run in this process: pytester unloads what such a run imports
from hypothesis import given
from hypothesis import strategies as st

import gradflow.recording.execution
import gradflow.recording.target  # noqa: F401
from gradflow.errors import UsageError
from gradflow.findings import Severity
from gradflow.integrations.pytest_check import folder_name
from gradflow.integrations.pytest_options import CheckOptions, merged

NETWORKS = """
import pytest
import torch
from torch import nn

torch.manual_seed(0)
X = torch.randn(8, 16)

def deep(activation=nn.Sigmoid):
    torch.manual_seed(0)
    layers = [m for _ in range(20) for m in (nn.Linear(16, 16), activation())]
    return nn.Sequential(*layers, nn.Linear(16, 4))

def small():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
"""
OURS_AT_START = {
    "gradflow",
    "gradflow._version",
    "gradflow.errors",
    "gradflow.findings",
    "gradflow.integrations",
    "gradflow.integrations.pytest_plugin",
}


def place(tests: str, said: str) -> str:
    """Where a line stands in the file that ``run`` makes of tests: "test_net.py:17"."""
    lines = (NETWORKS + tests).strip().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if said in line]
    return f"test_net.py:{number}"


def run(pytester: pytest.Pytester, tests: str, *options: str) -> pytest.RunResult:
    """Run tests in this process, with warnings as errors."""
    pytester.makepyfile(test_net=NETWORKS + tests)
    return pytester.runpytest_inprocess("-W", "error", "-p", "no:cacheprovider", *options)


def test_a_failing_check_shows_the_findings_and_no_traceback_of_ours(pytester: pytest.Pytester) -> None:
    test = "def test_deep(gradflow_check):\n    gradflow_check(deep(), X)\n"
    done = run(pytester, test)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "*_ test_deep _*",
            "GF101 vanishing-gradient at 0–38 (* < 1e-05)",
            "Findings  1 error*",
            "✗ GF101 vanishing-gradient  0–38 *",
            "  try  *",
            f"{place(test, '(deep(), X)')}: gradflow_check",
            "FAILED test_net.py::test_deep - *GF101 vanishing-gradient at 0*",
        ]
    )
    for ours in ("pytest_check.py", "Traceback", "During handling", "site-packages"):
        assert ours not in done.stdout.str()


def test_a_passing_check_returns_the_report(pytester: pytest.Pytester) -> None:
    done = run(
        pytester,
        "def test_small(gradflow_check):\n"
        "    model = small()\n"
        "    report = gradflow_check(model, X, lambda outputs, inputs: outputs.square().mean())\n"
        "    assert len(report.parameters) == 4\n"
        "    assert all(p.grad is None for p in model.parameters())\n",
    )
    done.assert_outcomes(passed=1)


def test_the_nearest_word_on_an_option_wins(pytester: pytest.Pytester) -> None:
    done = run(
        pytester,
        "pytestmark = pytest.mark.gradflow(ignore='GF')\n"
        "def test_of_the_module(gradflow_check):\n    gradflow_check(deep(), X)\n"
        "def test_of_the_call(gradflow_check):\n    gradflow_check(deep(), X, ignore=())\n"
        "@pytest.mark.gradflow(ignore=['GF2'], select='GF101')\n"
        "def test_of_the_test(gradflow_check):\n    gradflow_check(deep(), X)\n",
        "--strict-markers",
        "-rA",
    )
    done.assert_outcomes(passed=1, failed=2)
    done.stdout.fnmatch_lines(["PASSED test_net.py::test_of_the_module"])
    only = done.stdout.str().partition("_ test_of_the_test _")[2].partition("short test summary")[0]
    assert set(re.findall(r"GF\d{3}", only)) == {"GF101"}


@pytest.mark.parametrize(
    ("markers", "call", "expected"),
    [
        ([], {}, CheckOptions()),
        ([], {"fail_on": "info"}, CheckOptions(fail_on=Severity.INFO)),
        (
            [{"fail_on": "info", "steps": 3}, {"fail_on": "warning"}],
            {},
            CheckOptions(fail_on=Severity.WARNING, steps=3),
        ),
        ([{"seed": 1}], {"seed": 2, "trained": True}, CheckOptions(seed=2, trained=True)),
        (
            [{"select": "GF1, GF201"}],
            {"ignore": ["GF103"]},
            CheckOptions(select=("GF1", "GF201"), ignore=("GF103",)),
        ),
    ],
)
def test_options_are_merged(
    markers: list[dict[str, Any]], call: dict[str, Any], expected: CheckOptions
) -> None:
    assert merged([pytest.mark.gradflow(**options).mark for options in markers], call) == expected


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"selct": "GF1"}, "no option 'selct'; did you mean select?"),
        ({"fail_on": "never"}, "fail_on='never' is none of info, warning, error"),
        ({"select": 101}, "select=101 is no rule code"),
        ({"ignore": [1]}, "is no rule code"),
        ({"steps": "3"}, "steps='3' is no int"),
        ({"seed": True}, "seed=True is no int"),
        ({"trained": 1}, "trained=1 is no bool"),
    ],
)
def test_a_wrong_option_is_said_in_a_sentence(call: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        merged([], call)
    with pytest.raises(UsageError, match=re.escape(said)):
        merged([pytest.mark.gradflow(**call).mark], {})


def test_a_marker_without_keywords_is_said() -> None:
    with pytest.raises(UsageError, match="takes keywords only, not 'GF1'"):
        merged([pytest.mark.gradflow("GF1").mark], {})


def test_what_cannot_be_checked_fails_in_a_sentence(pytester: pytest.Pytester) -> None:
    tests = (
        "class Broken(nn.Linear):\n    def forward(self, x):\n        return super().forward(x) / {}['scale']\n"
        "def test_raises(gradflow_check):\n    gradflow_check(Broken(16, 4), X)\n"
        "def test_shape(gradflow_check):\n    gradflow_check(small(), X[:, :15])\n"
        "def test_rule(gradflow_check):\n    gradflow_check(small(), X, select='GF9')\n"
    )
    done = run(pytester, tests)
    done.assert_outcomes(failed=3)
    done.stdout.fnmatch_lines(
        [
            f"gradflow: the model's forward raised at {place(tests, 'super()')}: KeyError: 'scale'",
            "Traceback (most recent call last):",
            "    return super().forward(x) / {}['scale']",
            "KeyError: 'scale'",
            "gradflow: the inputs do not fit: layer 0 *",
            f"{place(tests, '[:, :15]')}: gradflow_check",
            "gradflow: 'GF9' selects no rule; did you mean GF*",
        ]
    )
    assert "pytest_check.py" not in done.stdout.str()
    assert "During handling" not in done.stdout.str()


def test_colour_is_for_terminals(pytester: pytest.Pytester) -> None:
    test = "def test_deep(gradflow_check):\n    gradflow_check(deep(), X)\n"
    title = "GF101 vanishing-gradient\x1b[0m"
    assert title in run(pytester, test, "--color=yes").stdout.str()
    assert title not in run(pytester, test, "--color=no").stdout.str()
    run(pytester, test, "--color=yes", "--junitxml=junit.xml")
    junit = (pytester.path / "junit.xml").read_text(encoding="utf-8")
    assert "GF101 vanishing-gradient  0–38" in junit
    assert "x1B" not in junit


def test_the_example_of_the_page_runs(pytester: pytest.Pytester) -> None:
    page = (Path(__file__).parents[1] / "docs" / "ci.md").read_text(encoding="utf-8")
    section = page.partition("\n### pytest\n")[2].partition("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    pytester.makepyfile(
        **{
            "models/__init__": "",
            "models/encoder": "from torch import nn\n\ndef build(depth=3):\n"
            "    return nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)) for _ in range(depth)])\n",
        }
    )
    pytester.syspathinsert()
    pytester.makepyfile(test_page=example)
    done = pytester.runpytest_inprocess("-W", "error", "-p", "no:cacheprovider", "--strict-markers")
    done.assert_outcomes(passed=2)
    assert {field.name for field in dataclasses.fields(CheckOptions)} <= set(re.findall(r"`(\w+)`", section))


TABLES = """
@pytest.mark.parametrize("name", ["a/b", "a_b", "../up", "é", "=1+1", "x" * 300, "A_B"])
def test_names(gradflow_check, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gradflow_check(small(), X)

def test_twice(gradflow_check):
    gradflow_check(small(), X)
    gradflow_check(deep(), X)
"""


def test_every_check_writes_its_tables(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_other=NETWORKS + TABLES)
    run(pytester, TABLES, "--gradflow-csv", "tables").assert_outcomes(passed=14, failed=2)
    folders = sorted(path.name for path in (pytester.path / "tables").iterdir())
    assert len({name.lower() for name in folders}) == len(folders) == 18
    assert all(re.fullmatch(r"test_[A-Za-z0-9._-]+-[0-9a-f]{12}(-2)?", name) for name in folders)
    deep = next(name for name in folders if name.startswith("test_net.py_test_twice") and name.endswith("-2"))
    findings = pd.read_csv(pytester.path / "tables" / deep / "findings.csv")
    assert findings["rule"][0] == "GF101"
    assert len(pd.read_csv(pytester.path / "tables" / deep / "parameters.csv")) == 42


def test_workers_of_xdist_write_and_say_the_same(pytester: pytest.Pytester) -> None:
    done = run(pytester, TABLES, "--gradflow-csv", "alone")
    done.assert_outcomes(passed=7, failed=1)
    command = ("-n", "2", "-p", "no:cacheprovider", "--gradflow-csv", "shared")
    spread = pytester.runpytest_subprocess(*command)
    spread.assert_outcomes(passed=7, failed=1)
    spread.stdout.fnmatch_lines(["Findings  1 error*", "CSV tables: *shared*test_twice*-2"])
    alone = {path.name for path in (pytester.path / "alone").iterdir()}
    assert {path.name for path in (pytester.path / "shared").iterdir()} == alone


def test_tables_need_a_folder(pytester: pytest.Pytester) -> None:
    (pytester.path / "taken").write_text("")
    done = run(pytester, "def test_nothing(): pass", "--gradflow-csv", "taken")
    assert done.ret is pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: --gradflow-csv: cannot write to *taken is a file; name a folder"])


@given(tests=st.lists(st.text(max_size=300), min_size=2, max_size=2, unique=True), call=st.integers(1, 9))
def test_a_folder_name_is_safe_and_its_own(tests: list[str], call: int) -> None:
    names = [folder_name(test, call) for test in tests]
    assert all(re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9._-]*|-[0-9a-f]{12}(-\d)?", name) for name in names)
    assert all(len(name) < 120 for name in names)
    assert len({name.lower() for name in [*names, folder_name(tests[0], call + 1)]}) == 3


def loaded_by_pytest(folder: Path, test: str) -> set[str]:
    """The full names of the modules that a process holds after a run of one test."""
    (folder / "test_it.py").write_text(test, encoding="utf-8")
    program = (
        "import json, sys, pytest; code = pytest.main(['-p', 'no:cacheprovider', 'test_it.py'])\n"
        "print(); print(json.dumps(sorted(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_project_that_does_not_use_it_loads_next_to_nothing(tmp_path: Path) -> None:
    loaded = loaded_by_pytest(tmp_path, "def test_nothing(): pass")
    assert {name for name in loaded if name.partition(".")[0] == "gradflow"} == OURS_AT_START
    assert loaded.isdisjoint({"torch", "pandas", "numpy", "rich", "typer"})


def test_what_a_check_loads_is_seen(tmp_path: Path) -> None:
    test = "def test_small(gradflow_check):\n    from torch import nn\n    gradflow_check(nn.Linear(4, 4), None)\n"
    assert {"torch", "rich", "gradflow.recording.execution"} <= loaded_by_pytest(tmp_path, test)
