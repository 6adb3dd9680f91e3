"""torch stays in its folder, and what is to start fast loads nothing that imports it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import SourceModule, reached_at_import, read_package, within
from traces import make_trace

from gradflow.trace_file import save

PACKAGE = Path(__file__).resolve().parents[1] / "gradflow"
FOUNDATIONS = ("errors", "trace_model", "findings")
TORCH_FREE = ("rules", "reporters")
INTEGRATIONS = ("torchvision", "timm", "transformers", "lightning", "pytorch_lightning", "torchmetrics")
NEEDS_TORCH = ("torch", *INTEGRATIONS)
SLOW_TO_LOAD = (*NEEDS_TORCH, "pandas", "numpy")


def breaches(modules: dict[str, SourceModule], package: str) -> list[str]:
    """Return a sentence for each import that goes against the layers of docs/design.md."""
    recording = f"{package}.recording"
    found = []
    for name, module in modules.items():
        layer = name.removeprefix(f"{package}.").split(".")[0]
        if layer in FOUNDATIONS:
            found += [f"{name} imports {n}" for n in module.anywhere if within(n, package) and n != package]
        if layer in TORCH_FREE:
            banned = (*NEEDS_TORCH, recording)
            found += [f"{name} imports {n}" for n in module.anywhere if any(within(n, b) for b in banned)]
        if not within(name, recording):
            reached = reached_at_import(modules, name)
            found += [f"{name} reaches {n}" for n in reached if any(within(n, b) for b in NEEDS_TORCH)]
        elif any(within(n, b) for n in module.at_import for b in INTEGRATIONS):
            found.append(f"{name} imports an integration before it is asked for")
    return sorted(found)


def loaded_by(*arguments: str) -> set[str]:
    """Run Python with ``arguments`` for real and return the full names of the modules it imported."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def test_the_layers_hold() -> None:
    modules = read_package(PACKAGE)
    assert "gradflow.recording.target" in modules, "the walker did not find the package"
    assert breaches(modules, "gradflow") == []


@pytest.mark.parametrize(
    ("file", "source", "breach"),
    [
        ("errors.py", "def f():\n    from fake.config import Config", "fake.errors imports fake.config"),
        ("findings.py", "from . import config", "fake.findings imports fake.config"),
        ("rules/gain.py", "def check():\n    import torch", "fake.rules.gain imports torch"),
        ("rules/gain.py", "from torch import nn", "fake.rules.gain imports torch"),
        ("rules/gain.py", "from fake.config import helper", "fake.rules.gain reaches torch"),
        (
            "reporters/out.py",
            "from ..recording import hooks",
            "fake.reporters.out imports fake.recording",
        ),
        ("cli.py", "try:\n    import torch.nn\nexcept ImportError:\n    pass", "fake.cli reaches torch"),
        ("cli.py", "class Lazy:\n    import transformers", "fake.cli reaches transformers"),
        ("__init__.py", "from fake.recording import hooks", "fake reaches torch"),
        ("recording/hooks.py", "import lightning", "fake.recording.hooks imports an integration"),
    ],
)
def test_a_breach_is_seen(tmp_path: Path, file: str, source: str, breach: str) -> None:
    root = _package(tmp_path, {file: source, "config.py": "from fake.recording import hooks"})
    assert any(found.startswith(breach) for found in breaches(read_package(root), "fake"))


def test_what_is_allowed_is_no_breach(tmp_path: Path) -> None:
    files = {
        "config.py": "from fake.errors import Error",
        "rules/gain.py": "from fake.config import Config\nimport math",
        "recording/hooks.py": "import torch\n\ndef f():\n    import transformers",
        "cli.py": "def run():\n    from fake.recording import hooks",
        "report.py": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import torch",
    }
    assert breaches(read_package(_package(tmp_path, files)), "fake") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import gradflow"),
        ("-m", "gradflow", "--help"),
        ("-m", "gradflow", "rules"),
        ("-m", "gradflow", "explain", "GF101"),
    ],
    ids=" ".join,
)
def test_a_quick_command_loads_nothing_slow(arguments: tuple[str, ...]) -> None:
    loaded = loaded_by(*arguments)
    assert "gradflow" in loaded
    assert loaded.isdisjoint(SLOW_TO_LOAD)


@pytest.mark.parametrize("form", ["table", "json", "csv", "markdown", "sarif", "junit", "github", "gitlab"])
def test_a_saved_trace_is_reported_without_torch(tmp_path: Path, form: str) -> None:
    saved = tmp_path / "trace.json"
    save(make_trace(), saved)
    loaded = loaded_by("-m", "gradflow", "report", str(saved), "--format", form)
    assert "gradflow.analyzer" in loaded
    assert loaded.isdisjoint(SLOW_TO_LOAD)


def test_loading_torch_is_seen() -> None:
    assert {"torch", "gradflow.recording"} <= loaded_by("-c", "import gradflow.recording.target")


def test_no_module_shadows_the_standard_library() -> None:
    assert _shadowing(PACKAGE) == []


def test_a_shadowing_module_is_seen(tmp_path: Path) -> None:
    assert _shadowing(_package(tmp_path, {"reporters/json.py": "", "csv/__init__.py": ""})) == ["csv", "json"]


def _shadowing(root: Path) -> list[str]:
    names = {name.rpartition(".")[2] for name in read_package(root)} - {root.name, "__main__"}
    return sorted(names & sys.stdlib_module_names)


def _package(folder: Path, files: dict[str, str]) -> Path:
    root = folder / "fake"
    defaults = {
        "__init__.py": "",
        "errors.py": "",
        "rules/__init__.py": "",
        "reporters/__init__.py": "",
        "recording/__init__.py": "",
        "recording/hooks.py": "import torch",
    }
    for name, source in {**defaults, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root
