"""Dataflow graph -> the trunk: the tensors that carry the gradient from the loss back to the input.

The trunk follows the longest path from an input to the loss, counted in weight layers, each parameter once (a
cell looped over time, or a block applied again, is one layer: time is not depth). Along it stand the outputs
of the residual adds where they make up most of the path, else those of the weight layers; branch internals,
the head, and whatever comes after a reduction that every path goes through (global pooling, taking the class
token) are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gradflow.recording.dataflow import INPUT_OP, Node
from gradflow.recording.residual import Site, residual_sites
from gradflow.recording.weight_ops import is_weight_op, weights_of

_REDUCTIONS = """
mean sum amax max logsumexp median adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d _adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d
__getitem__ select index_select gather narrow
"""
REDUCTIONS = frozenset(_REDUCTIONS.split())
REDUCES_TO = 0.25
"""A reduction keeps at most this share of the elements of what it reduces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkPath:
    """The nodes that make the trunk, first to last."""

    kind: str
    """"residual", "weights" or "none"."""
    nodes: tuple[int, ...]
    batch_norm: bool


def find_trunk(nodes: Sequence[Node], end: int | None) -> TrunkPath:
    """Find the trunk of a forward that ends at node ``end``, the loss."""
    if end is None:
        return TrunkPath(kind="none", nodes=(), batch_norm=False)
    path = _longest_path(nodes, end)
    path = path[: _reduction_on(path, nodes, end)]
    sites = _main_level([site for site in residual_sites(nodes) if site.node in set(path)])
    adds = [site.node for site in sites]
    outside = _outside_branches(_weight_nodes(path, nodes), sites)
    residual = len(adds) >= 2 and len(outside) <= len(adds) + 1
    chosen = adds if residual else _mixed(path, nodes, adds, outside)
    kind = "residual" if residual else "weights"
    return TrunkPath(
        kind=kind if len(chosen) > 1 else "none",
        nodes=tuple(chosen),
        batch_norm=_crosses_batch_norm(path, nodes, chosen),
    )


def _weight_nodes(path: Sequence[int], nodes: Sequence[Node]) -> list[int]:
    """Weight layers on the path, each parameter's first use only."""
    seen: set[frozenset[int]] = set()
    found = []
    for index in path:
        if is_weight_op(nodes[index], nodes):
            weights = weights_of(nodes[index], nodes)
            if weights not in seen:
                found.append(index)
            seen.add(weights)
    return found


def _mixed(
    path: Sequence[int], nodes: Sequence[Node], adds: Sequence[int], outside: Sequence[int]
) -> list[int]:
    """Weight layers that are no branch internals, with the adds among them, without the head."""
    points = sorted({*adds, *outside})
    ends_in_weight = bool(points) and points[-1] not in adds and _is_head(points[-1], path, nodes)
    return points[:-1] if ends_in_weight and len(points) > 2 else points


def _is_head(index: int, path: Sequence[int], nodes: Sequence[Node]) -> bool:
    """No weight layer comes after it on the path."""
    return not any(is_weight_op(nodes[i], nodes) for i in path if i > index)


def _longest_path(nodes: Sequence[Node], end: int) -> list[int]:
    """The path from an input (or, failing that, a parameter) to ``end`` through most weight layers."""
    score: dict[int, int] = {}
    previous: dict[int, int | None] = {}
    used: set[frozenset[int]] = set()
    any_data = nodes[end].from_data
    for node in nodes[: end + 1]:
        if any_data and not node.from_data:
            continue
        weight = 0
        if is_weight_op(node, nodes):
            weights = weights_of(node, nodes)
            weight = weights not in used
            used.add(weights)
        # Of equally deep origins the latest is taken: the branch, rather than the skip past it.
        origin = max((i for i in node.inputs if i in score), key=lambda i: (score[i], i), default=None)
        score[node.index] = weight + (score[origin] if origin is not None else 0)
        previous[node.index] = origin
    path = []
    step: int | None = end
    while step is not None:
        path.append(step)
        step = previous.get(step)
    return path[::-1]


def _reduction_on(path: Sequence[int], nodes: Sequence[Node], end: int) -> int:
    """Where the path meets its first reduction that no path to the loss goes around; its length if none."""
    for position in range(1, len(path)):
        node, before = nodes[path[position]], nodes[path[position - 1]]
        if node.op not in REDUCTIONS or not node.requires_grad or not before.shape.numel():
            continue
        if len(before.shape) < 3 or node.shape.numel() > REDUCES_TO * before.shape.numel():
            continue
        if _keeps_spatial(before.shape, node.shape):
            continue
        if _is_bottleneck(node.index, before.index, nodes, end):
            return position
    return len(path)


def _keeps_spatial(before: Sequence[int], after: Sequence[int]) -> bool:
    """A pool that only shrinks the grid is no reduction."""
    return len(after) == len(before) and sum(size > 1 for size in after[2:]) == sum(
        size > 1 for size in before[2:]
    )


def _is_bottleneck(index: int, source: int, nodes: Sequence[Node], end: int) -> bool:
    """True where no path from ``source`` to ``end`` goes around ``index``."""
    reached = {source}
    for node in nodes[source + 1 : end + 1]:
        if node.index != index and any(i in reached for i in node.inputs):
            reached.add(node.index)
    return end not in reached


def _main_level(sites: Sequence[Site]) -> list[Site]:
    """Of nested residuals the level with most adds, the outermost of equals."""
    depth = {site: sum(_inside(site, other) for other in sites) for site in sites}
    if not depth:
        return []
    counts = Counter(depth.values())
    level = max(counts, key=lambda d: (counts[d], -d))
    return [site for site in sites if depth[site] == level]


def _inside(inner: Site, outer: Site) -> bool:
    return inner != outer and outer.source <= inner.source and inner.node < outer.node


def _outside_branches(weights: Sequence[int], sites: Sequence[Site]) -> list[int]:
    return [i for i in weights if not any(site.source < i < site.node for site in sites)]


def _crosses_batch_norm(path: Sequence[int], nodes: Sequence[Node], chosen: Sequence[int]) -> bool:
    if not chosen:
        return False
    return any(nodes[i].op == "batch_norm" for i in path if chosen[0] < i < chosen[-1])


def roots(nodes: Sequence[Node]) -> tuple[int, ...]:
    """The inputs of the model."""
    return tuple(node.index for node in nodes if node.op == INPUT_OP)
