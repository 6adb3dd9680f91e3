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
    "missing_add": ("GF103", Severity.WARNING, "stage3.downsample"),
    "near_identity_blocks": ("GF201", Severity.WARNING, "blocks.7"),
    "overwritten_skip": ("GF203", Severity.WARNING, "blocks.0"),
    "dead_relu": ("GF301", Severity.ERROR, "act2"),
    "nan_producer": ("GF303", Severity.ERROR, "frontend"),
    "saturated_attention": ("GF305", Severity.ERROR, "blocks.2.attention"),
    "lost_updates": ("GF402", Severity.ERROR, "embedding"),
    "small_batch_norm": ("GF403", Severity.ERROR, "norm1"),
}
HEALTHY = (
    "residual_sigmoid_mlp",
    "resnet56",
    "zero_gamma_resnet",
    "prenorm_transformer",
    "postnorm_transformer",
    "small_gpt",
)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sample_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inspected(name: str) -> gradflow.Report:
    torch.manual_seed(0)
    file = load(name)
    model = file.model if hasattr(file, "model") else file.build_model()
    optimizer = file.make_optimizer(model) if hasattr(file, "make_optimizer") else None
    return gradflow.inspect(model, tuple(file.get_inputs()), getattr(file, "loss", None), optimizer=optimizer)


def root_causes(name: str) -> list[Finding]:
    findings = inspected(name).findings
    return [f for f in findings if f.consequence_of is None and f.severity is not Severity.INFO]


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


def test_the_overwritten_skips_name_their_line() -> None:
    (finding,) = root_causes("overwritten_skip")
    line = next(
        number
        for number, text in enumerate((FOLDER / "overwritten_skip.py").read_text().splitlines(), start=1)
        if "out = self.body(x)" in text
    )
    assert str(finding.location) == "blocks.0–blocks.5"
    assert f"overwritten_skip.py:{line}" in finding.message


def test_the_zero_branches_open_by_their_last_norm() -> None:
    report = inspected("zero_gamma_resnet")
    found = [f for f in report.findings if f.rule == "GF204"]
    assert [(f.severity, str(f.location)) for f in found] == [(Severity.INFO, "blocks.0–blocks.8")]
    assert "not reported: zero-initialised gate, opens by norm2.weight" in found[0].message
