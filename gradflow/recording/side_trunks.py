"""Dataflow graph -> the trunks beside the main one: towers of further inputs, outputs and branches.

A model with two inputs, an encoder and a decoder, or a second head has layers that no path through the main
trunk meets. The path to the loss through most of them is followed, then the path through most of what is left,
until fewer than ``FEWEST`` are. Branches of residual sites stay out, as they do of the main trunk.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from gradflow.recording.dataflow import Node
from gradflow.recording.residual_recorder import Site
from gradflow.recording.trunk import (
    LOW_RANK,
    Spans,
    TrunkPath,
    crosses_batch_norm,
    is_head,
    layer_nodes,
    longest_path,
    reduction_on,
)
from gradflow.recording.weight_ops import is_weight_op, weights_of

FEWEST = 3
"""Fewer tensors of their own make no trunk: a gate, a time embedding, a head."""
FEWEST_OF_A_HEAD = 5
"""A head of a few layers, drawn small on purpose, is no trunk either."""
MOST = 8
"""Side trunks that are looked for, longest first."""


def find_side_trunks(
    nodes: Sequence[Node], end: int | None, sites: Sequence[Site], main: TrunkPath
) -> tuple[TrunkPath, ...]:
    """Find the trunks beside ``main`` of a forward that ends at node ``end``, the loss; longest first."""
    if end is None or not main.path:
        return ()
    met = _met(main)
    open_ = _candidates(nodes, end, sites, met)
    found: list[TrunkPath] = []
    for _ in range(MOST):
        if len(open_) < FEWEST:
            break
        whole = longest_path(nodes, end, counted=open_)
        reduction = whole[reduction_on(whole, nodes, end) :][:1]
        own = _longest_run(whole, open_, met.union(reduction))
        side = _side(own, open_, whole, nodes, sites)
        found += [side] if side is not None and not _is_short_head(side, main) else []
        open_ -= set(own) or set(whole)
    return tuple(found)


def _is_short_head(side: TrunkPath, main: TrunkPath) -> bool:
    """It follows the trunk's last tensor on its own path, and has few layers."""
    behind = main.nodes[-1:] and main.nodes[-1] < side.nodes[0] and main.nodes[-1] in side.path
    return bool(behind) and len(side.nodes) < FEWEST_OF_A_HEAD


def _met(main: TrunkPath) -> set[int]:
    """The nodes of the main path between the trunk's ends: before may lie a whole encoder, behind a deep head."""
    if not main.nodes:
        return set(main.path)
    return {i for i in main.path if main.nodes[0] <= i <= main.nodes[-1]} | set(main.nodes)


def _longest_run(path: Sequence[int], wanted: Collection[int], met: Collection[int]) -> list[int]:
    """The stretch of a path with most wanted nodes in a row, nothing of the main path or a reduction between them."""
    runs: list[list[int]] = [[]]
    counts = [0]
    for i in path:
        if i in met:
            runs.append([])
            counts.append(0)
        elif i in wanted or runs[-1]:
            runs[-1].append(i)
            counts[-1] += i in wanted
    return max(zip(counts, runs, strict=True), key=lambda run: run[0])[1]


def _candidates(nodes: Sequence[Node], end: int, sites: Sequence[Site], met: Collection[int]) -> set[int]:
    """Adds and weight layers that the main path does not meet and no residual branch holds.

    What runs again with weights of the main path (a step in time, the other tower of a siamese net) is no
    layer of its own, and what no gradient reaches carries none.
    """
    streams = [site for site in sites if site.found.kind != LOW_RANK and site.node <= end]
    held = Spans(streams)
    adds = {site.node for site in streams if not held.hold(site.node)}
    weighty = [nodes[i] for i in met if is_weight_op(nodes[i], nodes)]
    used = {weight for node in weighty for weight in weights_of(node, nodes)}
    layers = {
        node.index
        for node in nodes[: end + 1]
        if node.requires_grad
        and node.from_data
        and is_weight_op(node, nodes)
        and not held.hold(node.index)
        and not used & weights_of(node, nodes)
    }
    return (adds | layers) - set(met)


def _side(
    run: Sequence[int],
    wanted: Collection[int],
    whole: Sequence[int],
    nodes: Sequence[Node],
    sites: Sequence[Site],
) -> TrunkPath | None:
    """The adds and weight layers of a stretch of a path; None for too few."""
    sums = {site.node for site in sites}
    adds = [i for i in run if i in sums]
    # A layer may be told by the normalisation right behind it.
    own = {i for before, i in pairwise(run) if before in wanted} | set(wanted)
    layers = [i for i in layer_nodes(run, nodes, ()) if i in own and i not in sums]
    residual = len(adds) >= 2 and len(layers) <= len(adds) + 1
    chosen = adds if residual else sorted({*adds, *layers})
    if not residual and len(chosen) > FEWEST and chosen[-1] not in sums and is_head(chosen[-1], whole, nodes):
        chosen = chosen[:-1]
    if len(chosen) < FEWEST:
        return None
    return TrunkPath(
        kind="residual" if residual else "weights",
        nodes=tuple(chosen),
        batch_norm=crosses_batch_norm(whole, nodes, chosen),
        path=tuple(whole),
    )
