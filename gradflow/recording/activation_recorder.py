"""Nonlinearities as they run: which op, whose units, and, once the step is over, whether it is a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradflow.recording.activations import (
    ActivationCollector,
    Family,
    UnitPlace,
    UnitPool,
    UnitStatistics,
    family_of,
    from_rows,
)
from gradflow.recording.dataflow import Dataflow, Node
from gradflow.recording.drafts import drafting
from gradflow.recording.residual_ops import ADD_OPS, SCALE_OPS, VALUE_OPS
from gradflow.recording.tensor_stats import StatisticsCollector
from gradflow.recording.weight_ops import CONV_OPS, LINEAR_OPS
from gradflow.trace_model import ActivationRecord

_CHANNEL_NORMS = frozenset({"batch_norm", "group_norm", "instance_norm"})
_FEATURE_NORMS = frozenset({"layer_norm", "rms_norm"})
_CHANNELS_FIRST = CONV_OPS | _CHANNEL_NORMS
_CHANNELS_LAST = LINEAR_OPS | _FEATURE_NORMS
_SAME_AXES = ADD_OPS | SCALE_OPS | {"dropout", "contiguous", "clone", "to", "float"}
_FARTHEST = 6
"""So many ops back the producer of an activation's input is looked for."""
_MULTIPLICATIONS = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"})
_SHIFTS = frozenset({"sub", "sub_", "__sub__", "__rsub__", "rsub", "neg", "__neg__"})
_PICKS = frozenset({"gather", "topk", "index", "masked_fill", "masked_fill_", "where", "cat", "stack"})
_CARRIED = VALUE_OPS | SCALE_OPS | ADD_OPS | _SHIFTS | _PICKS
"""A gate is still a gate after these, where nothing else that depends on the data comes in."""
_ACTIVATION = drafting(ActivationRecord)


@dataclass(slots=True)
class _Pending:
    op: str
    family: Family
    axis: int
    slot: int | None
    probe: int | None = None


@dataclass(slots=True)
class _Seen:
    node: Node
    slot: int | None
    """In the collector; None where the probes of output and pre-activation say enough."""
    call: int
    """Of the module whose forward ran the op."""
    probe: int | None
    """Of the pre-activation."""


class ActivationRecorder:
    """Watches the nonlinearities of a step.

    Args:
        pool: Memory that the steps of a model share.
        statistics: Of the step, which already know enough of most small tensors.
        scopes: Serial numbers of the calls that are running; empty outside the model.
        calls: How often a module has been called so far.
        probe: Has a tensor measured, and its gradient; returns where.
    """

    def __init__(
        self,
        pool: UnitPool,
        statistics: StatisticsCollector,
        *,
        scopes: Sequence[int],
        calls: Callable[[str], int],
        probe: Callable[[Tensor], int],
    ) -> None:
        self._collector = ActivationCollector(pool)
        self._statistics = statistics
        self._probe = probe
        self._scopes = scopes
        self._calls = calls
        self.pending: _Pending | None = None
        """What the nonlinearity that is running was given."""
        self._seen: list[_Seen] = []

    def attach(self, dataflow: Dataflow) -> None:
        """Say whose nodes to ask."""
        self._dataflow = dataflow

    def before(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        """Look at what a nonlinearity is given: in place it is about to be overwritten."""
        self.pending = None
        value = args[0] if args else (kwargs or {}).get("input")
        if not self._scopes or not isinstance(value, Tensor) or value.dim() < 2:
            return
        node = self._dataflow.node_of(value)
        if node is None or not (node.from_data and node.from_parameter and node.floating):
            return
        family = family_of(op, args, kwargs)
        if family is None:
            return
        if family is Family.RECTIFIER and node.probe is not None and self._statistics.counts_units(value):
            self.pending = _Pending(op, family, 1, None, node.probe)
            return
        axis = _unit_axis(node, self._dataflow.nodes)
        slot = None
        if family is not Family.OTHER:
            slot = self._collector.add(value, family, axis)
            if slot is None:
                return
        self.pending = _Pending(op, family, axis, slot)

    def after(self, node: Node, tensor: Tensor) -> None:
        """Note which node a nonlinearity made; call it for the op after which one is ``pending``."""
        pending, self.pending = self.pending, None
        if pending is None or pending.op != node.op:
            return
        slot = pending.slot
        if pending.probe is not None:
            if node.probe is None:
                node.probe = self._probe(tensor)
        elif slot is None:
            slot = self._collector.add(tensor, pending.family, pending.axis)
            if slot is None:
                return
        self._seen.append(_Seen(node, slot, self._calls(node.module), pending.probe))

    def records(
        self, leaves: frozenset[str], layers: Mapping[int | None, int]
    ) -> tuple[ActivationRecord, ...]:
        """Freeze what was seen, in execution order.

        Args:
            leaves: Fully qualified names of the modules whose forward is one nonlinearity.
            layers: ``order`` of the layer row, by probe.
        """
        statistics = self._collected()
        gates = _gates([seen.node.index for seen in self._seen], self._dataflow.nodes)
        indices: dict[tuple[str, int], int] = {}
        leaf_calls: dict[str, int] = {}
        found: list[ActivationRecord] = []
        for seen, numbers in zip(self._seen, statistics, strict=True):
            if numbers is None:
                continue
            name, call = _place(seen, leaves, leaf_calls)
            index = indices.get((name, call), 0)
            indices[name, call] = index + 1
            layer = None if seen.node.probe is None else layers.get(seen.node.probe)
            gate = seen.node.index in gates
            found.append(_record(seen.node, numbers, len(found), name, call, index, layer, gate))
        return tuple(found)

    def _collected(self) -> list[UnitStatistics | None]:
        """Statistics of everything seen, in its order; the step's own statistics are complete by now."""
        own = self._collector.results()
        found = [None if seen.slot is None else own[seen.slot] for seen in self._seen]
        groups: dict[Any, list[tuple[int, UnitPlace, UnitPlace]]] = {}
        for position, seen in enumerate(self._seen):
            if seen.probe is None or seen.node.probe is None:
                continue
            output = self._statistics.unit_rows(seen.node.probe)
            given = self._statistics.unit_rows(seen.probe)
            if output is not None and given is not None:
                key = (output[0].active.shape[1], output[0].active.device)
                groups.setdefault(key, []).append((position, output, given))
        for members in groups.values():
            outputs, inputs = [member[1] for member in members], [member[2] for member in members]
            rows = from_rows(outputs, inputs, self._statistics.batch_size)
            for (position, _, _), numbers in zip(members, rows, strict=True):
                found[position] = numbers
        return found


def _record(
    node: Node,
    numbers: UnitStatistics,
    order: int,
    name: str,
    call: int,
    index: int,
    layer: int | None,
    is_gate: bool,
) -> ActivationRecord:
    return _ACTIVATION(
        order=order,
        name=name,
        op=node.op.strip("_"),
        call=call,
        layer=layer,
        units=numbers.units,
        observations=numbers.observations,
        inactive=numbers.inactive,
        sunk=numbers.sunk,
        dormant=numbers.dormant,
        saturated=numbers.saturated,
        stuck=numbers.stuck,
        is_gate=is_gate,
        always_active=numbers.always_active,
        index=index,
    )


def _place(seen: _Seen, leaves: frozenset[str], calls: dict[str, int]) -> tuple[str, int]:
    """The activation module and its call, or the module whose forward calls the function and its call."""
    made_by = seen.node.made_by
    if made_by is None or made_by not in leaves:
        return seen.node.module, seen.call
    # A leaf runs one nonlinearity a call: those seen so far are its calls so far.
    call = calls[made_by] = calls.get(made_by, -1) + 1
    return made_by, call


def _unit_axis(node: Node, nodes: Sequence[Node]) -> int:
    """The dimension of the units, by the layer that made the values; where none is near, by their shape."""
    last = len(node.shape) - 1
    if last == 1:
        return 1
    for _ in range(_FARTHEST):
        if node.op in _CHANNELS_LAST:
            return last
        if node.op in _CHANNELS_FIRST:
            return 1
        if node.op not in _SAME_AXES or not node.inputs:
            break
        node = nodes[node.inputs[-1]]
    return 1 if last >= 3 else last


def _gates(activations: Sequence[int], nodes: Sequence[Node]) -> frozenset[int]:
    """Those whose output multiplies something else that depends on the data, or is the model's output."""
    if not activations:
        return frozenset()
    carried: dict[int, set[int]] = {index: {index} for index in activations}
    found: set[int] = {index for index in activations if nodes[index].returned_by == ""}
    for node in nodes[min(activations) + 1 :]:
        origins: set[int] = set()
        for i in node.inputs:
            origins |= carried.get(i, set())
        if not origins:
            continue
        others = [i for i in node.inputs if nodes[i].from_data and not (carried.get(i, set()) & origins)]
        both = len({i for i in node.inputs if i in carried}) > 1
        if node.op in _MULTIPLICATIONS and (others or both):
            found |= origins
        elif node.op in _CARRIED and not others:
            if node.returned_by == "":
                found |= origins
            carried[node.index] = carried.get(node.index, set()) | origins
    return frozenset(found)
