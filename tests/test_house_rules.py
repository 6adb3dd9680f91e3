"""What every module keeps to: short functions, docstrings, frozen values, nothing swallowed or left over."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradflow.config
import gradflow.findings
import gradflow.rules.rule
import gradflow.trace_model
import gradflow.trunk_profile

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FUNCTION = 60
LEFTOVERS = ("TO" + "DO", "FIX" + "ME", "/wo" + "rk/")
FOLDERS = ("gradflow", "tests", "sample_models", "benchmarks", "docs", ".ci")
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".csv", ".c", ""}


def leftovers(text: str) -> list[str]:
    """Return the words that no file of the project holds: notes to oneself and paths of one machine."""
    return [word for word in LEFTOVERS if word in text]


def long_functions(tree: ast.Module) -> list[str]:
    """Return each function longer than the limit, with its length in lines."""
    lengths = [(f.name, (f.end_lineno or f.lineno) - f.lineno + 1) for f in _functions(tree)]
    return [f"{name}: {length} lines" for name, length in lengths if length > LONGEST_FUNCTION]


def undocumented(tree: ast.Module) -> list[str]:
    """Return each public function and class of a module that has no docstring."""
    public = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in tree.body if isinstance(node, public) and not node.name.startswith("_")]
    return [node.name for node in nodes if not ast.get_docstring(node)]


def swallowed(tree: ast.Module) -> list[int]:
    """Return the lines that catch everything and say nothing."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
        and all(isinstance(line, ast.Pass) for line in node.body)
    ]


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _modules() -> list[Path]:
    return sorted((ROOT / "gradflow").rglob("*.py"))


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_keeps_the_house_rules(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert long_functions(tree) == []
    assert undocumented(tree) == []
    assert swallowed(tree) == []


def test_no_file_holds_a_leftover() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    paths += list(ROOT.glob("*"))
    kept = [p for p in paths if p.is_file() and p.name != ".git" and "__pycache__" not in p.parts]
    texts = [p for p in kept if p.suffix in TEXT]
    assert len(texts) > 20
    assert {str(p): found for p in texts if (found := leftovers(p.read_text(encoding="utf-8")))} == {}


def test_values_are_frozen() -> None:
    holders = (
        gradflow.config,
        gradflow.findings,
        gradflow.rules.rule,
        gradflow.trace_model,
        gradflow.trunk_profile,
    )
    values = [v for holder in holders for v in vars(holder).values() if dataclasses.is_dataclass(v)]
    assert len(values) > 10
    assert [v for v in values if not v.__dataclass_params__.frozen or not hasattr(v, "__slots__")] == []


def test_each_rule_can_be_broken() -> None:
    source = (
        "def long():\n" + "    x = 1\n" * LONGEST_FUNCTION + "try:\n    long()\nexcept Exception:\n    pass\n"
    )
    tree = ast.parse(source)
    assert long_functions(tree) == [f"long: {LONGEST_FUNCTION + 1} lines"]
    assert undocumented(tree) == ["long"]
    assert swallowed(tree) == [LONGEST_FUNCTION + 4]
    assert leftovers(f"# {LEFTOVERS[0]}: see {LEFTOVERS[2]}main") == [LEFTOVERS[0], LEFTOVERS[2]]
