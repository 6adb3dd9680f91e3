"""Where the path from a parameter to the loss ends although values flow on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from gradflow.recording.dataflow import ESCAPES, Node, ancestors
from gradflow.trace_model import GraphCut


class CutFinder:
    """Answers, for the parameters of one step, what cut them off; a step with no cut asks nothing.

    Args:
        nodes: The dataflow of the step.
        end: The node of the loss; None where no op was seen to make it.
    """

    def __init__(self, nodes: Sequence[Node], end: int | None) -> None:
        self._nodes = nodes
        self._end = end

    @cached_property
    def _consumers(self) -> dict[int, list[int]]:
        return _consumers(self._nodes)

    @cached_property
    def _reaches_loss(self) -> set[int]:
        return ancestors(self._nodes, self._end)

    @cached_property
    def _users(self) -> dict[int, list[int]]:
        """The nodes that consumed each parameter."""
        users: dict[int, list[int]] = {}
        for node in self._nodes:
            for parameter in node.parameters:
                users.setdefault(parameter, []).append(node.index)
        return users

    def is_consumed(self, parameter: int) -> bool:
        """True where an op used the parameter (by ``id``)."""
        return parameter in self._users

    def find(self, parameter: int) -> GraphCut | None:
        """The first cut between a parameter and the loss, or None where its values do not reach the loss."""
        start = self._users.get(parameter, [])
        reached = sorted(_descendants(start, self._consumers))
        cuts = [i for i in reached if self._is_cut(i)]
        through = [i for i in cuts if i in self._reaches_loss]
        # Values that left as numbers cannot be followed: they lead to a cut only where nothing else reaches.
        left = any(_leaves_graph(self._nodes[i]) for i in reached)
        chosen = through or (cuts if left and not self._any_reaches(reached) else [])
        return self._describe(self._nodes[chosen[0]]) if chosen else None

    def _any_reaches(self, reached: Sequence[int]) -> bool:
        return any(i in self._reaches_loss for i in reached)

    def _is_cut(self, index: int) -> bool:
        node = self._nodes[index]
        asked = bool(node.parameters) or any(self._nodes[i].requires_grad for i in node.inputs)
        return not node.requires_grad and asked

    def _describe(self, node: Node) -> GraphCut:
        return GraphCut(
            op=_cut_op(node), module=self._last_module(node), where=node.module, source=node.source
        )

    def _last_module(self, node: Node) -> str:
        """The module that returned what was cut; of several inputs the one that carried a gradient."""
        if node.parameters:
            return node.returned_by or node.module
        carried = [i for i in node.inputs if self._nodes[i].requires_grad]
        while carried:
            before = self._nodes[carried[-1]]
            if before.returned_by is not None:
                return before.returned_by
            carried = [i for i in before.inputs if self._nodes[i].requires_grad]
        return node.module


def _leaves_graph(node: Node) -> bool:
    return node.op in {name.strip("_") for name in ESCAPES}


def _cut_op(node: Node) -> str:
    """The op itself where it drops gradients by nature; an ordinary op was run under ``no_grad``."""
    if node.op in {"detach", "detach_", "data"} or _leaves_graph(node) or not node.floating:
        return node.op.rstrip("_")
    return "no_grad"


def _consumers(nodes: Sequence[Node]) -> dict[int, list[int]]:
    consumers: dict[int, list[int]] = {}
    for node in nodes:
        for i in node.inputs:
            consumers.setdefault(i, []).append(node.index)
    return consumers


def _descendants(start: Sequence[int], consumers: dict[int, list[int]]) -> set[int]:
    reached = set(start)
    waiting = list(start)
    while waiting:
        for i in consumers.get(waiting.pop(), ()):
            if i not in reached:
                reached.add(i)
                waiting.append(i)
    return reached
