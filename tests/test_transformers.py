"""Models that nobody here wrote: thirty-three ``transformers`` classes and fifteen unusual ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers_zoo
import unusual_models
from fingerprint import differences, fingerprint
from torch import nn
from transformers.utils import logging as transformers_logging
from witness import close, norm

import gradflow
from gradflow.trace_model import Coverage

transformers_logging.set_verbosity_error()
COVERAGES = {str(value) for value in Coverage}


def elements(shape: str) -> int:
    """The number of elements of a "8x3x32" cell."""
    return 1 if shape == "scalar" else math.prod(int(size) for size in shape.split("x"))


def check_report(report: gradflow.Report, model: nn.Module) -> None:
    """What holds for every healthy model, however odd."""
    layers, parameters = report.layers, report.parameters
    assert not layers.empty
    assert set(layers.coverage) <= COVERAGES
    assert set(parameters.coverage) <= COVERAGES
    assert (layers.coverage == "measured").any()
    measured = parameters[parameters.coverage == "measured"]
    assert measured.gradient_norm.map(math.isfinite).all()
    assert (measured.gradient_nonfinite == 0).all()
    assert (layers.gradient_nonfinite.fillna(0) == 0).all()
    counted = sum(tensor.numel() for tensor in model.parameters())
    assert report.trace.run.parameters == counted
    assert parameters["shape"].map(elements).sum() == counted
    errors = [f"{f.rule} {f.location}: {f.message}" for f in report.findings if f.severity == "error"]
    assert errors == []


@pytest.mark.parametrize("name", transformers_zoo.MODELS)
def test_transformers_class(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = transformers_zoo.MODELS[name]()
    before = fingerprint(model)
    report = gradflow.inspect(model, inputs)
    check_report(report, model)
    assert differences(before, fingerprint(model)) == []
    assert ("loss" in report.trace.run.loss) == ("labels" in inputs), report.trace.run.loss


@pytest.mark.parametrize("name", transformers_zoo.MODELS)
def test_transformers_gradients_are_those_of_plain_autograd(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = transformers_zoo.MODELS[name]()
    model.eval()

    def loss(outputs: Any, _inputs: Any) -> torch.Tensor:
        return outputs.loss if "labels" in inputs else first_tensor(outputs).square().mean()

    report = gradflow.inspect(model, inputs, loss)
    loss(model(**inputs), inputs).backward()
    rows = report.parameters.set_index("name")
    for name, parameter in model.named_parameters():
        measured = rows.loc[name, "gradient_norm"]
        if parameter.grad is None:
            assert math.isnan(measured), name
        else:
            assert close(measured, norm(parameter.grad), 1e-3), name


def first_tensor(outputs: Any) -> torch.Tensor:
    return next(value for value in outputs.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("name", unusual_models.MODELS)
def test_unusual_model(name: str) -> None:
    torch.manual_seed(0)
    model, inputs, loss = unusual_models.MODELS[name]()
    before = fingerprint(model)
    report = gradflow.inspect(model, inputs, loss)
    check_report(report, model)
    assert differences(before, fingerprint(model)) == []


def test_experts_that_were_not_drawn_are_told_apart_from_unused_ones() -> None:
    torch.manual_seed(0)
    model, inputs, loss = unusual_models.experts()
    drawn = {f"experts.{index}" for index in model.router(*inputs).argmax(1).tolist()}
    report = gradflow.inspect(model, inputs, loss)
    rows = report.layers[report.layers.name.str.startswith("experts.")].set_index("name").coverage
    assert {name for name in rows.index if rows[name] == "measured"} == drawn
    assert {rows[name] for name in rows.index if name not in drawn} == {"never called"}


def test_a_cell_called_for_every_token_has_a_row_for_each() -> None:
    torch.manual_seed(0)
    model, inputs, loss = unusual_models.seq2seq()
    report = gradflow.inspect(model, inputs, loss)
    cells = report.layers[(report.layers.name == "decoder") & (report.layers.output == "0")]
    assert list(cells.call) == list(range(10))
    assert (cells.coverage == "measured").all()
