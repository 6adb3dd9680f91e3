"""Who made the first NaN or Inf: the step is run again with every op looked at.

Nothing here runs unless a recorded step holds a non-finite value, so cost is no object.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.recording.dataflow import INPUT_OP, Node, user_source
from gradflow.recording.recorder import Recorder
from gradflow.trace_model import NonFiniteOrigin

_MASKING = """
masked_fill masked_fill_ full full_like new_full fill_ where tensor triu tril triu_ __setitem__ scalar_tensor
masked_scatter index_fill scatter scatter_
"""
MASKING_OPS = frozenset(_MASKING.split())
"""Ops that write -inf on purpose: a mask for a softmax is no fault."""


@dataclass(slots=True)
class _Seen:
    """What one op or gradient held."""

    value: str
    count: int


@dataclass(slots=True)
class FiniteCheck:
    """Watches a replayed step; feed ``on_op`` to a recorder, then ask for ``origins``."""

    parameters: dict[str, nn.Parameter]
    _bad: dict[int, _Seen] = field(default_factory=dict)
    _masks: dict[int, int] = field(default_factory=dict)
    """How many elements of a mask are -inf."""
    _sources: dict[int, str] = field(default_factory=dict)
    _first_gradient: tuple[int | str, _Seen] | None = None
    _gradients_seen: set[int] = field(default_factory=set)
    _input: _Seen | None = None

    def look_at_inputs(self, inputs: Iterable[Tensor]) -> None:
        """Note a NaN or Inf that the model is given."""
        seen = (_look(tensor) for tensor in inputs if _is_float(tensor))
        self._input = next((found for found in seen if found is not None), None)

    def watch_parameters(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Hook the gradients of the parameters themselves; the caller removes the handles."""
        return [
            parameter.register_hook(partial(self._on_gradient, name))  # type: ignore[no-untyped-call]
            for name, parameter in self.parameters.items()
            if parameter.requires_grad
        ]

    def on_op(self, node: Node, tensor: Tensor, args: tuple[Any, ...]) -> None:
        """Look at what an op returned, and at its gradient later."""
        self._sources[node.index] = user_source()
        if not node.floating:
            return
        if tensor.requires_grad:
            tensor.register_hook(partial(self._on_gradient, node.index))  # type: ignore[no-untyped-call]
        seen = _look(tensor)
        if seen is None:
            return
        if seen.value == "-inf" and (node.op in MASKING_OPS or any(i in self._masks for i in node.inputs)):
            self._masks[node.index] = seen.count
            return
        self._bad[node.index] = seen

    def origins(self, recorder: Recorder, end: Node | None) -> tuple[NonFiniteOrigin, ...]:
        """The first producer in each phase: a parameter, the forward, the backward."""
        found = (self._in_parameters(), self._in_forward(recorder, end), self._in_backward(recorder))
        return tuple(origin for origin in found if origin is not None)

    def _on_gradient(self, place: int | str, gradient: Tensor) -> None:
        if isinstance(place, int):
            self._gradients_seen.add(place)
        if self._first_gradient is None:
            seen = _look(gradient)
            if seen is not None:
                self._first_gradient = (place, seen)

    def _in_parameters(self) -> NonFiniteOrigin | None:
        for name, parameter in self.parameters.items():
            seen = _look(parameter) if _is_float(parameter) else None
            if seen is not None:
                return NonFiniteOrigin(
                    phase="parameter", name=name, op="", source="", value=seen.value, count=seen.count
                )
        return None

    def _in_forward(self, recorder: Recorder, end: Node | None) -> NonFiniteOrigin | None:
        nodes = recorder.dataflow.nodes
        measured = [row.node.index for row in recorder.rows if row.node is not None]
        rows = [index for index in measured if index in self._bad]
        reached = rows[:1] or ([end.index] if end is not None and end.index in self._bad else [])
        if not reached:
            return self._mask(nodes, measured)
        node = nodes[reached[0]]
        while True:
            before = [nodes[i] for i in node.inputs if i in self._bad]
            if not before:
                break
            node = before[0]
        if self._fed_by_parameter(node):
            return None
        if self._input is not None and any(nodes[i].op == INPUT_OP for i in node.inputs):
            value, count = self._input.value, self._input.count
            return NonFiniteOrigin(phase="forward", name="", op=INPUT_OP, source="", value=value, count=count)
        seen = self._bad[node.index]
        clean = [nodes[i].place for i in node.inputs if nodes[i].op != INPUT_OP]
        return NonFiniteOrigin(
            phase="forward",
            name=node.place,
            op=node.op,
            source=self._sources.get(node.index, ""),
            value=seen.value,
            count=seen.count,
            last_finite=clean[-1] if clean else "",
        )

    def _mask(self, nodes: list[Node], measured: list[int]) -> NonFiniteOrigin | None:
        """Where nothing else is to blame, the first module that returns a mask: the rule asks what became of it."""
        masks = [nodes[index] for index in measured if index in self._masks]
        if not masks:
            return None
        first = masks[0]
        count = self._masks[first.index]
        return NonFiniteOrigin(phase="forward", name=first.place, op="", source="", value="-inf", count=count)

    def _fed_by_parameter(self, node: Node) -> bool:
        """The values were bad before the op: a parameter of it holds them."""
        bad = {id(p) for p in self.parameters.values() if _is_float(p) and _look(p) is not None}
        return any(parameter in bad for parameter in node.parameters)

    def _in_backward(self, recorder: Recorder) -> NonFiniteOrigin | None:
        if self._first_gradient is None:
            return None
        place, seen = self._first_gradient
        nodes = recorder.dataflow.nodes
        consumer = self._consumer(place, nodes)
        if consumer is None:
            return None
        return NonFiniteOrigin(
            phase="backward",
            name=consumer.place,
            op=consumer.op,
            source=self._sources.get(consumer.index, ""),
            value=seen.value,
            count=seen.count,
            last_finite=consumer.place,
        )

    def _consumer(self, place: int | str, nodes: list[Node]) -> Node | None:
        """The op whose backward made the value: the last user, in execution order, of what it belongs to."""
        if isinstance(place, str):
            key = id(self.parameters[place])
            users = [node for node in nodes if key in node.parameters]
        else:
            users = [node for node in nodes if place in node.inputs and node.index in self._gradients_seen]
        return users[-1] if users else None


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _look(tensor: Tensor) -> _Seen | None:
    """What is not finite in a tensor, or None."""
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values.coalesce().values() if values.layout is torch.sparse_coo else values.values()
    if not _is_float(values) or values.is_meta:
        return None
    count = int(torch.isfinite(values).logical_not().sum().item())
    if not count:
        return None
    if values.is_complex():
        values = torch.view_as_real(values)
    kinds = [
        name
        for name, test in (("nan", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf))
        if bool(test(values).any().item())
    ]
    return _Seen(" and ".join(kinds), count)
