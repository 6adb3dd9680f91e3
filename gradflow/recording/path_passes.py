"""The gradient at the start of a stream, by how many branches it came through: exact, one backward for each order.

In pass 0 the loss's gradient runs back, and what arrives at the end of a branch is kept and goes no further: only the
path of skips alone reaches the start. In pass k the loss brings nothing, and what was kept in pass k - 1 starts from
the ends of the branches: what reaches the start has been through exactly k. L branches make 2^L paths and
L + 1 orders, so nothing is enumerated. The forward runs once, as it was recorded; nothing in it is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradflow.recording.garbage import collection_paused
from gradflow.recording.gradient_split import Edge, Ends, pair_products
from gradflow.recording.recorder import Recorder
from gradflow.recording.steps import Job, forward_and_loss
from gradflow.recording.target import Batch
from gradflow.stream_profile import streams
from gradflow.trace_model import PathOrders, ResidualRecord

FEWEST_SITES = 2
"""A stream of one site has two orders, which the split of its gradient already tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathRequest:
    """What to take apart.

    Attributes:
        orders: Take the orders 0 to this one; None for all. What is left out is the remainder.
    """

    orders: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """One entry a stream, longest first, and why there is none where there is none."""

    streams: tuple[PathOrders, ...] = ()
    note: str = ""


@collection_paused()
def record_paths(
    job: Job, batch: Batch, seed: int, residuals: Sequence[ResidualRecord], request: PathRequest
) -> Paths:
    """Run one forward and, for each stream of at least two sites, a backward for each order and one for the whole.

    The gradients that are kept are one for each branch, of its size. No parameter gets a gradient, and the model is
    put back afterwards.

    Args:
        job: What was recorded.
        batch: Of the step to repeat.
        seed: Of that step.
        residuals: The sites of that step, which must be found again.
        request: How far to go.
    """
    watching = Recorder(job.layout, batch_size=job.batch_size, splits=False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with watching:
                loss = forward_and_loss(job, watching, batch, seed)
            watching.probes.armed = False  # these passes bring only parts of the gradients
            return _paths(loss, watching, residuals, request)
    except _BackwardRefused as refusal:
        return Paths(note=f"backward could not be run again: {refusal}")
    finally:
        job.snapshot.restore()


def _paths(
    loss: Tensor, watching: Recorder, residuals: Sequence[ResidualRecord], request: PathRequest
) -> Paths:
    sites = [watching.sites.sites[node] for node in sorted(watching.sites.sites)]
    where = [(watching.dataflow.nodes[site.node].module, site.call) for site in sites]
    if where != [(record.name, record.call) for record in residuals]:
        return Paths(note="the model did not run the same way again")
    if not loss.requires_grad:
        return Paths(note="nothing asks for a gradient")
    ends = {
        record.order: end
        for record, site in zip(residuals, sites, strict=True)
        if site.split is not None and not record.split_note and (end := site.split.ends()) is not None
    }
    chains = [[site.order for site in stream if site.order in ends] for stream in streams(residuals)]
    found = [_stream(loss, chain, ends, request) for chain in chains if len(chain) >= FEWEST_SITES]
    return Paths(streams=tuple(found), note="" if found else "no stream has two sites to tell apart")


def _stream(
    loss: Tensor, orders: Sequence[int], ends: Mapping[int, Ends], request: PathRequest
) -> PathOrders:
    """Take one stream apart."""
    passes = _Passes(
        loss=loss,
        start=ends[orders[0]].start,
        taps=tuple(tap for order in orders for tap in ends[order].branches),
    )
    whole = passes.run()
    rest = whole.clone()
    last = len(orders) if request.orders is None else min(request.orders, len(orders))
    products = []
    with passes.tapped():
        for _ in range(last + 1):
            part = passes.run()
            products.append(pair_products(part, whole).tolist())
            rest -= part
            if not passes.go_on():
                break
    total, remainder = pair_products(whole, rest)[:2].tolist()
    return PathOrders(
        sites=tuple(orders),
        total_norm=math.sqrt(total),
        norms=tuple(math.sqrt(square) for square, _, _ in products),
        inner_products=tuple(both / total if total else math.nan for _, _, both in products),
        remainder_norm=math.sqrt(remainder),
    )


class _BackwardRefused(Exception):
    """Autograd refused, in its own words."""


@dataclass(slots=True, kw_only=True)
class _Passes:
    """Backward passes over one graph, which stays.

    Attributes:
        loss: Where they begin.
        start: Where they end.
        taps: The ends of the branches: what arrives there is kept, and what the pass before kept goes on.
    """

    loss: Tensor
    start: Edge
    taps: tuple[Edge, ...]
    _arrived: dict[Edge, Tensor] = field(default_factory=dict)
    _sent: dict[Edge, Tensor] = field(default_factory=dict)
    _is_first: bool = True

    def run(self) -> Tensor:
        """One pass; returns the gradient at the start.

        Raises:
            _BackwardRefused: Autograd would not.
        """
        cotangent = torch.ones_like(self.loss) if self._is_first else torch.zeros_like(self.loss)
        try:
            (gradient,) = torch.autograd.grad(
                self.loss, [GradientEdge(*self.start)], cotangent, retain_graph=True, materialize_grads=True
            )
        except RuntimeError as error:
            raise _BackwardRefused(str(error).partition("\n")[0]) from error
        return gradient.detach()

    def go_on(self) -> bool:
        """Send on what has arrived; False where nothing has."""
        self._is_first = False
        self._sent, self._arrived = self._arrived, {}
        return any(bool(gradient.any()) for gradient in self._sent.values())

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Hook the ends of the branches."""
        handles = [tap[0].register_prehook(partial(self._exchange, tap)) for tap in self.taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._arrived.clear()
            self._sent.clear()

    def _exchange(self, tap: Edge, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        arrived = gradients[tap[1]]
        if arrived is not None:
            self._arrived[tap] = arrived.detach()
        sent = self._sent.get(tap)
        if sent is None and arrived is not None:
            sent = torch.zeros_like(arrived)
        return (*gradients[: tap[1]], sent, *gradients[tap[1] + 1 :])
