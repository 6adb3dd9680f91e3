"""``gradflow check`` on real files: exit codes, ignores, baseline, gates, processes, and targets kept apart."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gradflow.checking.target_runs import run_targets
from gradflow.cli import app
from gradflow.commands.check_delivery import folder_names

HEALTHY = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
example_inputs = torch.randn(16, 8)
"""
DEEP = """
import torch
from torch import nn
DEPTH = 16
model = nn.Sequential(*[layer for _ in range(DEPTH) for layer in (nn.Linear(16, 16), nn.Sigmoid())])
example_inputs = torch.randn(16, 16)
"""
RAISING = """
import torch
from torch import nn
class Net(nn.Module):
    def forward(self, x):
        raise ValueError("no such thing")
model = Net()
example_inputs = torch.randn(4, 8)
"""
UNUSED = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
    def forward(self, x):
        return self.trunk(x)
model = Net()
example_inputs = torch.randn(16, 8)
"""
PROJECT = """
[tool.gradflow.targets.healthy]
target = "healthy.py"

[tool.gradflow.targets.deep]
target = "deep.py"

[tool.gradflow.targets.raising]
target = "raising.py"

[tool.gradflow.targets.missing]
target = "missing.py"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {"healthy.py": HEALTHY, "deep.py": DEEP, "raising.py": RAISING, "pyproject.toml": PROJECT}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    return tmp_path


def check(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def check_json(*arguments: object) -> dict[str, Any]:
    code, stdout, stderr = check(*arguments, "--format", "json")
    assert stdout, stderr
    shown: dict[str, Any] = json.loads(stdout)
    assert shown["exit_code"] == code
    return shown


@pytest.mark.parametrize(
    ("targets", "options", "code"),
    [
        (["healthy"], [], 0),
        (["deep"], [], 1),
        (["missing"], [], 2),
        (["raising"], [], 3),
        (["healthy", "deep"], [], 1),
        (["deep", "missing"], [], 2),
        (["missing", "raising", "deep"], [], 3),
        ([], [], 3),
        (["healthy.py"], [], 0),
        (["deep.py"], ["--ignore", "GF"], 0),
        (["deep"], ["--select", "GF104"], 0),
        (["healthy"], ["--loss", "nonsense"], 2),
        (["healthy", "deep"], ["--input", "4x8"], 2),
        (["healthy"], ["--baseline", "none.json"], 2),
        (["healthy"], ["--format", "nonsense"], 2),
        (["healthy"], ["--jobs", "0"], 2),
    ],
)
def test_exit_codes(project: Path, targets: list[str], options: list[str], code: int) -> None:
    assert check(*targets, *options)[0] == code


def test_a_bug_in_gradflow_is_4_and_stops_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(trace: Any, config: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("gradflow.analyzer.analyze", broken)
    code, stdout, stderr = check("healthy", "missing", "deep")
    assert code == 4
    assert "KeyError: 'a bug'" in stderr and stderr.count("a bug in gradflow") == 2
    assert "no such file: missing.py" in stdout


@pytest.mark.parametrize(("threshold", "code"), [("error", 0), ("warning", 1), ("info", 1)])
def test_the_threshold_decides(project: Path, threshold: str, code: int) -> None:
    (project / "unused.py").write_text(UNUSED)
    (finding,) = check_json("unused.py")["targets"][0]["findings"]
    assert (finding["rule"], finding["severity"], finding["location"]) == ("GF103", "warning", "head")
    assert check("unused.py", "--fail-on", threshold)[0] == code


def test_what_cannot_run_does_not_stop_the_rest(project: Path) -> None:
    shown = check_json()
    assert [(target["name"], target["exit_code"]) for target in shown["targets"]] == [
        ("healthy", 0),
        ("deep", 1),
        ("raising", 3),
        ("missing", 2),
    ]
    raising = shown["targets"][2]
    assert "ValueError" in raising["traceback"] and "gradflow" not in raising["traceback"]
    _, stdout, stderr = check()
    assert "4 targets: 1 passed, 1 failed, 2 not run" in stdout
    assert "missing: no such file: missing.py" in stderr and "no such thing" in stderr


def test_a_model_that_raised_is_annotated_at_its_line(project: Path) -> None:
    line = 1 + next(at for at, text in enumerate(RAISING.splitlines()) if "raise" in text)
    assert (
        f"::error file=raising.py,line={line},title=raising was not checked::"
        in check("raising", "--format", "github")[1]
    )
    (entry,) = json.loads(check("raising", "--format", "gitlab")[1])
    assert entry["location"] == {"path": "raising.py", "lines": {"begin": line}}
    (note,) = json.loads(check("raising", "--format", "sarif")[1])["runs"][0]["invocations"][0][
        "toolExecutionNotifications"
    ]
    assert note["locations"][0]["physicalLocation"]["region"] == {"startLine": line}
    assert (
        "::error file=missing.py,title=missing was not checked::" in check("missing", "--format", "github")[1]
    )


def test_a_misspelt_target_names_the_configured_one(project: Path) -> None:
    assert "did you mean the target 'healthy' of" in check("healty")[2]


def test_an_ignore_has_a_reason_and_a_use(project: Path) -> None:
    (project / "unused.py").write_text(UNUSED)
    (project / "pyproject.toml").write_text(
        '[tool.gradflow]\nfail-on = "warning"\n'
        "[tool.gradflow.per-module-ignores]\n"
        '"hea*" = { GF103 = "kept for old checkpoints" }\n"neck" = { GF103 = "gone long ago" }\n'
        '[tool.gradflow.targets.a]\ntarget = "unused.py"\n'
        '[tool.gradflow.targets.b]\ntarget = "healthy.py"\n'
    )
    shown = check_json()
    assert shown["exit_code"] == 0
    assert shown["targets"][0]["findings"] == []
    (ignored,) = shown["targets"][0]["ignored"]
    assert (ignored["rule"], ignored["reason"]) == ("GF103", "kept for old checkpoints")
    assert [ignore["pattern"] for ignore in shown["unused_ignores"]] == ["neck"]
    _, stdout, stderr = check()
    assert "GF103 at head: kept for old checkpoints" in stdout
    assert 'gradflow: this ignore matches nothing, remove it: GF103 in "neck" (gone long ago)' in stderr
    assert check("--strict-ignores")[0] == 1
    assert check("b", "--strict-ignores")[0] == 0, "the target that it is for may not have been asked for"
    assert check("--strict-ignores", "--select", "GF101")[0] == 0, "its rule did not run"
    (project / "healthy.py").write_text("raise RuntimeError")
    assert check_json("--strict-ignores")["unused_ignores"] == [], "a target could not be run"


def test_a_baseline_accepts_what_is_known_and_nothing_else(project: Path) -> None:
    (project / "pyproject.toml").write_text(
        '[tool.gradflow]\nbaseline = "known.json"\n[tool.gradflow.targets.deep]\ntarget = "deep.py"\n'
    )
    code, _, stderr = check()
    assert code == 2 and "--write-baseline" in stderr
    assert check("--write-baseline")[0] == 0
    known = (project / "known.json").read_text(encoding="utf-8")
    place = json.loads(known)["findings"][0]["location"]
    assert place.startswith("0–")
    (project / "deep.py").write_text(DEEP.replace("DEPTH = 16", "DEPTH = 18"))
    shown = check_json()
    assert shown["exit_code"] == 0 and shown["targets"][0]["findings"][0]["known"] is True
    code, stdout, _ = check()
    assert "< 1e-05  known" in stdout

    (project / "deep.py").write_text(HEALTHY)
    code, stdout, stderr = check()
    assert code == 0 and "gone" not in stderr
    assert f"gone  GF101 vanishing-gradient at {place}" in stdout
    stderr = check("--format", "github")[2]
    assert f"gradflow: gone: deep: GF101 vanishing-gradient at {place}; --write-baseline drops it" in stderr
    assert check("--write-baseline")[0] == 0
    assert "GF101" not in (project / "known.json").read_text(encoding="utf-8")
    (project / "deep.py").write_text(DEEP)
    assert check()[0] == 1


def test_writing_a_baseline_keeps_targets_that_were_not_looked_at(project: Path) -> None:
    (project / "second.py").write_text(DEEP)
    (project / "pyproject.toml").write_text(
        PROJECT + '[tool.gradflow.targets.second]\ntarget = "second.py"\n'
    )
    assert check("deep", "second", "--write-baseline")[0] == 0
    (project / "second.py").unlink()
    (project / "deep.py").write_text(HEALTHY)
    assert check("--write-baseline")[0] == 3, "raising.py still raises"
    known = (project / "gradflow-baseline.json").read_text(encoding="utf-8")
    assert '"second"' in known and '"deep"' not in known


def test_a_gate_tells_a_change_from_noise(project: Path) -> None:
    net = DEEP.replace("nn.Sigmoid()", "nn.ReLU()").replace("DEPTH = 16", "DEPTH = 4")
    (project / "net.py").write_text(net)
    assert check("net.py", "--seeds", "5", "--csv", "saved")[0] == 0
    reference = project / "saved" / "trace.json"
    assert len(json.loads(reference.read_text())["seeds"]) == 5
    gate = ("--reference", reference, "--max-regression", "J=10%", "--ignore", "GF")

    shown = check_json("net.py", *gate)
    assert (shown["exit_code"], shown["targets"][0]["gates"][0]["verdict"]) == (0, "no difference")
    (again,) = check_json("net.py", *gate, "--seed", "100")["targets"][0]["gates"]
    assert again["verdict"] == "no difference", "other seeds are noise"
    assert "no difference can be told from noise" in check("net.py", *gate)[1]

    (project / "net.py").write_text(net.replace("nn.ReLU()", "nn.Sigmoid()"))
    shown = check_json("net.py", *gate)
    (finding,) = shown["targets"][0]["findings"]
    assert (shown["exit_code"], finding["rule"], finding["severity"]) == (1, "GATE", "error")
    assert "explain GATE" not in check("net.py", *gate)[1]
    assert check("net.py", *gate, "--write-baseline")[0] == 1, "a gate is never accepted by a baseline"
    assert check("net.py", *gate, "--seeds", "2")[0] == 2


FORMS = ("table", "json", "csv", "markdown", "sarif", "junit", "github", "gitlab")


def run(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "gradflow", "check", *map(str, arguments)], capture_output=True
    )


def test_processes_give_the_same_report_byte_for_byte(project: Path) -> None:
    alone = run("--format", "json", "--csv", "alone")
    spread = run("--format", "json", "--csv", "spread", "--jobs", "3")
    assert alone.returncode == spread.returncode == 3
    assert alone.stdout == spread.stdout
    assert alone.stderr.replace(b"alone", b"spread") == spread.stderr
    files = sorted(path.relative_to("alone") for path in Path("alone").rglob("*.*"))
    assert len(files) >= 8
    for file in files:
        assert ("alone" / file).read_bytes() == ("spread" / file).read_bytes(), file


def test_a_target_that_kills_its_process_stops_nothing(project: Path) -> None:
    (project / "crash.py").write_text("import os\nos.abort()\n")
    done = run("crash.py", "healthy.py", "deep.py", "--jobs", "2", "--format", "json")
    shown = json.loads(done.stdout)
    assert [target["exit_code"] for target in shown["targets"]] == [3, 0, 1]
    assert "the process that ran crash.py died" in shown["targets"][0]["error"]


def test_an_interrupt_ends_the_processes_too(project: Path) -> None:
    for name in ("one", "two", "three"):
        (project / f"{name}.py").write_text(
            f"import pathlib, time\npathlib.Path('{name}.started').touch()\ntime.sleep(100)\n"
        )
    # A process that was started in the background of a shell would not hear the signal.
    own_handler = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start = own_handler + "import sys; sys.argv[0] = 'gradflow'; from gradflow.cli import main; main()"
    command = [sys.executable, "-c", start, "check", "one.py", "two.py", "three.py", "--jobs", "2"]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while len(list(project.glob("*.started"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 2
    assert stderr.endswith("interrupted; nothing was written\n")
    assert not (project / "three.started").exists()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_every_target_that_ran(project: Path, form: str) -> None:
    code, stdout, _ = check("healthy", "deep", "--format", form)
    assert code == 1
    assert "deep" in stdout or "GF101" in stdout


def test_one_run_is_written_in_as_many_forms_as_are_asked_for(project: Path) -> None:
    copies = [
        f"--also={form}={form}.txt" for form in ("sarif", "junit", "gitlab", "markdown", "github", "table")
    ]
    code, stdout, stderr = check("healthy", "deep", *copies, "--format", "json", "--output", "all.json")
    assert (code, stdout) == (1, "")
    assert stderr.count("wrote ") == 7
    for form in ("sarif", "junit", "gitlab", "markdown", "github"):
        assert (project / f"{form}.txt").read_text() == check("healthy", "deep", "--format", form)[1]
    assert "✗ deep" in (project / "table.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("also", "said"),
    [
        ("sarif", "--also sarif: write a format and a file, sarif=gradflow.sarif"),
        ("sarif=", "write a format and a file"),
        ("sarf=a", "there is no format 'sarf'; did you mean sarif? --also takes table"),
        ("sarif=none/a", "there is no folder"),
        ("table=a.parquet", "asks for Parquet"),
    ],
)
def test_a_copy_that_cannot_be_written_is_said_before_anything_runs(
    project: Path, also: str, said: str
) -> None:
    code, stdout, stderr = check("deep", "--also", also)
    assert (code, stdout) == (2, "") and said in stderr


def test_a_target_that_passed_has_a_line_and_no_screen(project: Path) -> None:
    stdout = check("healthy", "deep")[1]
    assert "── deep ─" in stdout and "── healthy ─" not in stdout
    assert re.search(r"^✓ healthy  no findings, gain 0?\.\d+$", stdout, re.MULTILINE)
    assert "── healthy ─" in check("healthy", "deep", "--all")[1]
    known = check("healthy", "deep", "--write-baseline")[1]
    assert known.startswith("Check  2 targets: 2 passed\n") and re.search(
        r"deep  no findings, \d known", known
    )


def test_two_checks_of_one_model_are_told_apart_in_every_form(project: Path) -> None:
    twins = "".join(f'[tool.gradflow.targets.{name}]\ntarget = "deep.py"\n' for name in ("one", "two"))
    (project / "pyproject.toml").write_text(twins)
    for form in ("sarif", "junit", "gitlab", "github", "markdown"):
        stdout = check("--format", form)[1]
        assert all(name in stdout for name in ("one", "two")), form
    entries = {entry["fingerprint"]: entry for entry in json.loads(check("--format", "gitlab")[1])}
    alone = json.loads(check("two", "--format", "gitlab")[1])
    assert alone == [entries[entry["fingerprint"]] for entry in alone]


def test_a_workflow_gets_annotations_by_itself(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = project / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert "::error file=deep.py,line=1," in check("deep")[1]
    assert "GF101" in summary.read_text(encoding="utf-8")
    assert check("deep", "--format", "table")[1].startswith("gradflow ")


def test_csv_of_several_targets(project: Path) -> None:
    assert check("healthy", "deep.py", "--csv", "review", "--format", "csv", "--output", "all.csv")[0] == 1
    assert {path.name for path in (project / "review").iterdir()} == {"healthy", "deep.py"}
    assert (project / "review" / "deep.py" / "findings.csv").is_file()
    with (project / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["target"] for row in rows} == {"healthy", "deep.py"}


def test_folder_names_are_plain_and_distinct() -> None:
    names = ["a", "A", "models/net.py:build", "models_net.py_build", "../..", "größe"]
    assert folder_names(names) == [
        "a",
        "A-2",
        "models_net.py_build",
        "models_net.py_build-2",
        "target",
        "größe",
    ]


SHARED = """
import torch
from torch import nn
torch.set_default_dtype(torch.float64)
torch.set_float32_matmul_precision("high")
batch_size = 4
model = nn.Linear(8, 8)
def get_inputs():
    return [torch.randn(batch_size, 8)]
"""


def test_a_target_finds_nothing_of_those_before_it(project: Path) -> None:
    package = project / "models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "shared.py").write_text(SHARED)
    (project / "pyproject.toml").write_text(
        '[tool.gradflow.targets.one]\ntarget = "models.shared"\nbatch-size = 9\n'
        '[tool.gradflow.targets.two]\ntarget = "models.shared"\nseed = 1\n'
        '[tool.gradflow.targets.three]\ntarget = "healthy.py"\n'
    )
    before = set(sys.modules)
    together = check_json()["targets"]
    assert [target["run"]["batch_size"] for target in together] == [9, 4, 16]
    assert [target["run"]["dtype"] for target in together] == ["float64", "float64", "float32"]
    alone = [check_json(name)["targets"][0] for name in ("one", "two", "three")]
    assert together == alone
    assert together[0]["parameters"] != together[1]["parameters"], "each seed builds its own weights"
    left = set(sys.modules) - before
    assert not [name for name in left if name.startswith(("models", "gradflow_target_"))]


def test_torch_is_imported_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[int] = []
    monkeypatch.setattr("gradflow.commands.torch_import.import_torch", lambda: imported.append(1))
    assert check("healthy", "deep", "healthy.py")[0] == 1
    assert imported == [1]
    assert run_targets((), progress=lambda phrase: None) == ()
