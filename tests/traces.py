"""Tiny traces for tests: no torch, one line a layer, everything else at a plain default."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradflow.trace_model import (
    ActivationRecord,
    Coverage,
    LayerRecord,
    NonFiniteOrigin,
    ParameterRecord,
    ResidualRecord,
    RunInfo,
    TensorStatistics,
    Trace,
    Trunk,
    TrunkPoint,
)

BATCH = 8


def make_run(**changes: Any) -> RunInfo:
    values: dict[str, Any] = {
        "target": "model.py",
        "model": "Net",
        "parameters": 1000,
        "trainable": 1000,
        "buffers": 0,
        "inputs": ("x 8×16 float32",),
        "inputs_from": "--input",
        "loss": "cross-entropy (random targets)",
        "loss_values": (2.3,),
        "optimizer": None,
        "device": "cpu",
        "dtype": "float32",
        "mode": "train",
        "seed": 0,
        "steps": 1,
        "batch_size": BATCH,
        "trained": False,
        "gradflow_version": "0.0.0",
        "torch_version": "2.13.0",
    }
    return RunInfo(**(values | changes))


def make_layer(name: str, order: int = 0, **changes: Any) -> LayerRecord:
    values: dict[str, Any] = {
        "order": order,
        "name": name,
        "call": 0,
        "output": "",
        "type": "Linear",
        "shape": (BATCH, 16),
        "dtype": "float32",
        "coverage": Coverage.MEASURED,
        "activation": TensorStatistics(
            mean=0.0,
            std=1.0,
            rms=1.0,
            absmax=3.0,
            zero_fraction=0.0,
            nonfinite=0,
            signal=1.0,
            common_mode=0.1,
        ),
        "gradient_norm": 1.0,
        "gradient_nonfinite": 0,
    }
    return LayerRecord(**(values | changes))


def make_layers(*names: str) -> tuple[LayerRecord, ...]:
    """One healthy row a name, in execution order."""
    return tuple(make_layer(name, order) for order, name in enumerate(names))


def make_parameter(name: str, **changes: Any) -> ParameterRecord:
    """A healthy parameter; its module is the name without the last part."""
    values: dict[str, Any] = {
        "name": name,
        "aliases": (),
        "module": name.rpartition(".")[0],
        "shape": (16, 16),
        "dtype": "float32",
        "coverage": Coverage.MEASURED,
        "norm": 4.0,
        "gradient_norm": 0.1,
        "gradient_nonfinite": 0,
        "elasticity": 0.4,
        "gradient_ratio": 0.025,
        "value_nonfinite": 0,
        "module_type": "Linear",
    }
    return ParameterRecord(**(values | changes))


def make_residual(name: str, order: int = 0, **changes: Any) -> ResidualRecord:
    """A healthy identity site of a normed branch at right angles to its skip."""
    values: dict[str, Any] = {
        "index": 0,
        "call": 0,
        "kind": "identity",
        "source": "model.py:31",
        "shape": (BATCH, 16),
        "skip_norm": 10.0,
        "branch_norm": 5.0,
        "rho": 0.5,
        "cosine": 0.0,
        "block_influence": 1 - 1 / math.hypot(1, 0.5),
        "gradient_norm": 1.0,
        "source_gradient_norm": 1.1,
        "gradient_ratio": 1.1,
        "std": 1.12,
        "source_std": 1.0,
        "span": 2,
        "branch_ops": ("layer_norm", "linear", "relu", "linear"),
        "like": "Block #0 identity: layer_norm linear relu linear",
    }
    return ResidualRecord(order=order, name=name, **(values | changes))


def make_activation(name: str, order: int = 0, **changes: Any) -> ActivationRecord:
    """A healthy ReLU with 100 units that is a layer row of its own."""
    values: dict[str, Any] = {
        "op": "relu",
        "call": 0,
        "layer": order,
        "units": 100,
        "observations": 512,
        "inactive": 0.0,
        "always_active": 0.0,
    }
    return ActivationRecord(order=order, name=name, **(values | changes))


def make_trunk(
    gradients: Sequence[float | None],
    *,
    names: Sequence[str] = (),
    signals: Sequence[float | None] = (),
    shapes: Sequence[tuple[int, ...]] = (),
    width: int = 0,
    op: str = "linear",
    kind: str = "weights",
    batch_norm: bool = False,
) -> Trunk:
    """A trunk from its gradient norms, first tensor to last; ``layers.0``, ``layers.1`` ... unless named."""
    points = tuple(
        TrunkPoint(
            name=names[k] if names else f"layers.{k}",
            op=op,
            layer=k,
            shape=shapes[k] if shapes else (BATCH, 16),
            width=width,
            gradient_norm=gradient,
            gradient_nonfinite=None if gradient is None else int(not math.isfinite(gradient)),
            activation=TensorStatistics(rms=1.0, signal=signals[k] if signals else 1.0),
        )
        for k, gradient in enumerate(gradients)
    )
    return Trunk(kind=kind, points=points, batch_norm=batch_norm)


def make_origin(phase: str, name: str, **changes: Any) -> NonFiniteOrigin:
    values: dict[str, Any] = {"op": "log", "source": "model.py:31", "value": "nan", "count": 3}
    return NonFiniteOrigin(phase=phase, name=name, **(values | changes))


def make_trace(
    *,
    layers: Sequence[LayerRecord] = (),
    parameters: Sequence[ParameterRecord] = (),
    trunk: Trunk | None = None,
    residuals: Sequence[ResidualRecord] = (),
    origins: Sequence[NonFiniteOrigin] = (),
    activations: Sequence[ActivationRecord] = (),
    **run: Any,
) -> Trace:
    """A trace of the given parts; further keywords change its ``RunInfo``. Healthy where nothing is said.

    Without ``layers`` there is one healthy row for each distinct name of the trunk.
    """
    trunk = trunk if trunk is not None else make_trunk([1.0, 1.0, 1.0, 1.0])
    if not layers:
        layers = make_layers(*dict.fromkeys(point.name for point in trunk.points))
    return Trace(
        run=make_run(**run),
        layers=tuple(layers),
        parameters=tuple(parameters),
        trunk=trunk,
        residuals=tuple(residuals),
        origins=tuple(origins),
        activations=tuple(activations),
    )
