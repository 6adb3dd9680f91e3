"""The command line: exit codes, streams, and suggestions that can be copied."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gradflow import __version__, trace_file
from gradflow.analyzer import analyze
from gradflow.cli import app, guarded
from gradflow.config import Config
from gradflow.errors import GradflowError, InputError, ModelError, TargetError, TraceFileError
from gradflow.reporters import markdown, reporters
from gradflow.reporters.screen import Screen, width_of
from gradflow.rules import RULES
from tests.screens import SCREENS
from tests.traces import make_trace, make_trunk


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved trace with an error in it: a trunk that keeps 1e-9."""
    path = tmp_path / "trace.json"
    trace_file.save(make_trace(trunk=make_trunk([1e-9, 1e-6, 1e-3, 1.0])), path)
    return path


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "gradflow", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment | {"COLUMNS": "80"} | variables,
        encoding="utf-8",
    )


def raising(error: BaseException) -> typer.Typer:
    def command() -> int:
        raise error

    one = typer.Typer(pretty_exceptions_enable=False)
    one.command()(guarded(command))
    return one


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (TargetError("no model in x.py"), 2, "gradflow: no model in x.py\n"),
        (InputError("x is too wide"), 2, "gradflow: x is too wide\n"),
        (TraceFileError("no folder"), 2, "gradflow: no folder\n"),
        (ModelError("forward raised"), 3, "gradflow: forward raised\n"),
        (
            ModelError("forward raised", trace_text="Traceback\n  model.py:3\n"),
            3,
            "Traceback\n  model.py:3\ngradflow: forward raised\n",
        ),
        (GradflowError("odd"), 4, "gradflow: odd\n"),
        (KeyboardInterrupt(), 2, "interrupted; nothing was written\n"),
    ],
)
def test_an_error_is_one_sentence_and_its_code(error: BaseException, code: int, said: str) -> None:
    result = CliRunner().invoke(raising(error), [])
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", said)


def test_anything_else_is_a_bug_with_its_traceback() -> None:
    result = CliRunner().invoke(raising(KeyError("x")), [])
    assert result.exit_code == 4
    assert result.stdout == ""
    assert "Traceback (most recent call last)" in result.stderr
    assert "a bug in gradflow (KeyError)" in result.stderr.splitlines()[-1]


def test_the_exit_code_of_a_command_is_what_it_returns() -> None:
    one = typer.Typer()
    one.command()(guarded(lambda: 1))
    assert CliRunner().invoke(one, []).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 0),
        (["--fail-on", "error"], 1),
        (["--fail-on", "info"], 1),
        (["--fail-on", "error", "--ignore", "GF1"], 0),
        (["--fail-on", "error", "--select", "GF303,GF104"], 0),
        (["--fail-on", "error", "--select", "GF303", "--select", "gf101"], 1),
        (["--fail-on", "catastrophe"], 2),
        (["--select", "GF9"], 2),
        (["--format", "xml"], 2),
        (["--format", "sarif", "--fail-on", "warning"], 1),
        (["--output", "no/such/folder/report.json"], 2),
        (["--nonsense"], 2),
    ],
)
def test_exit_codes_of_a_saved_trace(saved: Path, arguments: list[str], code: int) -> None:
    got, stdout, stderr = invoke("report", saved, *arguments)
    assert got == code, stderr
    assert bool(stdout) is (code < 2)
    assert bool(stderr) is (code == 2)


def test_a_format_that_does_not_exist_lists_those_that_do(saved: Path) -> None:
    assert (
        "did you mean json? --format takes table, json, csv, markdown"
        in invoke("report", saved, "--format", "jsn")[2]
    )
    assert "--format takes table, json, csv, markdown" in invoke("report", saved, "--format", "html")[2]


def test_the_help_names_every_format() -> None:
    text = " ".join(invoke("report", "--help")[1].split())
    assert all(form in text for form in reporters(Screen()))


def test_the_table_is_plain_in_a_pipe_and_suggests_what_can_be_typed(saved: Path) -> None:
    done = run("report", saved)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "gradflow explain GF101" in done.stdout
    assert f"gradflow report {saved} --csv report" in " ".join(done.stdout.replace("\\\n", "").split())


def test_json_alone_is_on_standard_output(saved: Path, tmp_path: Path) -> None:
    done = run("report", saved, "--format", "json", "--csv", tmp_path / "out", "--fail-on", "error")
    assert done.returncode == 1
    assert json.loads(done.stdout)["findings"][0]["rule"] == "GF101"
    assert done.stderr == f"wrote {tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "layers.csv").is_file()


def test_output_goes_to_its_file_without_colour(saved: Path, tmp_path: Path) -> None:
    done = run("report", saved, "--output", tmp_path / "report.txt", FORCE_COLOR="1")
    assert (done.returncode, done.stdout) == (0, "")
    text = (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert "GF101" in text
    assert "\x1b" not in text


def test_a_stream_without_unicode_and_a_reader_that_leaves(saved: Path) -> None:
    done = run("report", saved, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "x vanishing gradient" in done.stdout
    command = f"{sys.executable} -m gradflow report {saved} --format json | head -c 1"
    piped = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert (piped.stdout, piped.stderr, piped.returncode) == ("{", "", 0)


def test_colour_is_forbidden_by_no_color(saved: Path) -> None:
    assert "\x1b[" in run("report", saved, FORCE_COLOR="1").stdout
    assert "\x1b" not in run("report", saved, FORCE_COLOR="1", NO_COLOR="1").stdout


def test_rules_lists_every_rule() -> None:
    code, text, _ = invoke("rules")
    assert code == 0
    assert all(rule.code in text and rule.slug in text for rule in RULES)
    rows = json.loads(invoke("rules", "--format", "json")[1])
    assert [(row["code"], row["slug"], row["summary"]) for row in rows] == [
        (rule.code, rule.slug, rule.summary) for rule in RULES
    ]
    assert invoke("rules", "--format", "csv")[0] == 2


@pytest.mark.parametrize("name", ["GF101", "gf101", "vanishing-gradient"])
def test_explain_shows_the_page(name: str) -> None:
    code, text, _ = invoke("explain", name)
    assert code == 0
    assert text.startswith("# GF101 vanishing-gradient\n")


def test_explain_renders_on_a_terminal() -> None:
    done = run("explain", "GF101", FORCE_COLOR="1")
    assert "\x1b[1mGF101 vanishing-gradient" in done.stdout
    assert "\x1b[4" not in done.stdout.replace("\x1b[4m", "")
    assert "# GF101" not in done.stdout


def test_explain_an_unknown_rule_names_the_nearest() -> None:
    code, stdout, stderr = invoke("explain", "GF1O1")
    assert (code, stdout) == (2, "")
    assert "GF101" in stderr


def test_version_and_help() -> None:
    code, text, _ = invoke("--version")
    assert code == 0
    assert text.startswith(f"gradflow {__version__} (torch ")
    for command in ("inspect", "report", "rules", "explain"):
        assert command in invoke("--help")[1]
        assert invoke(command, "--help")[0] == 0


MODEL = """
import torch
from torch import nn

print("building")
model = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(32, 32), nn.Sigmoid())])
example_inputs = torch.randn(8, 32)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL, encoding="utf-8")
    return path


def test_inspect_reports_on_standard_output_alone(model: Path, tmp_path: Path) -> None:
    done = run("inspect", model, "--format", "json", "--csv", tmp_path / "out", "--fail-on", "error")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["run"]["inputs_from"] == "example_inputs"
    assert [finding["rule"] for finding in report["findings"]][:1] == ["GF101"]
    assert done.stderr == f"building\nwrote {tmp_path / 'out'}\n"
    again = run("report", tmp_path / "out" / "trace.json", "--format", "json")
    assert json.loads(again.stdout) == report


def test_inspect_exits_clean_whatever_it_finds(model: Path) -> None:
    done = run("inspect", model, "--batch-size", "4", "--seed", "3", "--steps", "2", "--eval")
    assert done.returncode == 0, done.stderr
    assert "GF101 vanishing-gradient" in done.stdout
    assert "seed 3 · 2 steps" in done.stdout
    assert "eval mode" in done.stdout


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("x = 1", 2),
        ("def broken(:", 2),
        ("import no_such_module_at_all", 2),
        ("from torch import nn\nmodel = nn.Linear(3, 3)\nexample_inputs = 1 / 0", 3),
    ],
)
def test_inspect_refuses_in_one_sentence_and_writes_nothing(tmp_path: Path, source: str, code: int) -> None:
    (tmp_path / "bad.py").write_text(source, encoding="utf-8")
    done = run("inspect", tmp_path / "bad.py", "--csv", tmp_path / "out", "--output", tmp_path / "report.txt")
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("gradflow: ")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py"] in ([], ["__pycache__"])


def test_progress_is_one_line_on_a_terminal_and_gone_at_the_end(model: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "gradflow", "inspect", str(model)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, text=True, env=environment)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.returncode == 0
    assert done.stdout.startswith("gradflow ")
    assert "importing torch" in shown
    assert "\x1b[2K" in shown.rpartition("importing torch")[2]


INTERRUPTED_MODEL = """
import time
from torch import nn, ones

class Slow(nn.Module):
    def forward(self, x):
        print("here", flush=True)
        time.sleep(60)
        return x

model, example_inputs = Slow(), ones(2, 3)
"""


def test_control_c_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(INTERRUPTED_MODEL, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "gradflow",
        "inspect",
        "slow.py",
        "--csv",
        "out",
        "--output",
        "report.txt",
    ]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (2, "", "interrupted; nothing was written\n")
    assert {path.name for path in tmp_path.iterdir()} <= {"slow.py", "__pycache__"}


def test_the_width_is_the_terminal_s_or_eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with Path(os.devnull).open("w") as stream:
        assert width_of(stream) == 80


def test_a_saved_trace_is_shown_as_the_reporter_makes_it(tmp_path: Path) -> None:
    trace = SCREENS["three_rows"]().trace
    trace_file.save(trace, tmp_path / "t.json")
    shown = run("report", tmp_path / "t.json", "--format", "markdown").stdout
    assert shown == markdown.render(analyze(trace, Config()))
