"""The sample models show what their docstrings promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gradflow
from gradflow.findings import Finding, Severity

FOLDER = Path(__file__).parent.parent / "sample_models"
FAULTY = {
    "deep_sigmoid_mlp": ("GF101", Severity.ERROR, "layers"),
    "exploding_init": ("GF102", Severity.ERROR, ""),
    "plain56": ("GF102", Severity.WARNING, ""),
    "cut_graph": ("GF103", Severity.ERROR, "encoder"),
    "unused_head": ("GF103", Severity.WARNING, "auxiliary"),
    "nan_producer": ("GF303", Severity.ERROR, "frontend"),
}
HEALTHY = ("residual_sigmoid_mlp", "resnet56", "small_gpt")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sample_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def root_causes(name: str) -> list[Finding]:
    torch.manual_seed(0)
    file = load(name)
    model = file.model if hasattr(file, "model") else file.build_model()
    report = gradflow.inspect(model, tuple(file.get_inputs()), getattr(file, "loss", None))
    return [f for f in report.findings if f.consequence_of is None and f.severity is not Severity.INFO]


def test_every_file_is_listed() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")}
    assert files == set(FAULTY) | set(HEALTHY)
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in files if f"`{name}.py`" not in readme] == []


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_sample(name: str) -> None:
    rule, severity, region = FAULTY[name]
    findings = root_causes(name)
    assert [(f.rule, f.severity) for f in findings] == [(rule, severity)]
    assert findings[0].location.first.startswith(region)
    docstring = load(name).__doc__ or ""
    assert f"Expect {rule}" in docstring


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_sample(name: str) -> None:
    assert root_causes(name) == []
    assert "Expect no warning and no error" in (load(name).__doc__ or "")


def test_the_nan_is_blamed_on_the_logarithm() -> None:
    (finding,) = root_causes("nan_producer")
    assert str(finding.location) == "frontend"
    assert "log" in finding.message


def test_the_exploding_plain_net_names_its_batch_norm() -> None:
    (finding,) = root_causes("plain56")
    assert "batch norm" in f"{finding.message} {finding.why} {finding.hint}".lower()
