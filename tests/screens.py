"""Reports with a known look: one a situation the screen must get right. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gradflow.findings import Finding, Location, Severity
from gradflow.report import Report
from gradflow.trace_model import Coverage, LayerRecord, ResidualRecord, TensorStatistics, Trace, Trunk
from gradflow.trunk_profile import profile
from tests.traces import make_layer, make_origin, make_parameter, make_residual, make_trace, make_trunk

NOTHING_MEASURED = dict.fromkeys(
    (
        "skip_norm",
        "branch_norm",
        "rho",
        "cosine",
        "block_influence",
        "gradient_norm",
        "source_gradient_norm",
        "gradient_ratio",
    )
)
COMMAND = "gradflow inspect model.py"


def make_report(trace: Trace, *findings: Finding) -> Report:
    return Report(trace=trace, findings=findings, profile=profile(trace.trunk))


def make_finding(rule: str = "GF101", **changes: Any) -> Finding:
    values: dict[str, Any] = {
        "rule": rule,
        "slug": "vanishing-gradient",
        "severity": Severity.ERROR,
        "location": Location(first="layers.0", last="layers.18"),
        "message": "Of the gradient at layers.18, 4.1e-09 is left at layers.0 (error below 1e-05)",
        "why": "The layers near the input learn from what is left, far slower than the layers near the loss",
        "hint": "Replace the sigmoids by ReLU with He initialisation, or add residual connections",
        "value": 4.13e-9,
        "threshold": 1e-5,
    }
    return Finding(**(values | changes))


def healthy() -> Report:
    """A small GPT: a residual trunk of twelve blocks, all folded into one."""
    layers = [_layer("wte", "Embedding", (4, 128, 768), 1.9), _layer("drop", "Dropout", (4, 128, 768), 1.9)]
    gradients = [1.0 + 0.07 * block for block in range(25)][::-1]
    for block in range(12):
        gain = gradients[2 * block + 1]
        layers += [
            _layer(f"h.{block}.ln_1", "LayerNorm", (4, 128, 768), gain * 0.9),
            _layer(f"h.{block}.attn.c_attn", "Conv1D", (4, 128, 2304), gain * 0.31),
            _layer(f"h.{block}.attn.c_proj", "Conv1D", (4, 128, 768), gain * 0.8),
            _layer(f"h.{block}.mlp.c_fc", "Conv1D", (4, 128, 3072), gain * 0.4),
            _layer(f"h.{block}.mlp.act", "NewGELUActivation", (4, 128, 3072), gain * 0.4),
            _layer(f"h.{block}.mlp.c_proj", "Conv1D", (4, 128, 768), gain),
            _layer(f"h.{block}", "Block", (4, 128, 768), gain),
        ]
    layers += [_layer("ln_f", "LayerNorm", (4, 128, 768), 1.0), _layer("", "SmallGPT", (4, 128, 50257), 0.2)]
    layers = _numbered(layers)
    trunk = make_trunk(
        gradients, names=[f"h.{min(k // 2, 11)}" for k in range(25)], op="add", kind="residual"
    )
    trace = make_trace(
        layers=layers,
        parameters=[make_parameter("wte.weight", aliases=("lm_head.weight",), in_optimizer=True)],
        residuals=[_residual(k) for k in range(24)],
        trunk=trunk,
        model="SmallGPT",
        inputs=("ids 4×128 int64",),
        inputs_from="example_inputs",
        loss="the output's own .loss",
        loss_values=(10.82,),
        optimizer="AdamW",
    )
    return make_report(trace)


def vanishing() -> Report:
    """Ten sigmoid layers: an error over the whole trunk, and a consequence of it."""
    gradients = [0.6 * 0.117**k for k in range(10)][::-1]
    layers: list[LayerRecord] = []
    for k, gradient in enumerate(gradients):
        layers.append(_layer(f"layers.{2 * k}", "Linear", (64, 256), gradient))
        if k < 9:
            layers.append(_layer(f"layers.{2 * k + 1}", "Sigmoid", (64, 256), gradient * 4, rms=0.52))
    layers.append(_layer("", "Sequential", (64, 10), 0.6))
    trunk = make_trunk(gradients, names=[f"layers.{2 * k}" for k in range(10)], signals=_fading(10))
    trunk = replace(trunk, points=tuple(replace(point, layer=2 * k) for k, point in enumerate(trunk.points)))
    trace = make_trace(layers=_numbered(layers), trunk=trunk, model="Sequential")
    collapse = make_finding(
        "GF304",
        slug="collapsed-representation",
        severity=Severity.INFO,
        location=Location(first="layers.6", last="layers.18"),
        message="Samples are told apart by 0.0001 of the signal at the end (info above 0.95 in common)",
        why="",
        hint="",
        value=0.9996,
        threshold=0.95,
        consequence_of="GF101 layers.0–layers.18",
    )
    return make_report(trace, collapse, make_finding())


def non_finite() -> Report:
    """A log of zero: NaN forward from the fourth layer on, everything before it without a gradient."""
    nan = math.nan
    rows = [_layer("enc.0", "Linear", (8, 32), nan), _layer("enc.1", "ReLU", (8, 32), nan, zeros=0.48)]
    rows += [
        _layer("enc.2", "Log", (8, 32), nan, rms=nan),
        _layer("head", "Linear", (8, 4), math.inf, rms=nan),
    ]
    rows += [
        _layer("aux", "Linear", (), None, coverage=Coverage.NEVER_CALLED, dtype="", activation=None),
        _layer("tokenize", "Tokenize", (), None, coverage=Coverage.NON_TENSOR, dtype="", activation=None),
    ]
    trunk = make_trunk([nan, 0.0, None, math.inf], names=["enc.0", "enc.1", "enc.2", "head"])
    origin = make_origin("forward", "enc.2", value="nan and inf", count=17)
    trace = make_trace(layers=_numbered(rows), trunk=trunk, origins=[origin], notes=("autocast: float16",))
    error = make_finding(
        "GF303",
        slug="non-finite-activation",
        location=Location(first="enc.2"),
        message="enc.2 (log, model.py:31) makes 17 NaN and Inf from finite inputs (error above 0)",
        why="Every layer after it, and every gradient, is lost",
        hint="Clamp the input of the log: torch.log(x.clamp_min(1e-8))",
        value=17.0,
        threshold=0.0,
    )
    unused = make_finding(
        "GF103",
        slug="no-gradient",
        severity=Severity.WARNING,
        location=Location(first="aux"),
        message="aux was never called",
        why="Its parameters never learn",
        hint="Remove it, or use it in forward",
        value=None,
        threshold=None,
    )
    return make_report(trace, error, unused)


def awkward_names() -> Report:
    """Long names, wide characters, control characters and markup: all shown, none obeyed."""
    long = "transformer.encoder.layers.{}.self_attention.query_key_value_projection_with_rotary_embedding"
    names = [long.format(k) for k in (0, 1)] + ["編碼器.第一層", "слой.é", "[red]bold[/red]", "a\nb\x1b[31m"]
    gradients = [0.02, 0.1, 0.5, 0.7, 0.9, 1.0]
    layers = [
        _layer(name, "NonDynamicallyQuantizableLinear", (2, 1024, 16384), gradient)
        for name, gradient in zip(names, gradients, strict=True)
    ]
    trace = make_trace(
        layers=_numbered(layers),
        trunk=make_trunk(gradients, names=names),
        target="a very long folder name/" * 6 + "model.py:build",
        inputs=("pixel_values 8×3×224×224 float32", "attention_mask 8×1024 int64", "labels 8 int64"),
        notes=("torch.compile: run eager", "one fixed batch: only the seed varies between the steps " * 3),
    )
    finding = make_finding(
        severity=Severity.WARNING,
        location=Location(first=names[0], last=names[1]),
        message=f"Of the gradient at {names[1]}, 0.2 is left at {names[0]} (warning below 0.3)",
        value=0.2,
        threshold=0.3,
    )
    return make_report(trace, finding)


def three_rows() -> Report:
    """A linear classifier: three rows and a trunk of two tensors."""
    layers = [_layer("fc1", "Linear", (8, 16), 0.4), _layer("fc2", "Linear", (8, 4), 0.9)]
    layers.append(_layer("", "Net", (8, 4), 0.9))
    return make_report(
        make_trace(layers=_numbered(layers), trunk=make_trunk([0.4, 0.9], names=["fc1", "fc2"]))
    )


def many_rows() -> Report:
    """A plain net of two hundred layers that explodes, with one dead unit finding inside."""
    gradients = [1.07**k for k in range(200)][::-1]
    layers: list[LayerRecord] = []
    for k, gradient in enumerate(gradients):
        layers.append(_layer(f"net.{2 * k}", "Linear", (64, 64), gradient))
        layers.append(_layer(f"net.{2 * k + 1}", "Tanh", (64, 64), gradient, zeros=0.002))
    trunk = make_trunk(gradients, names=[f"net.{2 * k}" for k in range(200)])
    trunk = replace(trunk, points=tuple(replace(p, layer=2 * k) for k, p in enumerate(trunk.points)))
    exploding = make_finding(
        "GF102",
        slug="exploding-gradient",
        location=Location(first="net.0", last="net.398"),
        message="The gradient at net.0 is 7.04e+05 times the one at net.398 (error above 1e+05)",
        why="A step that suits one end of the net is far too large for the other",
        hint="Scale the weights down, or add a normalisation",
        value=7.04e5,
        threshold=1e5,
    )
    dead = make_finding(
        "GF301",
        slug="dead-units",
        severity=Severity.WARNING,
        location=Location(first="net.201"),
        message="62% of the units are never active (warning above 50%)",
        why="They learn nothing",
        hint="Lower the learning rate or the bias",
        value=0.62,
        threshold=0.5,
    )
    trace = make_trace(
        layers=_numbered(layers), trunk=trunk, steps=5, loss_values=(2.31, 2.29, 2.3, 2.34, 2.3)
    )
    return make_report(trace, exploding, dead)


def empty_trunk() -> Report:
    """A model with nothing to measure along: one parameterless module."""
    layers = _numbered([_layer("", "Identity", (8, 4), 1.0)])
    trace = make_trace(layers=layers, trunk=Trunk(kind="none"), loss="probe", loss_values=())
    return make_report(trace)


def residual_sites() -> Report:
    """Every kind of site: a stage of each width, a block that does nothing, a gate at zero, a concat."""
    sites = [
        make_residual(f"stages.{stage}.{block}", kind="identity" if block else "projection")
        for stage in range(4)
        for block in range(6)
    ]
    sites[9] = replace(sites[9], rho=0.0004, block_influence=8e-8, branch_norm=0.004, branch_scale=0.0004)
    sites += [make_residual("neck", kind="concat", **NOTHING_MEASURED)]
    sites += [make_residual(f"decoder.layers.{k // 3}", index=k % 3) for k in range(6)]
    sites += [make_residual("rezero", rho=0.0, cosine=None, block_influence=0.0, branch_scale=0.0)]
    sites += [make_residual("broken", rho=math.nan, cosine=math.nan, block_influence=math.nan)]
    sites += [make_residual("", kind="scaled", rho=math.inf, cosine=None, skip_scale=0.0)]
    near = make_finding(
        "GF201",
        slug="near-identity-block",
        severity=Severity.WARNING,
        location=Location(first="stages.1.3"),
        message="The branch adds 0.0004 of its skip (warning below 0.05 of the median of its like)",
        why="The block does nothing",
        hint="Remove it",
        value=0.0004,
        threshold=0.05,
    )
    layers = [_layer(site.name, "Block", (8, 64), 1.0) for site in sites[:24]]
    residuals = [replace(site, order=order) for order, site in enumerate(sites)]
    return make_report(make_trace(layers=_numbered(layers), residuals=residuals), near)


SCREENS = {
    "healthy": healthy,
    "residual_sites": residual_sites,
    "vanishing": vanishing,
    "non_finite": non_finite,
    "awkward_names": awkward_names,
    "three_rows": three_rows,
    "many_rows": many_rows,
    "empty_trunk": empty_trunk,
}


def _layer(
    name: str,
    kind: str,
    shape: tuple[int, ...],
    gradient: float | None,
    *,
    rms: float = 1.02,
    zeros: float = 0.0,
    **changes: Any,
) -> LayerRecord:
    statistics = TensorStatistics(
        mean=0.01, std=rms, rms=rms, absmax=4 * rms, zero_fraction=zeros, nonfinite=0
    )
    values: dict[str, Any] = {
        "type": kind,
        "shape": shape,
        "gradient_norm": gradient,
        "activation": statistics,
    }
    return make_layer(name, **(values | changes))


def _residual(k: int) -> ResidualRecord:
    rho = 0.9 / math.sqrt(k + 1)
    return make_residual(
        f"h.{k // 2}",
        k,
        index=k % 2,
        source=f"gpt.py:{31 + k % 2}",
        shape=(4, 128, 768),
        rho=rho,
        cosine=0.01 * (k - 12),
        block_influence=1 - 1 / math.sqrt(1 + rho**2),
        gradient_ratio=1.0 + 0.07 / (1 + k),
        branch_ops=("layer_norm", "linear", "gelu", "linear") if k % 2 else ("layer_norm", "linear"),
    )


def _numbered(layers: Sequence[LayerRecord]) -> list[LayerRecord]:
    return [replace(layer, order=order) for order, layer in enumerate(layers)]


def _fading(count: int) -> list[float]:
    return [0.5 * 0.24**k for k in range(count)]
