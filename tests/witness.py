"""The slow road to the same numbers: plain autograd in float64, without hooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import gradflow


def real(tensor: Tensor) -> Tensor:
    """Dense, detached, float64; a complex number counts as its two parts."""
    plain = tensor.detach()
    plain = plain.to_dense() if plain.layout is not torch.strided else plain
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    return plain.double()


def per_sample_norm(gradient: Tensor, batch: int) -> float:
    """g of theory, section 0: the root mean square over samples of the L2 norm over everything else."""
    return math.sqrt(real(gradient).square().sum().item() / batch)


def norm(tensor: Tensor) -> float:
    return real(tensor).square().sum().sqrt().item()


def statistics(values: Tensor) -> dict[str, float]:
    """The activation columns of a tensor whose first dimension counts samples, by their definitions."""
    x = real(values).flatten(1)
    mean = x.mean(0)
    return {
        "activation_mean": x.mean().item(),
        "activation_std": x.var(correction=0).sqrt().item(),
        "activation_rms": x.square().mean().sqrt().item(),
        "activation_absmax": x.abs().max().item(),
        "activation_zero_fraction": (x == 0).double().mean().item(),
        "activation_nonfinite": float((~torch.isfinite(x)).sum().item()),
        "signal": x.var(0, correction=0).mean().sqrt().item(),
        "common_mode": (mean.square().sum() / x.square().sum(1).mean()).item(),
    }


def layer_row(report: gradflow.Report, key: str) -> pd.Series[Any]:
    """The row of "name", "name#call", "name:output" or "name#call:output"; there must be exactly one."""
    place, _, output = key.partition(":")
    name, _, call = place.partition("#")
    layers = report.layers
    rows = layers[(layers.name == name) & (layers.call == int(call or 0)) & (layers.output == output)]
    assert len(rows) == 1, (
        f"{len(rows)} rows for {key!r} among\n{layers[['name', 'call', 'output', 'coverage']]}"
    )
    return rows.iloc[0]


def parameter_row(report: gradflow.Report, name: str) -> pd.Series[Any]:
    rows = report.parameters[report.parameters.name == name]
    assert len(rows) == 1, f"{len(rows)} rows for {name!r} among {list(report.parameters.name)}"
    return rows.iloc[0]


def missing(value: Any) -> bool:
    """True where a number was not measured."""
    return value is None or bool(pd.isna(value))


def close(measured: Any, expected: float, tolerance: float) -> bool:
    return not missing(measured) and math.isclose(measured, expected, rel_tol=tolerance, abs_tol=1e-12)


def check_gradients(
    report: gradflow.Report, loss: Tensor, tensors: Mapping[str, Tensor], *, batch: int, tolerance: float
) -> None:
    """Compare the gradient of every named output with ``torch.autograd.grad``."""
    gradients = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    for (key, _), gradient in zip(tensors.items(), gradients, strict=True):
        measured, expected = layer_row(report, key).gradient_norm, per_sample_norm(gradient, batch)
        assert close(measured, expected, tolerance), f"{key}: {measured} against {expected}"


def check_parameters(
    report: gradflow.Report, loss: Tensor, parameters: Mapping[str, Tensor], *, tolerance: float
) -> None:
    """Compare every parameter's gradient, and its absence, with ``torch.autograd.grad``."""
    asked = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(asked.values()), allow_unused=True, retain_graph=True)
    expected = dict(zip(asked, gradients, strict=True))
    assert set(report.parameters.name) == set(parameters)
    for name, tensor in parameters.items():
        row, gradient = parameter_row(report, name), expected.get(name)
        assert close(row["norm"], norm(tensor), tolerance), f"norm of {name}"
        if gradient is None:
            assert missing(row.gradient_norm), f"{name} has no gradient, and {row.gradient_norm} was reported"
        else:
            assert close(row.gradient_norm, norm(gradient), tolerance), (
                f"{name}: {row.gradient_norm} against {norm(gradient)}"
            )
