"""What stands around a residual site: the site before it in its stream, and who else reads its inside."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gradflow.recording.dataflow import OPAQUE_OP, Node, ancestors
from gradflow.recording.residual_recorder import Site
from gradflow.recording.residual_sites import between

STREAM_KINDS = ("identity", "projection", "scaled")
"""Kinds whose sum carries a stream on."""


GRADIENT_OP = "grad"
"""``torch.autograd.grad``, called by the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """Which nodes read which, where a gradient comes back from them."""

    nodes: Sequence[Node]
    readers: Sequence[Sequence[int]]
    """Of each node the nodes that read it, on a way to the loss."""
    returning: Collection[int]
    """Nodes that a gradient comes back to."""
    differentiated: Collection[int]
    """Nodes that the model itself took a gradient through, and uses: autograd comes back inside of them."""

    @classmethod
    def of(cls, nodes: Sequence[Node], end: Node | None) -> Readers:
        """Ask a whole step; ``end`` is the node of the loss."""
        reached = ancestors(nodes, None if end is None else end.index)
        returning = frozenset(i for i in reached if nodes[i].requires_grad)
        inner = [ancestors(nodes, i) for i in returning if nodes[i].op == GRADIENT_OP]
        readers: list[list[int]] = [[] for _ in nodes]
        for i in returning:
            for j in nodes[i].inputs:
                readers[j].append(i)
        return cls(
            nodes=nodes, readers=readers, returning=returning, differentiated=frozenset().union(*inner)
        )

    def only_inside(self, site: Site) -> bool:
        """Whether all that is read between source and sum is read there: its gradient then comes from the sum."""
        inside = {*between(site.found.source, site.node, self.nodes)}
        if not inside.isdisjoint(self.differentiated) or self._is_read_unseen(site.found.source, inside):
            return False
        for i in inside - {site.node}:
            if not inside.issuperset(self.readers[i]):
                return False
        return all(inside.issuperset(self._siblings(i)) for i in inside)

    def _is_read_unseen(self, source: int, inside: Collection[int]) -> bool:
        """Something whose ways were not seen goes back to a source: it may lead through the inside of a branch."""
        return any(self.nodes[i].op == OPAQUE_OP and i not in inside for i in self.readers[source])

    def _siblings(self, index: int) -> list[int]:
        """Other outputs of the op that made a node, where a gradient comes back to them."""
        origin = self.nodes[index].inputs
        found = []
        for step in (-1, 1):
            i = index + step
            while 0 <= i < len(self.nodes) and self.nodes[i].inputs is origin:
                if i in self.returning:
                    found.append(i)
                i += step
        return found


def previous_sites(
    sites: Sequence[Site], parents: Sequence[int | None], nodes: Sequence[Node]
) -> list[int | None]:
    """For each site the last one, of the same parent, whose sum its source was made from."""
    sums = {site.node: order for order, site in enumerate(sites) if site.found.kind in STREAM_KINDS}
    latest: list[int] = []
    for node in nodes:
        before = max((latest[i] for i in node.inputs), default=-1)
        latest.append(sums.get(node.index, before))
    found = [latest[site.found.source] for site in sites]
    return [
        order if order >= 0 and site.found.kind in STREAM_KINDS and parents[order] == parents[here] else None
        for here, (site, order) in enumerate(zip(sites, found, strict=True))
    ]
