"""Three layers of settings become one; what is misspelt is named with its line and the nearest right one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gradflow import trace_file
from gradflow.checking.module_ignores import ModuleIgnore, covers, set_aside, unused
from gradflow.checking.plan import CheckPlan, make_plan
from gradflow.cli import app
from gradflow.commands.check_options import given_settings
from gradflow.config_file import line_of, read_project
from gradflow.config_keys import KEYS
from gradflow.errors import UsageError
from gradflow.findings import Finding, Location, Severity
from tests.traces import make_trace, make_trunk

PROJECT = """\
[project]
name = "x"

[tool.gradflow]
seed = 3
select = ["GF1", "GF3"]
baseline = "known.json"

[tool.gradflow.per-module-ignores]
"encoder.embed*" = { GF103 = "frozen on purpose" }

[tool.gradflow.targets.encoder]
target = "models/encoder.py:build"
inputs = ["8x3x32x32", "ids=4x128:int64:0..999"]
loss = "cross-entropy"
seed = 7
checkpoint = "weights.pt"
per-module-ignores."head" = { GF1 = "small" }

[tool.gradflow.targets."small net"]
target = "models.small"
mode = "eval"
batch-size = 4
select = ["GF101"]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*names: str, **options: Any) -> CheckPlan:
    return make_plan(read_project(), names, given_settings(options))


def where(settings: Any) -> dict[str, str]:
    return {setting.key: setting.origin for setting in settings}


def test_a_plan_holds_what_the_file_says(project: Path) -> None:
    encoder, small = plan().targets
    assert (encoder.target, encoder.folder, encoder.seed) == ("models/encoder.py:build", str(project), 7)
    assert encoder.inputs == ("8x3x32x32", "ids=4x128:int64:0..999")
    assert (encoder.loss, encoder.checkpoint, encoder.trained) == ("cross-entropy", "weights.pt", True)
    assert encoder.config.select == ("GF1", "GF3")
    assert [ignore.code for ignore in encoder.ignores] == ["GF1", "GF103"]
    assert (small.name, small.seed, small.mode, small.batch_size) == ("small net", 3, "eval", 4)
    assert (small.config.select, small.config.fail_on) == (("GF101",), Severity.ERROR)
    assert [ignore.code for ignore in small.ignores] == ["GF103"]
    assert plan().baseline == project / "known.json"
    assert plan().whole and not plan("encoder").whole


@pytest.mark.parametrize(
    ("options", "key", "value", "origin"),
    [
        ({}, "seed", 7, "pyproject.toml"),
        ({"seed": 9}, "seed", 9, "command line"),
        ({}, "select", ("GF1", "GF3"), "pyproject.toml"),
        ({"select": ["GF303, GF104"]}, "select", ("GF303", "GF104"), "command line"),
        ({}, "steps", 1, "default"),
        ({"steps": None}, "steps", 1, "default"),
        ({"train": False}, "mode", "eval", "command line"),
        ({"fail_on": Severity.INFO}, "fail-on", "info", "command line"),
        ({"inputs": ["2x3"]}, "inputs", ("2x3",), "command line"),
        ({"trained": False}, "trained", False, "command line"),
        (
            {"max_regression": ["J=10%", "drop=5%"], "reference": Path("t.json")},
            "max-regression",
            (("J", 0.1), ("drop", 0.05)),
            "command line",
        ),
    ],
)
def test_the_nearest_layer_wins(
    project: Path, options: Mapping[str, Any], key: str, value: object, origin: str
) -> None:
    found = {setting.key: setting for setting in plan("encoder", **options).targets[0].settings}
    assert (found[key].value, found[key].origin) == (value, origin)


def test_a_target_of_the_command_line_takes_what_holds_for_all(project: Path) -> None:
    (target,) = plan("other.py:Net").targets
    assert (target.name, target.target, target.seed) == ("other.py:Net", "other.py:Net", 3)
    assert where(target.settings)["target"] == "command line"
    assert [ignore.pattern for ignore in target.ignores] == ["encoder.embed*"]


def test_the_file_is_looked_for_upwards_past_those_that_do_not_speak_of_gradflow(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = project / "package" / "deep"
    inner.mkdir(parents=True)
    (project / "package" / "pyproject.toml").write_text("[tool.ruff]\n")
    monkeypatch.chdir(inner)
    assert read_project().path == project / "pyproject.toml"
    (target,) = plan("local.py").targets
    assert target.folder == str(inner)
    assert plan("encoder", checkpoint=Path("w.pt")).targets[0].checkpoint == str(inner / "w.pt")


SPOKEN = "[tool.gradflow]\n"
TARGET = '[tool.gradflow.targets.a]\ntarget = "a.py"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[tool.gradflow]\nsead = 1",
            "pyproject.toml:2: [tool.gradflow] takes no 'sead'; did you mean 'seed'?",
        ),
        (
            "[tool.gradflow]\nfail_on = 'error'",
            ":2: [tool.gradflow] takes no 'fail_on'; did you mean 'fail-on'?",
        ),
        ("[tool.gradflow]\nxyzzy = 1", "takes no 'xyzzy'; there is loss, trained"),
        (
            "[tool.gradflow]\ntarget = 'a.py'",
            "it belongs in the table of a target, [tool.gradflow.targets.NAME]",
        ),
        (
            TARGET + "baseline = 'x'",
            ":3: [tool.gradflow.targets.a] takes no 'baseline': it belongs in [tool.gradflow]",
        ),
        (TARGET + "inptus = []", "takes no 'inptus'; did you mean 'inputs'?"),
        (
            "[tool.gradflow.target.a]\ntarget='a.py'",
            ":1: [tool.gradflow] takes no 'target'; did you mean 'targets'?",
        ),
        ("[tool.gradflow.targets.a]\nloss = 'mse'", ":1: target 'a' does not say what to check"),
        ("[tool.gradflow]\ntargets = 3", ":2: [tool.gradflow.targets] is a table, not 3"),
        ("[tool.gradflow]\nseed = -1", ":2: seed takes a whole number of 0 or more, not -1"),
        ("[tool.gradflow]\nseed = true", "seed takes a whole number of 0 or more, not True"),
        ("[tool.gradflow]\nsteps = 0", "steps takes a whole number of 1 or more, not 0"),
        ("[tool.gradflow]\nfail-on = 'fatal'", 'fail-on takes "error", "warning" or "info", not \'fatal\''),
        ("[tool.gradflow]\nmode = 'test'", "mode takes"),
        ("[tool.gradflow]\ntrained = 1", "trained takes true or false, not 1"),
        ("[tool.gradflow]\nloss = ''", "loss takes"),
        (TARGET + "inputs = [3]", ":3: inputs takes a list of inputs"),
        ("[tool.gradflow]\nmax-regression = { J = 10 }", "max-regression takes a table of limits"),
        ("[tool.gradflow]\nmax-regression = { K = '10%' }", "max-regression takes a table of limits"),
        ("[tool.gradflow]\nselect = [\n  'GF1',\n  'GF9']", ":2: 'GF9' selects no rule; did you mean GF"),
        ("[tool.gradflow.per-module-ignores]\n'a*' = { GF999 = 'why' }", ":2: 'GF999' selects no rule"),
        (
            "[tool.gradflow.per-module-ignores]\n'a*' = { GF103 = ' ' }",
            ":2: GF103 in 'a*' is ignored for no reason",
        ),
        ("[tool.gradflow.per-module-ignores]\n'a*' = ['GF103']", "is a table, not ['GF103']"),
        ("[tool.gradflow]\nseed = ", "mend it first"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    (tmp_path / "pyproject.toml").write_text(text + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        read_project()
    assert said in str(caught.value)
    result = CliRunner().invoke(app, ["check"])
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (("encoder", "small net"), {"inputs": ["2x3"]}, "--input is for one target, and there are 2"),
        ((), {"checkpoint": Path("w.pt")}, "--checkpoint is for one target"),
        (("encoder",), {"max_regression": ["J=10%"]}, "nothing to hold against"),
        (("encoder",), {"reference": Path("t.json")}, "a reference and no limit"),
        (("encoder",), {"max_regression": ["j=10%"]}, "there is no number 'j' to gate; did you mean 'J'?"),
        (("encoder",), {"max_regression": ["J=0.1"]}, "write the limit as a percentage, J=10%"),
        (("encoder",), {"max_regression": ["J=nan%"]}, "write the limit as a percentage"),
        (("encoder",), {"select": ["GF9"]}, "'GF9' selects no rule"),
    ],
)
def test_options_that_cannot_be_meant(
    project: Path, names: tuple[str, ...], options: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        plan(*names, **options)
    assert said in str(caught.value)


def test_nothing_to_check_says_what_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"name one \(gradflow check model.py\)"):
        plan()


def test_lines_are_found_in_every_form_of_a_table() -> None:
    text = '[a]\nb.c = 1\n[a.d]\n"e f" = 2\nlist = [\n  "x",\n]\n[[other]]\n'
    assert [
        line_of(text, path)
        for path in [("a", "d", "e f"), ("a", "d", "list"), ("a", "d", "no"), ("z",), ("a", "b"), ("other",)]
    ] == [4, 5, 3, 1, 2, 8]


def finding(place: str, rule: str = "GF103") -> Finding:
    first, _, last = place.partition("–")
    return Finding(
        rule=rule,
        slug="s",
        severity=Severity.ERROR,
        location=Location(first=first, last=last),
        message="m",
        why="w",
        hint="h",
    )


@pytest.mark.parametrize(
    ("pattern", "code", "place", "covered"),
    [
        ("encoder.embed*", "GF103", "encoder.embed", True),
        ("encoder.embed*", "GF103", "encoder.embedding.weight", True),
        ("encoder.embed*", "GF103", "decoder.embed", False),
        ("encoder.embed", "GF103", "encoder.embed.weight", False),
        ("encoder.*", "GF1", "encoder.layers.0", True),
        ("encoder.*", "gf103", "encoder.layers.0", True),
        ("encoder.*", "GF2", "encoder.layers.0", False),
        ("encoder.*", "GF103", "encoder.a–encoder.b", True),
        ("encoder.*", "GF103", "encoder.a–head", False),
        ("Encoder.*", "GF103", "encoder.a", False),
        ("layers.[0-3].*", "GF103", "layers.2.fc", True),
        ("(model)", "GF103", "", True),
        ("*", "GF", "", True),
    ],
)
def test_an_ignore_covers_names_as_a_shell_does(pattern: str, code: str, place: str, covered: bool) -> None:
    ignore = ModuleIgnore(pattern=pattern, code=code, reason="meant")
    assert covers(ignore, finding(place)) is covered
    kept, ignored = set_aside([finding(place)], [ignore])
    assert (len(kept), [item.reason for item in ignored]) == ((0, ["meant"]) if covered else (1, []))
    assert unused([ignore], [finding(place)], ["GF103", "GF201"]) == (() if covered else (ignore,))


def test_an_ignore_of_a_rule_that_did_not_run_is_not_unused() -> None:
    assert unused([ModuleIgnore(pattern="a", code="GF2", reason="r")], [], ["GF101"]) == ()


def test_config_shows_every_setting_and_its_origin(project: Path) -> None:
    result = CliRunner().invoke(app, ["config", "encoder", "--steps", "4", "--format", "json"])
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    (target,) = shown["targets"]
    assert shown["file"] == str(project / "pyproject.toml")
    assert set(target["settings"]) == {key.name for key in KEYS if key.target}
    assert target["settings"]["steps"] == {"value": 4, "from": "command line"}
    assert target["settings"]["seed"] == {"value": 7, "from": "pyproject.toml"}
    assert target["settings"]["dtype"] == {"value": None, "from": "default"}
    table = CliRunner().invoke(app, ["config"]).stdout
    assert "seed            pyproject.toml  7" in table
    assert "GF103 in encoder.embed*  frozen on purpose" in " ".join(table.split(" ignored "))
    assert table.count("target ") >= 2


def test_config_without_a_file_shows_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["config"])
    assert result.exit_code == 0, result.stderr
    assert "fail-on         default         error" in result.stdout


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--ignore", "GF3"], 1), (["--select", "GF1"], 0)])
def test_a_saved_trace_is_judged_by_the_file_but_for_what_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int
) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.gradflow]\nignore = ["GF101"]\n')
    trace_file.save(make_trace(trunk=make_trunk([1e-9, 1e-6, 1e-3, 1.0])), tmp_path / "trace.json")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", "trace.json", "--fail-on", "error", *options])
    assert result.exit_code == code, result.stderr


DOCS = Path(__file__).resolve().parents[1] / "docs" / "ci.md"


def test_the_page_lists_every_setting() -> None:
    table = re.findall(r"^\| `([\w-]+)` \| (both|target|project) \|", DOCS.read_text(encoding="utf-8"), re.M)
    places = {(True, True): "both", (False, True): "target", (True, False): "project"}
    assert table == [
        *((key.name, places[key.project, key.target]) for key in KEYS),
        ("per-module-ignores", "both"),
    ]


def test_the_examples_of_the_page_are_understood(tmp_path: Path) -> None:
    examples = re.findall(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    assert len(examples) == 3
    for number, example in enumerate(examples):
        folder = tmp_path / str(number)
        folder.mkdir()
        named = '\n[tool.gradflow.targets.student]\ntarget = "a.py"\n' if "student" in example else ""
        (folder / "pyproject.toml").write_text(example + named, encoding="utf-8")
        project = read_project(folder)
        assert project.targets
        assert make_plan(project, (), {}).targets
