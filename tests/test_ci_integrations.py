"""The GitHub Action, the pre-commit hook and the snippets of docs/ci.md, tested by running what they run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradflow.reporters.markdown import MARKER
from tests.test_ci_formats import sarif_validator

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "tests" / "example_repository"
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
BREAKS = ("models/plain.py", "nn.ReLU()", "nn.Sigmoid()")
ANNOTATION = "::error file=models/plain.py,line=7,title=GF101 vanishing-gradient at stem–layers.15::"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example repository, checked out; what runs in it finds the gradflow under test."""
    folder = tmp_path / "checkout"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    return folder


def break_it(repository: Path) -> None:
    file, line, edited = BREAKS
    source = (repository / file).read_text(encoding="utf-8")
    assert source.count(line) == 1
    (repository / file).write_text(source.replace(line, edited), encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a step of the action left behind."""

    code: int
    said: str
    outputs: str
    summary: str


def filled(text: str, inputs: Mapping[str, str]) -> str:
    """A value of the action with the runner's expressions in it worked out; others than these two fail the test."""
    known = {"github.action_path": str(ROOT)} | {f"inputs.{name}": value for name, value in inputs.items()}
    return re.sub(r"\$\{\{ *(.*?) *\}\}", lambda found: known[found[1]], text)


def inputs_with(given: Mapping[str, str]) -> dict[str, str]:
    assert set(given) <= set(ACTION["inputs"])
    return {name: given.get(name, about["default"]) for name, about in ACTION["inputs"].items()}


def run_step(at: int, workspace: Path, environ: Mapping[str, str] | None = None, **given: str) -> Ran:
    """Run a step's script as the runner does: its bash, its environment, its files for outputs and summary."""
    step, inputs = ACTION["runs"]["steps"][at], inputs_with(given)
    assert step["shell"] == "bash"
    files = {name: workspace.parent / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("")
    step_environ = {name: filled(value, inputs) for name, value in step["env"].items()}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=workspace / filled(step.get("working-directory", "."), inputs),
        env={**os.environ, "GITHUB_ACTIONS": "true", **map_text(files), **step_environ, **(environ or {})},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    output, summary = (file.read_text(encoding="utf-8") for file in files.values())
    return Ran(code=done.returncode, said=done.stdout + done.stderr, outputs=output, summary=summary)


def map_text(values: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


INSTALL, CHECK = 0, 1


def test_the_action_is_one_that_the_runner_takes() -> None:
    assert ACTION["runs"]["using"] == "composite"
    assert set(ACTION) == {"name", "description", "branding", "inputs", "outputs", "runs"}
    assert all(
        about["description"] and isinstance(about["default"], str) for about in ACTION["inputs"].values()
    )
    used = re.findall(r"inputs\.([\w-]+)", json.dumps(ACTION["runs"]))
    assert set(used) == set(ACTION["inputs"]), "each input is used, and no other"
    steps = ACTION["runs"]["steps"]
    assert [step["name"] for step in steps] == ["Install gradflow", "Check"]
    assert steps[INSTALL]["if"] == "inputs.install == 'true'"
    assert (
        ACTION["outputs"]["exit-code"]["value"] == f"${{{{ steps.{steps[CHECK]['id']}.outputs.exit-code }}}}"
    )
    scripts = "".join(step["run"] for step in steps)
    assert "${{" not in scripts, "an input in a script could run as one; inputs come by the environment"


def test_the_action_is_green_and_then_red_by_one_line(repository: Path) -> None:
    green = run_step(CHECK, repository)
    assert (green.code, green.outputs) == (0, "exit-code=0\n")
    assert green.said == "gradflow: no findings in 2 targets\n"
    break_it(repository)
    red = run_step(CHECK, repository, sarif="g.sarif", markdown="comment.md")
    assert (red.code, red.outputs) == (1, "exit-code=1\n")
    assert red.said.count("::error") == 1 and ANNOTATION in red.said
    log = json.loads((repository / "g.sarif").read_text(encoding="utf-8"))
    sarif_validator().validate(log)
    assert [result["ruleId"] for result in log["runs"][0]["results"] if result["level"] == "error"] == [
        "GF101"
    ]
    comment = (repository / "comment.md").read_text(encoding="utf-8")
    assert comment == red.summary and comment.startswith(MARKER) and "GF101" in comment


def test_the_action_hands_over_targets_and_options_as_they_were_written(repository: Path) -> None:
    break_it(repository)
    (repository / "my models").mkdir()
    shutil.copy(repository / "models" / "residual.py", repository / "my models" / "net.py")
    targets = "residual\n  my models/net.py  \n"
    assert run_step(CHECK, repository, targets=targets, options="--batch-size 4").code == 0
    ignored = run_step(CHECK, repository, options="--ignore 'GF101, GF3'\n--seed 3")
    assert ignored.code == 0, ignored.said
    missing = run_step(CHECK, repository, targets="$(touch ran)\n`touch ran`; touch ran")
    assert (missing.code, missing.outputs) == (2, "exit-code=2\n")
    assert run_step(CHECK, repository, options="--select 'GF1").code not in (0, 2), "an open quote"
    assert not (repository / "ran").exists()


def test_the_action_runs_where_it_is_told_to(repository: Path) -> None:
    (repository.parent / "mono").mkdir()
    repository.rename(repository.parent / "mono" / "net")
    done = run_step(CHECK, repository.parent / "mono", **{"working-directory": "net"})
    assert done.said == "gradflow: no findings in 2 targets\n"


@pytest.mark.slow
def test_the_action_installs_gradflow_from_its_own_checkout(repository: Path, tmp_path: Path) -> None:
    """Needs the network: pip fetches what builds the package. PyTorch is there, as in a job that has installed it."""
    place = tmp_path / "env"
    venv.create(place, with_pip=True)
    (site,) = place.glob("lib/python*/site-packages")
    libraries = Path(pytest.__file__).parents[1]
    (site / "libraries.pth").write_text(f"{libraries}\n")
    environ = {"PYTHONPATH": ""}
    python = str(place / "bin" / "python")
    installed = run_step(INSTALL, repository, environ, python=python)
    assert installed.code == 0, installed.said
    assert (site / "gradflow" / "cli.py").is_file()
    assert run_step(CHECK, repository, environ, python=python).said == "gradflow: no findings in 2 targets\n"


def git(folder: Path, *arguments: str) -> str:
    identity = [
        "-c",
        "user.name=example",
        "-c",
        "user.email=example@example.org",
        "-c",
        "commit.gpgsign=false",
    ]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def committed(folder: Path) -> str:
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--no-verify", "--message", "start")
    return git(folder, "rev-parse", "HEAD")


def commit(repository: Path, home: Path) -> tuple[int, str]:
    """Stage everything and commit, with the hooks that are installed."""
    git(repository, "add", "--all")
    command = ["git", "-c", "user.name=e", "-c", "user.email=e@example.org", "commit", "--message", "change"]
    environ = {**os.environ, "PRE_COMMIT_HOME": str(home), "COLUMNS": "80"}
    done = subprocess.run(
        command, cwd=repository, env=environ, capture_output=True, text=True, encoding="utf-8"
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="pre-commit fetches hooks with git")
def test_the_hook_stops_the_commit_that_breaks_a_model(repository: Path, tmp_path: Path) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    config = yaml.safe_load(snippet("pre-commit"))
    config["repos"][0] |= {"repo": str(hooks), "rev": committed(hooks)}
    (repository / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    committed(repository)
    subprocess.run(
        [sys.executable, "-m", "pre_commit", "install"], cwd=repository, check=True, capture_output=True
    )

    (repository / "models" / "notes.md").write_text("words\n")
    code, said = commit(repository, tmp_path / "home")
    assert code == 0 and re.search(r"gradflow check\.+\(no files to check\)Skipped", said)
    break_it(repository)
    code, said = commit(repository, tmp_path / "home")
    assert code == 1 and re.search(r"gradflow check\.+Failed", said)
    assert "✗ GF101 vanishing-gradient  stem–layers.15" in said and "Traceback" not in said
    git(repository, "checkout", "--quiet", "HEAD", "--", "models")
    with (repository / "models" / "plain.py").open("a", encoding="utf-8") as file:
        file.write("\n# A comment changes nothing.\n")
    code, said = commit(repository, tmp_path / "home")
    assert code == 0 and re.search(r"gradflow check\.+Passed", said)


def snippet(title: str) -> str:
    """The YAML block under a heading of the page."""
    section = PAGE.partition(f"\n### {title}\n")[2].partition("\n### ")[0]
    (block,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    return block


def test_the_workflow_of_the_page_uses_the_action_as_it_is() -> None:
    workflow: Any = yaml.safe_load(snippet("GitHub"))
    (job,) = workflow["jobs"].values()
    (ours,) = [step for step in job["steps"] if "/gradflow@" in step.get("uses", "")]
    assert set(ours["with"]) <= set(ACTION["inputs"])
    steps = json.dumps(job["steps"])
    for written in (ours["with"]["sarif"], ours["with"]["markdown"]):
        assert steps.count(written) == 2, "what is written is also read"


def test_the_job_of_the_page_writes_what_gitlab_collects(repository: Path) -> None:
    (job,) = yaml.safe_load(snippet("GitLab")).values()
    break_it(repository)
    (command,) = [line for line in job["script"] if line.startswith("gradflow ")]
    done = subprocess.run(
        ["bash", "-ec", command], cwd=repository, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 1
    assert "✗ GF101" in done.stdout
    assert job["artifacts"]["when"] == "always"
    reports = job["artifacts"]["reports"]
    (entry,) = json.loads((repository / reports["codequality"]).read_text(encoding="utf-8"))[:1]
    assert (entry["check_name"], entry["location"]["path"]) == ("GF101", "models/plain.py")
    assert "<failure" in (repository / reports["junit"]).read_text(encoding="utf-8")


def test_the_hook_is_the_one_that_the_page_names() -> None:
    (hook,) = HOOKS
    (repo,) = yaml.safe_load(snippet("pre-commit"))["repos"]
    assert [used["id"] for used in repo["hooks"]] == [hook["id"]]
    assert (hook["language"], hook["pass_filenames"]) == ("system", False)
