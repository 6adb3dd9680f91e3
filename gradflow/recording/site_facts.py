"""How a residual block is designed, read off the dataflow once the forward is over.

Where it normalises, what bends its sum, whether the stream starts anew there, and what stands on its two sides.
Definitions: the residual page of the documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from gradflow.recording.activations import FAMILIES
from gradflow.recording.dataflow import Node
from gradflow.recording.norm_ops import is_norm, works_on_statistics
from gradflow.recording.residual_ops import ADD_OPS, SCALE_OPS, SUB_OPS, VALUE_OPS, data_inputs
from gradflow.recording.residual_sites import Branch, Graph, factors_of
from gradflow.recording.weight_ops import CONV_OPS, NORM_OPS, is_weight_op, weights_of

FURTHEST = 32
"""A norm in plain ops has fewer of them: no more are looked at after a sum."""
STREAMS = ("identity", "scaled", "projection", "opaque")
"""Kinds whose sum carries a stream on."""
_WITHOUT_PLACEMENT = ("concat", "opaque")
_SHORTCUT_WORDS = (
    ("norm", NORM_OPS),
    ("pad", frozenset({"pad", "constant_pad_nd"})),
    ("resize", frozenset({"interpolate", "upsample"})),
    ("unshuffle", frozenset({"pixel_unshuffle"})),
    ("cat", frozenset({"cat"})),
    ("factor", SCALE_OPS),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """Fields as in ``ResidualRecord``."""

    norm_placement: str
    activation_after: str
    resets_stream: bool
    shortcut: tuple[str, ...]
    branch_factors: tuple[str, ...]


class FactFinder:
    """Answers for every site of one step.

    Args:
        graph: Of the step.
        sites: Each site's sum, and what was found there.
    """

    def __init__(self, graph: Graph, sites: Sequence[tuple[int, Branch]]) -> None:
        self._graph = graph
        self._nodes = graph.nodes
        self._sources = frozenset(found.source for _, found in sites)
        self._sums = frozenset(node for node, _ in sites)
        self._readers = _readers(graph.nodes)
        self._fresh = _fresh(graph.nodes, _stream_sums(sites))

    def facts(self, node: int, found: Branch, *, nested: bool) -> SiteFacts:
        """What can be said of the site whose sum is ``node``."""
        graph = self._graph
        placement, post = self._placement(node, found)
        projected = found.kind == "projection"
        return SiteFacts(
            norm_placement=placement,
            activation_after=self._activation(node if post is None else post),
            resets_stream=projected or (found.kind in STREAMS and not nested and found.source in self._fresh),
            shortcut=tuple(_shortcut(found, graph)),
            branch_factors=() if found.kind == "concat" else tuple(_factors(found.branch, graph)),
        )

    def _placement(self, node: int, found: Branch) -> tuple[str, int | None]:
        """Where the block normalises, and the norm of its sum where it has one."""
        if found.kind in _WITHOUT_PLACEMENT:
            return "", None
        nodes = self._nodes
        head, through = _norms_within(found, nodes)
        head = head or (found.kind == "projection" and _made_by_norm(found.source, node, nodes))
        end = _ends_in_norm(found.branch, found.source, nodes)
        post = self._norm_of(node)
        if head:
            return ("both" if end or post is not None else "before"), post
        if post is not None:
            return "after", post
        return ("end" if end else "inside" if through else "none"), None

    def _norm_of(self, node: int) -> int | None:
        """The norm that alone reads a sum and belongs to its block; a stream's final norm belongs to none.

        It is the block's where the stream goes on from it, or where the module that adds also normalises.
        """
        norm = self._sole_reader(node, self._stops_at_norm)
        if norm is None or not is_norm(self._nodes[norm], self._nodes):
            return None
        adder, place = self._nodes[node].module, self._nodes[norm].module
        inside = bool(adder) and (place == adder or place.startswith(f"{adder}."))
        return norm if inside or self._feeds_a_site(norm) else None

    def _feeds_a_site(self, index: int) -> bool:
        """A tensor of the same values (or its affine part) is a site's source."""
        waiting, steps = [index], 0
        while waiting and steps < FURTHEST:
            step = waiting.pop()
            steps += 1
            if step in self._sources:
                return True
            carried = VALUE_OPS | SCALE_OPS | ADD_OPS
            waiting += [
                i
                for i in self._readers.get(step, ())
                if i not in self._sums
                and self._nodes[i].op in carried
                and len(data_inputs(self._nodes[i], self._nodes)) == 1
            ]
        return False

    def _activation(self, index: int) -> str:
        """The nonlinearity that alone reads a tensor, value-preserving ops passed."""
        reader = self._sole_reader(index, lambda i: self._nodes[i].op not in VALUE_OPS)
        op = "" if reader is None else self._nodes[reader].op
        return op.strip("_") if op in FAMILIES else ""

    def _stops_at_norm(self, index: int) -> bool:
        node = self._nodes[index]
        joins = node.index in self._sums or (node.op in ADD_OPS and len(data_inputs(node, self._nodes)) > 1)
        plain = node.op in VALUE_OPS or works_on_statistics(node)
        return joins or not plain or is_norm(node, self._nodes)

    def _sole_reader(self, index: int, stops: Callable[[int], bool]) -> int | None:
        """The one node that every way on from a tensor comes to first; None where there are several."""
        found: set[int] = set()
        seen: set[int] = set()
        waiting = [index]
        while waiting and len(seen) < FURTHEST and len(found) < 2:
            for reader in self._readers.get(waiting.pop(), ()):
                if reader in seen or self._is_write_through(index, reader):
                    continue
                seen.add(reader)
                if stops(reader) or reader not in self._readers:
                    found.add(reader)
                else:
                    waiting.append(reader)
        return found.pop() if len(found) == 1 and not waiting else None

    def _is_write_through(self, index: int, reader: int) -> bool:
        """The base of a view that was written into: the same values once more."""
        same = self._nodes[reader].op == self._nodes[index].op
        return same and reader == index + 1 and self._nodes[index].op.endswith("_")


def _readers(nodes: Sequence[Node]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for node in nodes:
        for i in set(node.inputs):
            found.setdefault(i, []).append(node.index)
    return found


def _stream_sums(sites: Sequence[tuple[int, Branch]]) -> frozenset[int]:
    return frozenset(node for node, found in sites if found.kind in STREAMS)


def _fresh(nodes: Sequence[Node], sums: Collection[int]) -> frozenset[int]:
    """Nodes that come after a site's sum and are carried there by weight layers only: another stream."""
    after: set[int] = set()
    carried: set[int] = set()
    for node in nodes:
        if node.index in sums:
            after.add(node.index)
            carried.add(node.index)
            continue
        if any(i in after for i in node.inputs):
            after.add(node.index)
        if not is_weight_op(node, nodes) and any(i in carried for i in node.inputs):
            carried.add(node.index)
    return frozenset(after - carried)


def _norms_within(found: Branch, nodes: Sequence[Node]) -> tuple[bool, bool]:
    """Does every way through the branch cross a norm: before its first weight layer, and at all?"""
    bare = {found.source}
    meets_layer = False
    for i in found.inside:
        node = nodes[i]
        if is_norm(node, nodes) or not any(j in bare for j in node.inputs):
            continue
        bare.add(i)
        meets_layer = meets_layer or is_weight_op(node, nodes)
    through = found.branch not in bare
    return through and not meets_layer, through


def _is_smaller(node: Node, other: Node) -> bool:
    return node.shape.numel() < other.shape.numel()


def _made_by_norm(index: int, total: int, nodes: Sequence[Node]) -> bool:
    """A pre-activation block's shortcut starts behind the norm and the activation that the branch shares."""
    block = nodes[total].module
    while nodes[index].op in VALUE_OPS or nodes[index].op in FAMILIES:
        data = data_inputs(nodes[index], nodes)
        if len(data) != 1:
            return False
        index = data[0]
    return bool(block) and nodes[index].module.startswith(block) and is_norm(nodes[index], nodes)


def _ends_in_norm(index: int, source: int, nodes: Sequence[Node]) -> bool:
    """Nothing but factors and moves stands between the last norm and the add, of every parallel branch."""
    while True:
        node = nodes[index]
        if is_norm(node, nodes):
            return True
        data = [i for i in data_inputs(node, nodes) if i >= source]
        if node.op in ADD_OPS | SUB_OPS and len(data) == 2:
            return all(_ends_in_norm(i, source, nodes) for i in data)
        if len(data) != 1 or data[0] == source or node.op not in VALUE_OPS | SCALE_OPS | ADD_OPS:
            return False
        index = data[0]


def _shortcut(found: Branch, graph: Graph) -> Iterator[str]:
    """What the skip does, first to last, in words."""
    if found.kind == "gated":
        yield "mix" if found.mixes else "gate"
    elif found.kind == "scaled":
        yield from _factors(found.skip, graph)
    elif found.kind in ("projection", "low_rank"):
        for i in reversed(found.shortcut):
            word = _shortcut_word(graph.nodes[i], graph.nodes)
            if word:
                yield word


def _shortcut_word(node: Node, nodes: Sequence[Node]) -> str:
    if is_weight_op(node, nodes):
        return "1x1" if node.op in CONV_OPS else "linear"
    if "pool" in node.op:
        return "pool"
    word = next((word for word, ops in _SHORTCUT_WORDS if node.op in ops), "")
    smaller = bool(node.inputs) and _is_smaller(node, nodes[node.inputs[0]])
    return "slice" if not word and node.op in VALUE_OPS and smaller else word


def _factors(index: int, graph: Graph) -> Iterator[str]:
    """The factors that stand last on one side, nearest the add first."""
    nodes = graph.nodes
    factors, rest = factors_of(index, nodes)
    for i in factors:
        yield _factor_word(nodes[i], graph)
    node = nodes[rest]
    if node.op in SCALE_OPS and len(data_inputs(node, nodes)) == 2 and not is_norm(node, nodes):
        yield "gate"


def _factor_word(node: Node, graph: Graph) -> str:
    sizes = [graph.parameters[i].numel() for i in weights_of(node, graph.nodes) if i in graph.parameters]
    if sizes:
        return "channels" if max(sizes) > 1 else "scalar"
    return "mask" if len(node.inputs) == 2 else "number"
