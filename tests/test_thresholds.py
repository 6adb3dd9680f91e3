"""Limits of one's own: each that has a name moves the rule's verdict, from the file and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_rule_examples import example, recorded  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from gradflow.analyzer import find
from gradflow.checking.plan import make_plan
from gradflow.cli import app
from gradflow.config import Config
from gradflow.config_file import read_project
from gradflow.errors import UsageError
from gradflow.rules import RULES, find_rule, find_threshold
from gradflow.rules.rule import Rule, Threshold, in_force

MOVABLE = [rule for rule in RULES if rule.settings]
OUT_OF_REACH = 1e300


def test_names_are_unique_and_those_without_one_are_definitions() -> None:
    for rule in RULES:
        named = [threshold for threshold in rule.thresholds if threshold.key]
        assert len(rule.settings) == len(named)
        assert all(threshold.value in (0, 65504.0) for threshold in rule.thresholds if not threshold.key)


def silencing(rule: Rule) -> Iterator[tuple[str, float]]:
    """Each limit moved to where nothing is beyond it."""
    for name, threshold in rule.settings.items():
        yield name, -OUT_OF_REACH if _wants_more(threshold) else OUT_OF_REACH


def _wants_more(threshold: Threshold) -> bool:
    return threshold.name.endswith(("below", "at most", "up to"))


@pytest.mark.parametrize("rule", MOVABLE, ids=lambda rule: rule.code)
def test_moved_limits_silence_the_failing_example(rule: Rule, example: Any) -> None:  # noqa: F811
    trace = recorded(example(rule.failing_example))
    own = Config(select=(rule.code,))
    assert find(trace, own)
    moved = Config(select=(rule.code,), thresholds=tuple(silencing(rule)))
    definitions = {threshold.value for threshold in rule.thresholds if not threshold.key}
    assert [finding for finding in find(trace, moved) if finding.threshold not in definitions] == []


def test_one_moved_limit_leaves_the_others() -> None:
    rule = find_rule("GF101")
    limits = in_force(rule, Config(thresholds=(("GF101.gain.error", 1e-9),)))
    assert [limit.value for limit in limits["gain"]] == [0.02, 1e-3, 1e-9]
    assert limits.only("slope") in rule.thresholds


@pytest.mark.parametrize("name", ["GF101.gain.error", "gf101.GAIN.error "])
def test_names_are_found_in_any_case(name: str) -> None:
    assert find_threshold(name) == "GF101.gain.error"


def test_a_misspelt_name_is_said_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no threshold 'GF101.gian.error'; did you mean GF101.gain.error"):
        find_threshold("GF101.gian.error")


PROJECT = """\
[tool.gradflow.thresholds]
"GF101.gain.error" = 1e-9
GF301.dead = { warning = 0.6, error = 0.99 }

[tool.gradflow.targets.small]
target = "small.py"
thresholds = { GF101.gain.warning = 1e-4 }

[tool.gradflow.targets.other]
target = "other.py"
"""


def test_the_file_is_read_in_both_spellings_and_the_nearest_table_wins(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    plans = {plan.name: plan.config.thresholds for plan in make_plan(read_project(tmp_path), (), {}).targets}
    assert plans["small"] == (("GF101.gain.warning", 1e-4),)
    assert plans["other"] == (
        ("GF101.gain.error", 1e-9), ("GF301.dead.warning", 0.6), ("GF301.dead.error", 0.99),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('"GF101.gian.error" = 1', "pyproject.toml:2: there is no threshold 'GF101.gian.error'"),
        ('"GF101.gain.error" = "low"', "thresholds takes a table of limits"),
        ('"GF101.gain.error" = true', "thresholds takes a table of limits"),
        ('"GF101.gain.error" = nan', "thresholds takes a table of limits"),
    ],
)
def test_what_is_wrong_in_the_file_is_said(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[tool.gradflow.thresholds]\n{line}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["config"])
    assert done.exit_code == 2
    assert said in done.stderr


def test_the_command_line_moves_a_limit(tmp_path: Path) -> None:
    target = "sample_models/deep_sigmoid_mlp.py"
    names = ("gain.error", "gain.warning", "lost-gain.error")
    moved = [word for name in names for word in ("--threshold", f"GF101.{name}=1e-30")]
    done = CliRunner().invoke(
        app, ["inspect", target, "--select", "GF101", "--fail-on", "error", "--format", "json", *moved]
    )
    assert done.exit_code == 0, done.stderr
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["severity"], finding["threshold"]) == ("warning", 0.27)  # the slope's limit stays
    assert CliRunner().invoke(app, ["inspect", target, "--fail-on", "error"]).exit_code == 1
    wrong = CliRunner().invoke(app, ["inspect", target, "--threshold", "GF101.gain.error=low"])
    assert wrong.exit_code == 2
    assert "write a number, GF101.gain.error=0.5" in wrong.stderr
    shown = CliRunner().invoke(app, ["config", "--threshold", "GF101.gain.error=1e-30"])
    assert "GF101.gain.error=1e-30" in shown.stdout
