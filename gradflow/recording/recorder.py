"""One recorded step: hooks and dataflow in, frozen records out.

Usage: enter the recorder, run the forward inside ``recorder.forward()``, run backward, then ask for
``recorder.layers()`` and the rest while the gradients are still on the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.recording.activation_recorder import ActivationRecorder
from gradflow.recording.activations import ACTIVATION_OPS
from gradflow.recording.attentions import ATTENTION_CALLS, AttentionRecorder
from gradflow.recording.batch_norms import BATCH_NORM_OP, BatchNormRecorder
from gradflow.recording.dataflow import Dataflow, Node, Observer
from gradflow.recording.gradient_hooks import hook_gradient
from gradflow.recording.hooks import ModuleHooks
from gradflow.recording.layout import ModelLayout
from gradflow.recording.leaves import tensor_leaves
from gradflow.recording.residual_ops import SUM_OPS
from gradflow.recording.residual_recorder import WATCHED_OPS, SiteRecorder
from gradflow.recording.tensor_stats import (
    StatisticsCollector,
    count_nonfinite,
    is_transformed,
    l2_norm,
    norm_and_nonfinite,
    real_values,
)
from gradflow.recording.token_geometry import TokenGeometry
from gradflow.recording.token_stats import TokenCollector
from gradflow.recording.weight_ops import WEIGHT_OPS, is_weight_op
from gradflow.trace_model import TensorStatistics

Gradient = tuple[float, int]
"""L2 norm of the whole tensor, and how many of its elements are not finite."""


@dataclass(slots=True)
class Row:
    """One output leaf of one call, as it was seen."""

    name: str
    module: nn.Module
    call: int
    output: str
    shape: torch.Size
    dtype: torch.dtype | None
    """None where there is no tensor."""
    probe: int | None = None
    requires_grad: bool = False
    node: Node | None = None


@dataclass(slots=True, kw_only=True)
class _Recomputed:
    """An output that a checkpoint made again during backward."""

    name: str
    output: str
    probe: int


@dataclass(slots=True)
class Probes:
    """Everything that is measured in a step: each tensor once, with the gradient that reaches it."""

    statistics: StatisticsCollector
    gradients: dict[int, Gradient] = field(default_factory=dict)
    armed: bool = False
    """Gradients count from the end of the forward: a model may differentiate inside it."""
    _on_device: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> int:
        """Measure a tensor now and its gradient when backward reaches it."""
        probe = self.statistics.add(tensor)
        if tensor.requires_grad and not is_transformed(tensor):
            self.watch_gradient(tensor, probe)
        return probe

    def watch_gradient(self, tensor: Tensor, probe: int) -> None:
        """Have the gradient of a tensor, as it is now, recorded under a probe."""
        hook_gradient(tensor, partial(self._on_gradient, probe))

    def collect(self) -> tuple[TensorStatistics, ...]:
        """Statistics by probe; gradients that wait on another device are transferred, all at once."""
        if self._on_device:
            waiting = [torch.stack([norm.double(), bad.double()]) for norm, bad in self._on_device.values()]
            home = waiting[0].device
            rows = torch.stack([pair.to(home) for pair in waiting]).tolist()
            for probe, (norm, bad) in zip(self._on_device, rows, strict=True):
                self.gradients[probe] = (norm, int(bad))
            self._on_device.clear()
        return self.statistics.results()

    def _on_gradient(self, probe: int, gradient: Tensor | None) -> None:
        if not self.armed or gradient is None:  # a custom backward may return None
            return
        if gradient.is_cpu:
            self.gradients[probe] = norm_and_nonfinite(gradient)
        else:
            values = real_values(gradient)
            self._on_device[probe] = (l2_norm(values), count_nonfinite(values))


class Recorder:
    """Records one forward and backward of a model, and leaves no hook behind.

    Args:
        layout: The model's, from ``layout_of``.
        batch_size: N of docs/numbers.md; 0 where the inputs share no leading dimension.
        observer: Told of every op besides.
        splits: Have the gradient at every residual sum split.
    """

    def __init__(
        self,
        layout: ModelLayout,
        *,
        batch_size: int,
        observer: Observer | None = None,
        splits: bool = True,
    ) -> None:
        self.layout = layout
        self._observer = observer
        self._splits = splits
        self.batch_size = batch_size
        self._root_samples = math.sqrt(max(batch_size, 1))
        self.rows: list[Row] = []
        self.inputs: dict[int, str] = {}
        """Node of each input tensor -> its path in ``(args, kwargs)``."""
        self.probes = Probes(StatisticsCollector(batch_size, layout.buffers))
        self._row_modules = layout.row_modules
        self._calls: dict[str, int] = {}
        self._recomputed: list[_Recomputed] = []
        self._hooks = ModuleHooks(layout, self._on_output)
        parameters = {id(item.parameter): item.parameter for item in layout.parameters}
        self.sites = SiteRecorder(
            dict(parameters),
            batch_size=batch_size,
            scopes=self._hooks.scopes,
            calls=self.calls,
            probe=self._measure_stream,
        )
        self.tokens = TokenCollector(batch_size)
        self.token_geometry = TokenGeometry(batch_size)
        self.activations = ActivationRecorder(
            layout.unit_buffers,
            self.probes.statistics,
            scopes=self._hooks.scopes,
            calls=self.calls,
            probe=self.probes.add,
        )
        self.batch_norms = BatchNormRecorder()
        before = dict.fromkeys((*SUM_OPS, "stack"), self.sites.before)
        before[BATCH_NORM_OP] = self.batch_norms.before
        self.attentions = AttentionRecorder(batch_size)
        before |= dict.fromkeys(ATTENTION_CALLS, self.attentions.before)
        before |= dict.fromkeys(ACTIVATION_OPS, self.activations.before)
        self.dataflow = Dataflow(parameters.values(), self._hooks.running, self._on_op, before)
        self.sites.attach(self.dataflow)
        self.activations.attach(self.dataflow)
        self.attentions.attach(self.dataflow)

    def __enter__(self) -> Recorder:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    @property
    def hooks(self) -> ModuleHooks:
        """Who is running."""
        return self._hooks

    @contextmanager
    def forward(self, inputs: Any) -> Iterator[None]:
        """Trace what runs inside; ``inputs`` are the roots of the dataflow."""
        named: dict[int, str] = {}
        for path, tensor in tensor_leaves(inputs):
            self.dataflow.add_input(tensor)
            # A tensor that is given twice goes by its first name.
            self.inputs[len(self.dataflow.nodes) - 1] = named.setdefault(id(tensor), path)
        self.probes.armed = False
        with self.dataflow:
            yield
        self.sites.end_forward(split=self._splits)
        self.probes.armed = True

    def unseen_rows(self) -> tuple[tuple[nn.Module, str], ...]:
        """Modules that ought to have a row and never passed their hook, in definition order."""
        names = self.layout.names.items()
        return tuple((m, name) for m, name in names if m in self._row_modules and not self.calls(name))

    def calls(self, name: str) -> int:
        """How often a module was called."""
        return self._calls.get(name, 0)

    def called(self) -> frozenset[str]:
        """Fully qualified names of the modules that were called."""
        return frozenset(self._calls)

    def collect(self) -> tuple[TensorStatistics, ...]:
        """Statistics by probe; call it once, after backward."""
        statistics = self.probes.collect()
        if self._recomputed:
            self._adopt_recomputed(statistics)
        return statistics

    def gradient_norm(self, probe: int | None) -> float | None:
        """g of a probe: the root mean square over samples of the L2 norm; None where none arrived."""
        gradient = None if probe is None else self.probes.gradients.get(probe)
        return None if gradient is None else gradient[0] / self._root_samples

    def whole_gradient_norm(self, probe: int | None) -> float | None:
        """L2 norm of a probe's whole gradient; None where none arrived."""
        gradient = None if probe is None else self.probes.gradients.get(probe)
        return None if gradient is None else gradient[0]

    def gradient_nonfinite(self, probe: int | None) -> int | None:
        """How many elements of a probe's gradient are not finite; None where none arrived."""
        gradient = None if probe is None else self.probes.gradients.get(probe)
        return None if gradient is None else gradient[1]

    def _on_output(self, name: str, module: nn.Module, output: Any) -> None:
        with torch._C.DisableTorchFunction():
            if self.probes.armed and torch._C._current_graph_task_id() != -1:
                self._on_recompute(name, module, output)
                return
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            has_rows = module in self._row_modules
            leaves = (("", output),) if isinstance(output, Tensor) else tensor_leaves(output)
            first = len(self.rows)
            for path, tensor in leaves:
                node = self.dataflow.node_of(tensor)
                if node is not None:
                    node.returned_by = name
                    if node.made_by is None:
                        node.made_by = name
                if has_rows and (tensor.is_floating_point() or tensor.is_complex()):
                    self._add_row(name, module, call, path, tensor, node)
            if has_rows and len(self.rows) == first:
                self.rows.append(Row(name, module, call, *_without_floats(leaves)))

    def _add_row(
        self, name: str, module: nn.Module, call: int, path: str, tensor: Tensor, node: Node | None
    ) -> None:
        asks = tensor.requires_grad
        if node is None:
            probe = self.probes.add(tensor)
        elif node.probe is None:
            probe = node.probe = self.probes.add(tensor)
        else:
            probe = node.probe
            if asks and not node.requires_grad:
                # The output of a re-entrant checkpoint: measured inside it, given its gradient function after.
                self.probes.watch_gradient(tensor, probe)
        self.rows.append(Row(name, module, call, path, tensor.shape, tensor.dtype, probe, asks, node))

    def _on_op(self, node: Node, tensor: Tensor, args: tuple[Any, ...]) -> None:
        """Measure what may stand on the trunk even where no module returns it."""
        op, dataflow = node.op, self.dataflow
        if op in WEIGHT_OPS and node.floating and is_weight_op(node, dataflow.nodes):
            node.probe = self._measure_stream(tensor)
            dataflow.remember(node, tensor)
        in_place = bool(args) and args[0] is tensor
        if in_place or op in WATCHED_OPS or dataflow.joining is not None or "::" in op:
            self.sites.after(node, tensor, args)
        if self.activations.pending is not None:
            self.activations.after(node, tensor)
        if op == BATCH_NORM_OP:
            self.batch_norms.after(node)
        elif op in ATTENTION_CALLS:
            self.attentions.after(node)
        if self._observer is not None:
            self._observer(node, tensor, args)

    def _measure_stream(self, tensor: Tensor) -> int:
        """Measure what may stand on the trunk."""
        probe = self.probes.add(tensor)
        if tensor.dim() == 3:
            self.tokens.add(probe, tensor)
            self.token_geometry.add(probe, tensor)
        return probe

    def _on_recompute(self, name: str, module: nn.Module, output: Any) -> None:
        if module not in self._row_modules:
            return
        for path, tensor in tensor_leaves(output):
            if tensor.requires_grad and self._lacks_gradient(name, path):
                self._recomputed.append(_Recomputed(name=name, output=path, probe=self.probes.add(tensor)))

    def _lacks_gradient(self, name: str, output: str) -> bool:
        """True where the first forward of a module had no graph: it ran inside a re-entrant checkpoint."""
        return any(row.name == name and row.output == output and not row.requires_grad for row in self.rows)

    def _adopt_recomputed(self, statistics: tuple[TensorStatistics, ...]) -> None:
        """Give each first forward the gradient of the recomputation that made the same values."""
        waiting = [row for row in self.rows if row.probe is not None and not row.requires_grad]
        for again in self._recomputed:
            for row in waiting:
                same = (row.name, row.output) == (again.name, again.output) and row.probe is not None
                if (
                    same
                    and again.probe in self.probes.gradients
                    and _alike(statistics, row.probe, again.probe)
                ):
                    self.probes.gradients[row.probe or 0] = self.probes.gradients[again.probe]
                    waiting.remove(row)
                    break


def _alike(statistics: tuple[TensorStatistics, ...], first: int | None, second: int) -> bool:
    if first is None:
        return False
    return (statistics[first].rms, statistics[first].mean) == (
        statistics[second].rms,
        statistics[second].mean,
    )


def _without_floats(leaves: tuple[tuple[str, Tensor], ...]) -> tuple[str, torch.Size, torch.dtype | None]:
    """Path, shape and dtype of the first leaf of an output that holds no floating tensor."""
    if not leaves:
        return "", torch.Size(()), None
    path, tensor = leaves[0]
    return path, tensor.shape, tensor.dtype
