"""One recorded step -> frozen records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.jit import ScriptModule

from gradflow.recording.cuts import CutFinder
from gradflow.recording.dataflow import Node
from gradflow.recording.drafts import drafting
from gradflow.recording.overwrite_proof import AccusedSite, accused_sites
from gradflow.recording.parameters import parameter_records
from gradflow.recording.recorder import Recorder, Row
from gradflow.recording.residual_records import residual_records
from gradflow.recording.side_trunks import find_side_trunks
from gradflow.recording.signatures import forward_signature
from gradflow.recording.tensor_stats import dtype_name
from gradflow.recording.token_stats import TokenStatistics
from gradflow.recording.trunk import TrunkPath, find_trunk, longest_path
from gradflow.recording.weight_ops import CONV_OPS
from gradflow.trace_model import (
    ActivationRecord,
    AttentionRecord,
    BatchNormRecord,
    Coverage,
    LayerRecord,
    ParameterRecord,
    ResidualRecord,
    TensorStatistics,
    Trunk,
    TrunkPoint,
)

ACTIVATION_MODULES = nn.ReLU.__module__
"""Where the modules live whose forward is one nonlinearity and nothing else."""
NORMS_BEHIND = 3
"""The last of so many tensors of the trunk is one that carries the stream."""
_LAYER, _POINT = drafting(LayerRecord), drafting(TrunkPoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step left behind."""

    layers: tuple[LayerRecord, ...]
    parameters: tuple[ParameterRecord, ...]
    trunk: Trunk
    residuals: tuple[ResidualRecord, ...]
    loss: float | None
    """None for a probe."""
    activations: tuple[ActivationRecord, ...] = ()
    batch_norms: tuple[BatchNormRecord, ...] = ()
    accused: tuple[AccusedSite, ...] = ()
    """Sites of ``residuals`` whose skip was overwritten, it seems by mistake."""
    attentions: tuple[AttentionRecord, ...] = ()
    side_trunks: tuple[Trunk, ...] = ()
    notes: tuple[str, ...] = ()
    """What was seen and not measured."""

    @property
    def has_nonfinite(self) -> bool:
        """A NaN or Inf was seen in an activation, a gradient, a parameter or the loss."""
        counts = [
            *(row.activation.nonfinite for row in self.layers if row.activation is not None),
            *(point.activation.nonfinite for point in self.trunk.points if point.activation is not None),
            *(row.gradient_nonfinite for row in self.layers),
            *(row.gradient_nonfinite for row in self.parameters),
            *(row.value_nonfinite for row in self.parameters),
        ]
        return any(counts) or (self.loss is not None and not math.isfinite(self.loss))


def step_record(
    recorder: Recorder, *, end: Node | None, loss: float | None, optimized: frozenset[int] | None
) -> StepRecord:
    """Freeze a step; call it after backward, while the gradients are still on the parameters.

    Args:
        recorder: Of the step.
        end: The node of the loss.
        loss: Its value, None for a probe.
        optimized: ``id`` of each parameter of the optimizer; None where no optimizer is known.
    """
    statistics = recorder.collect()
    nodes = recorder.dataflow.nodes
    cuts = CutFinder(nodes, None if end is None else end.index)
    parameters = parameter_records(recorder.layout.parameters, cuts, recorder.called(), optimized)
    layers = _layers(recorder, statistics, parameters, cuts)
    trunk, *side_trunks = _trunks(recorder, statistics, None if end is None else end.index)
    return StepRecord(
        layers=layers,
        parameters=parameters,
        trunk=trunk,
        side_trunks=tuple(side_trunks),
        residuals=residual_records(recorder, statistics, parameters, end),
        accused=accused_sites(recorder.sites.in_order(), recorder.sites.graph),
        loss=loss,
        activations=_activations(recorder),
        batch_norms=recorder.batch_norms.records(recorder.layout),
        attentions=recorder.attentions.records(),
        notes=recorder.attentions.notes(),
    )


def _layers(
    recorder: Recorder,
    statistics: Sequence[TensorStatistics],
    parameters: Sequence[ParameterRecord],
    cuts: CutFinder,
) -> tuple[LayerRecord, ...]:
    seen = tuple(_layer(order, row, recorder, statistics) for order, row in enumerate(recorder.rows))
    bypassed = {p.module for p in parameters if p.gradient_norm is not None}
    missing = [
        LayerRecord(
            order=len(seen) + position,
            name=name,
            call=0,
            output="",
            type=type(module).__name__,
            shape=(),
            dtype="",
            coverage=_coverage_of_unseen(name, module, bypassed, cuts),
            note="TorchScript takes no hooks" if isinstance(module, ScriptModule) else "",
        )
        for position, (module, name) in enumerate(recorder.unseen_rows())
    ]
    return (*seen, *missing)


def _coverage_of_unseen(name: str, module: nn.Module, bypassed: set[str], cuts: CutFinder) -> Coverage:
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    used = name in bypassed or any(cuts.is_consumed(id(parameter)) for parameter in own)
    return Coverage.BYPASSED if (own and used) or isinstance(module, ScriptModule) else Coverage.NEVER_CALLED


def _layer(order: int, row: Row, recorder: Recorder, statistics: Sequence[TensorStatistics]) -> LayerRecord:
    gradient_norm = recorder.gradient_norm(row.probe)
    if gradient_norm is not None and row.requires_grad:
        coverage, note = Coverage.MEASURED, ""
    else:
        coverage, note = _coverage(row, recorder)
    return _LAYER(
        order=order,
        name=row.name,
        call=row.call,
        output=row.output,
        type=type(row.module).__name__,
        shape=tuple(row.shape),
        dtype="" if row.dtype is None else dtype_name(row.dtype),
        coverage=coverage,
        activation=None if row.probe is None else statistics[row.probe],
        gradient_norm=gradient_norm,
        gradient_nonfinite=recorder.gradient_nonfinite(row.probe),
        note=note,
    )


def _coverage(row: Row, recorder: Recorder) -> tuple[Coverage, str]:
    """Of a row that asked for no gradient, or got none."""
    if row.probe is None:
        return (
            Coverage.NON_TENSOR,
            "no floating tensor in the output" if row.dtype is not None else "no tensor in the output",
        )
    if recorder.gradient_norm(row.probe) is not None:
        return Coverage.MEASURED, "gradient from a checkpoint's recomputation"
    if row.requires_grad:
        return Coverage.NO_GRAD, "the loss does not depend on it"
    own = [parameter for parameter in row.module.parameters() if parameter is not None]
    if own:
        frozen = not any(parameter.requires_grad for parameter in own)
        return (Coverage.FROZEN, "") if frozen else (Coverage.NO_GRAD, "ran without a graph")
    if row.node is not None and row.node.from_parameter:
        asked = any(recorder.dataflow.nodes[i].requires_grad for i in row.node.inputs)
        return (
            (Coverage.NO_GRAD, "ran without a graph")
            if asked
            else (Coverage.FROZEN, "all before it is frozen")
        )
    return Coverage.NO_GRAD, "nothing before it has a parameter"


def _activations(recorder: Recorder) -> tuple[ActivationRecord, ...]:
    modules = recorder.layout.names.items()
    leaves = frozenset(name for module, name in modules if type(module).__module__ == ACTIVATION_MODULES)
    return recorder.activations.records(leaves, _rows_by_probe(recorder))


def _rows_by_probe(recorder: Recorder) -> dict[int | None, int]:
    """``order`` of the first row that is a probe's tensor."""
    return {row.probe: order for order, row in reversed(list(enumerate(recorder.rows)))}


def _trunks(recorder: Recorder, statistics: Sequence[TensorStatistics], end: int | None) -> tuple[Trunk, ...]:
    """The trunk, then those beside it."""
    nodes, sites = recorder.dataflow.nodes, recorder.sites.main()
    main = find_trunk(nodes, end, sites)
    by_probe = _rows_by_probe(recorder)
    tokens = recorder.tokens.results()
    trunks = [
        Trunk(
            kind=found.kind,
            points=tuple(_point(nodes[i], recorder, statistics, by_probe, tokens) for i in found.nodes),
            batch_norm=found.batch_norm,
            path=_path_name(found, recorder, end, main),
            token_geometry=_token_geometry(found, recorder) if found is main else None,
        )
        for found in (main, *find_side_trunks(nodes, end, sites, main))
    ]
    return tuple(_told_apart(trunk, trunks[:at]) for at, trunk in enumerate(trunks))


def _told_apart(trunk: Trunk, earlier: Sequence[Trunk]) -> Trunk:
    """A path from the same input to the same output as one before it is also named by where it begins."""
    begins = trunk.points[0].name if trunk.points else ""
    if not begins or all(trunk.path != other.path for other in earlier):
        return trunk
    return replace(trunk, path=f"{trunk.path} via {begins}")


def _token_geometry(trunk: TrunkPath, recorder: Recorder) -> float | None:
    """Of the last tensor that a sample was kept of: behind it come only norms, which move no token to another."""
    last = [recorder.dataflow.nodes[i] for i in trunk.nodes[-NORMS_BEHIND:]]
    # The last dimension of a convolution's output counts positions, not features.
    probes = [node.probe for node in reversed(last) if node.probe is not None and node.op not in CONV_OPS]
    return next((kept for p in probes if (kept := recorder.token_geometry.kept(p)) is not None), None)


def _path_name(found: TrunkPath, recorder: Recorder, end: int | None, main: TrunkPath) -> str:
    """ "input_ids → logits": the input that the first tensor comes from, the output that the path goes through."""
    if not found.nodes:
        return ""
    first = found.nodes[0]
    # The longest path to a tensor of the main path is that path's own beginning: no need to look for it again.
    known = found is main and first in main.path
    path = main.path if known else longest_path(recorder.dataflow.nodes, first)
    start = recorder.inputs.get(path[0])
    rows = [row for row in recorder.rows if row.name == "" and row.node is not None and row.shape]
    outputs = {row.node.index: row.output for row in rows if row.node is not None}
    passed = [outputs[i] for i in found.path if i in outputs and i != end and i > found.nodes[-1]]
    name = passed[-1] if passed and len(outputs) > 1 else ""
    return f"{'a parameter' if start is None else _input_name(start, recorder)} → {name or 'loss'}"


def _input_name(path: str, recorder: Recorder) -> str:
    """ "0.1" of ``(args, kwargs)`` is the second positional argument, "1.mask" the keyword one."""
    which, _, rest = path.partition(".")
    if which == "1":
        return rest
    position, _, inner = rest.partition(".")
    names = forward_signature(recorder.layout.module).positional
    known = position.isdigit() and int(position) < len(names)
    name = names[int(position)] if known else f"input {position}"
    return f"{name}.{inner}" if inner else name


def _point(
    node: Node,
    recorder: Recorder,
    statistics: Sequence[TensorStatistics],
    by_probe: dict[int | None, int],
    tokens: dict[int, TokenStatistics],
) -> TrunkPoint:
    layer = None if node.probe is None else by_probe.get(node.probe)
    # The last dimension of a convolution's output counts positions, not features.
    token = None if node.probe is None or node.op in CONV_OPS else tokens.get(node.probe)
    return _POINT(
        name=node.place if node.op != "add" else node.module,
        op=node.op.strip("_"),
        layer=layer,
        shape=tuple(node.shape),
        width=_width(node),
        gradient_norm=recorder.gradient_norm(node.probe),
        gradient_nonfinite=recorder.gradient_nonfinite(node.probe),
        activation=None if node.probe is None else statistics[node.probe],
        token_signal=None if token is None else token.signal,
        token_common_mode=None if token is None else token.common_mode,
    )


def _width(node: Node) -> int:
    """Units per position: channels of a convolution or of an image-shaped tensor, else the last dimension."""
    if not node.shape:
        return 0
    channels_first = node.op in CONV_OPS or len(node.shape) >= 4
    return int(node.shape[1] if channels_first and len(node.shape) > 1 else node.shape[-1])
