"""Dataflow graph -> the trunk: the tensors that carry the gradient from the loss back to the input.

The trunk follows the longest path from an input to the loss, counted in weight layers, each parameter once (a
cell looped over time, or a block applied again, is one layer: time is not depth). Along it stand the outputs
of the residual adds where they make up most of the path, else those of the weight layers; branch internals,
the head, and whatever comes after a reduction that every path goes through (global pooling, taking the class
token) are left out.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from gradflow.recording.dataflow import Node, ancestors
from gradflow.recording.residual_recorder import Site
from gradflow.recording.weight_ops import NORM_OPS, is_weight_op, weights_of

_REDUCTIONS = """
mean sum amax max logsumexp median adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d _adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d max_pool1d
max_pool2d __getitem__ select index_select gather narrow
"""
REDUCTIONS = frozenset(_REDUCTIONS.split())
LOW_RANK = "low_rank"
REDUCES_TO = 0.25
"""A reduction keeps at most this share of the elements of what it reduces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkPath:
    """The nodes that make the trunk, first to last."""

    kind: str
    """"residual", "weights" or "none"."""
    nodes: tuple[int, ...]
    batch_norm: bool
    path: tuple[int, ...] = ()
    """Every node of the path that it follows, from an input to the loss."""


def find_trunk(nodes: Sequence[Node], end: int | None, sites: Sequence[Site]) -> TrunkPath:
    """Find the trunk of a forward that ends at node ``end``, the loss, given its residual adds."""
    if end is None:
        return TrunkPath(kind="none", nodes=(), batch_norm=False)
    whole = longest_path(nodes, end)
    path = whole[: reduction_on(whole, nodes, end)]
    sites = [site for site in sites if path and site.node <= path[-1]]
    streams = [site for site in sites if site.found.kind != LOW_RANK]
    adds = _longest_stream(streams, nodes)
    outside = _outside_branches(layer_nodes(path, nodes, sites), sites, streams)
    residual = len(adds) >= 2 and len(outside) <= len(adds) + 1
    on_path = set(path)
    chosen = adds if residual else _mixed(path, nodes, [i for i in adds if i in on_path], outside)
    kind = "residual" if residual else "weights"
    return TrunkPath(
        kind=kind if len(chosen) > 1 else "none",
        nodes=tuple(chosen),
        batch_norm=crosses_batch_norm(path, nodes, chosen),
        path=tuple(whole),
    )


def layer_nodes(path: Sequence[int], nodes: Sequence[Node], sites: Sequence[Site]) -> list[int]:
    """Weight layers on the path, by the tensor that stands for each; of a layer used again the last use.

    A low-rank update and the layer it updates are one layer, and their sum is its output.
    """
    sums = {site.node for site in sites if site.found.kind == LOW_RANK}
    readers = Counter(i for node in nodes for i in set(node.inputs))
    following = dict(pairwise(path))
    seen: set[frozenset[int]] = set()
    found = []
    for index in reversed(path):
        if index in sums:
            found.append(index)
        elif is_weight_op(nodes[index], nodes):
            weights = weights_of(nodes[index], nodes)
            if weights not in seen:
                found.append(_output_of(index, following.get(index), readers, nodes))
            seen.add(weights)
    return found[::-1]


def _output_of(index: int, following: int | None, readers: Mapping[int, int], nodes: Sequence[Node]) -> int:
    """What a weight layer gives: a normalisation that nothing else reads along with it is part of the layer.

    The gradient at the input of a normalisation scales with the inverse of the weight, and says nothing about
    the flow: the weight's scale cancels at the norm's output.
    """
    if following is None or nodes[following].op not in NORM_OPS or nodes[following].probe is None:
        return index
    return following if readers[index] == 1 else index


def _mixed(
    path: Sequence[int], nodes: Sequence[Node], adds: Sequence[int], outside: Sequence[int]
) -> list[int]:
    """Weight layers that are no branch internals, with the adds among them, without the head."""
    points = sorted({*adds, *outside})
    ends_in_weight = bool(points) and points[-1] not in adds and is_head(points[-1], path, nodes)
    return points[:-1] if ends_in_weight and len(points) > 2 else points


def is_head(index: int, path: Sequence[int], nodes: Sequence[Node]) -> bool:
    """No weight layer comes after it on the path."""
    return not any(is_weight_op(nodes[i], nodes) for i in path if i > index)


def longest_path(nodes: Sequence[Node], end: int, counted: Collection[int] | None = None) -> list[int]:
    """The path from an input (or, failing that, a parameter) to ``end`` through most weight layers.

    Args:
        nodes: Of the forward.
        end: Where it ends.
        counted: Count these nodes instead of all weight layers.
    """
    score: dict[int, int] = {}
    previous: dict[int, int | None] = {}
    used: set[frozenset[int]] = set()
    any_data = nodes[end].from_data
    for node in nodes[: end + 1]:
        if any_data and not node.from_data:
            continue
        weight = 0
        if counted is not None:
            weight = node.index in counted
        elif is_weight_op(node, nodes):
            weights = weights_of(node, nodes)
            weight = weights not in used
            used.add(weights)
        # Of equally deep origins the latest is taken: the branch, rather than the skip past it.
        deepest, origin = max(((score[i], i) for i in node.inputs if i in score), default=(0, None))
        score[node.index] = weight + deepest
        previous[node.index] = origin
    path = []
    step: int | None = end
    while step is not None:
        path.append(step)
        step = previous.get(step)
    return path[::-1]


def reduction_on(path: Sequence[int], nodes: Sequence[Node], end: int) -> int:
    """Where the path meets its first reduction that no way to the loss goes around; its length if none."""
    found = [
        position
        for position in range(1, len(path))
        if nodes[path[position]].op in REDUCTIONS
        and _reduces(nodes[path[position - 1]].shape, nodes[path[position]].shape)
    ]
    bottlenecks = _bottlenecks(nodes, path[0], end) if found else set()
    return next((position for position in found if path[position] in bottlenecks), len(path))


def _reduces(before: Sequence[int], after: Sequence[int]) -> bool:
    if len(before) < 3 or math.prod(after) > REDUCES_TO * math.prod(before):
        return False
    return not _keeps_spatial(before, after)


def _keeps_spatial(before: Sequence[int], after: Sequence[int]) -> bool:
    """A pool that only shrinks the grid is no reduction."""
    return len(after) == len(before) and sum(size > 1 for size in after[2:]) == sum(
        size > 1 for size in before[2:]
    )


def _bottlenecks(nodes: Sequence[Node], start: int, end: int) -> set[int]:
    """Nodes that every path from ``start`` to ``end`` goes through.

    Indices are a topological order, so a path misses a node just where one of its edges jumps over it.
    """
    forward = {start}
    for node in nodes[start + 1 : end + 1]:
        if any(i in forward for i in node.inputs):
            forward.add(node.index)
    between = sorted(forward & ancestors(nodes, end))
    last_user = {i: index for index in between for i in nodes[index].inputs}
    furthest, found = start, set()
    for index in between:
        if index >= furthest:
            found.add(index)
        furthest = max(furthest, last_user.get(index, index))
    return found


def _longest_stream(sites: Sequence[Site], nodes: Sequence[Node]) -> list[int]:
    """The residual stream with most adds: each add's source leads back to the add before it.

    Adds inside a branch, and those of another stream (an encoder that a decoder looks at), are not on it.
    """
    by_node = {site.node: site for site in sites}
    before = {site.node: _nearest_add(site.found.source, by_node.keys(), nodes) for site in sites}
    length: dict[int, int] = {}
    for add in sorted(by_node):
        earlier = before[add]
        length[add] = 1 + (length[earlier] if earlier is not None else 0)
    stream: list[int] = []
    step = max(length, key=lambda add: (length[add], add), default=None)
    while step is not None:
        stream.append(step)
        step = before[step]
    return stream[::-1]


def _nearest_add(index: int, adds: Collection[int], nodes: Sequence[Node]) -> int | None:
    """The latest add among a node and its ancestors."""
    waiting = [-index]
    seen = {index}
    while waiting:
        latest = -heapq.heappop(waiting)
        if latest in adds:
            return latest
        for i in nodes[latest].inputs:
            if i not in seen and nodes[i].from_data:
                seen.add(i)
                heapq.heappush(waiting, -i)
    return None


def _outside_branches(layers: Sequence[int], sites: Sequence[Site], streams: Sequence[Site]) -> list[int]:
    """Layers that no site's branch holds; a low-rank sum counts where no stream's branch holds it."""
    sums = {site.node for site in sites if site.found.kind == LOW_RANK}
    held, held_by_streams = Spans(sites), Spans(streams)
    return [i for i in layers if not (held_by_streams if i in sums else held).hold(i)]


class Spans:
    """From source to sum, of each site: does any hold a node?"""

    def __init__(self, sites: Sequence[Site]) -> None:
        spans = sorted((site.found.source, site.node) for site in sites)
        self._starts = [start for start, _ in spans]
        self._furthest = list(accumulate((end for _, end in spans), max))

    def hold(self, index: int) -> bool:
        """Of the spans that start before a node, the one that ends last ends after it."""
        before = bisect_left(self._starts, index)
        return before > 0 and self._furthest[before - 1] > index


def crosses_batch_norm(path: Sequence[int], nodes: Sequence[Node], chosen: Sequence[int]) -> bool:
    """A batch normalisation stands on the path between the first and the last tensor of a trunk."""
    if not chosen:
        return False
    return any(nodes[i].op == "batch_norm" for i in path if chosen[0] <= i <= chosen[-1])
