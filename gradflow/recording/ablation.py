"""What a model would do without a branch: one forward for each, the branch's output replaced by zeros at its add.

A site is found again by the calls that add it (``op_calls``): a run is first recorded to know them, then repeated
with the same seed and inputs. What is zeroed is the operand, after the branch has run, so that random numbers,
batch statistics and everything before the add are those of the whole model, and the skip stays what it is.
"""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradflow.errors import GradflowError, UsageError
from gradflow.recording.dataflow import Node
from gradflow.recording.garbage import collect_young, collection_paused
from gradflow.recording.leaves import floating_leaves
from gradflow.recording.op_calls import CallLog, OpCall, SeenCall, Zeroing
from gradflow.recording.recorder import Recorder
from gradflow.recording.residual_ops import SUM_OPS, VALUE_OPS
from gradflow.recording.seeding import seed_everything
from gradflow.recording.steps import Job, blamed_on
from gradflow.recording.target import Batch
from gradflow.trace_model import Ablation, BranchAblation, Removal, ResidualRecord

KINDS = ("identity", "projection", "scaled")
"""Sites whose skip stays a stream without the branch."""
ORDERS = ("each", "greedy")

SiteKey: TypeAlias = tuple[str, int, int]
"""Name, call and index of a site, as in its record."""
Zeros: TypeAlias = Mapping[OpCall, frozenset[int]]
"""For each call, which of its tensors to replace."""

_BETWEEN_COLLECTIONS = 32
"""Forwards: whoever records may have the collector wait, and thousands of graphs are not to wait with it."""
_SUMS = SUM_OPS | VALUE_OPS | {"stack"}
_UNMATCHED = "its add was not found again when the step was repeated"
_PRODUCTS = frozenset({"addcmul", "addcdiv", "addmm", "baddbmm", "addbmm", "addmv", "addr"})
"""They add a tensor and a product of two, either of which may hold the skip. Of ``lerp`` the third is a weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationRequest:
    """What to ablate, and who hears of it.

    Attributes:
        order: "each" branch by itself, or also the "greedy" order of removal.
        most: Stop the greedy order after so many removals; None for all.
        announce: Told once, before anything runs, how much there is to run.
        count: Told of each forward that is done, and of how many there are.
    """

    order: str = "each"
    most: int | None = None
    announce: Callable[[str], None] = lambda phrase: None
    count: Callable[[int, int], None] = lambda done, total: None


def requested(order: str | None, most: int | None) -> AblationRequest | None:
    """The request of an option; None for none.

    Raises:
        UsageError: There is no such order, or only the greedy one can stop early.
    """
    if order is None and most is None:
        return None
    if order is not None and order not in ORDERS:
        raise UsageError(f"ablate={order!r}: it is one of {', '.join(map(repr, ORDERS))}, or None")
    if most is not None and (order != "greedy" or most < 1):
        raise UsageError(f"ablate_top={most} stops the greedy order: give ablate='greedy', and at least 1")
    return AblationRequest(order=order or "each", most=most)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What one forward came to."""

    loss: float
    """NaN for a probe, whose number means nothing."""
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """One batch and seed, with the whole model's outcome."""

    batch: Batch
    seed: int
    whole: _Outcome
    zeros: Mapping[SiteKey, Zeros]
    """How to ablate each site that was found."""
    unrest: float
    """What two runs of the whole model differ by, of their output; 0 for a model that repeats itself."""
    seconds: float
    """Of one plain run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Effect:
    """What ablation changed, a number a sample; or why nothing is known."""

    changes: tuple[float, ...] = ()
    output_changes: tuple[float, ...] = ()
    note: str = ""

    @property
    def harm(self) -> float:
        """What the greedy order takes the least of."""
        values = self.changes or self.output_changes
        mean = math.fsum(values) / len(values) if values else math.nan
        return mean if math.isfinite(mean) else math.inf


def ablate(
    job: Job, residuals: Sequence[ResidualRecord], steps: int, seed: int, request: AblationRequest
) -> Ablation | None:
    """Run the model without each branch, and put it back as it was.

    Args:
        job: What was recorded.
        residuals: The sites of that recording.
        steps: As they were asked for; of several batches each is run at least once.
        seed: Of the first sample; sample k runs with ``seed + k``.
        request: What to do.

    Returns:
        None where there is no site whose branch can be left out.
    """
    sites = [site for site in residuals if site.kind in KINDS]
    if not sites:
        return None
    samples = _samples(job, steps, seed)
    total = _forwards(len(sites), len(samples), request)
    request.announce(_announcement(len(sites), samples, total, request))
    bench = _Bench(job, samples, total, request.count)
    effects = {site.order: bench.effect((_key(site),)) for site in sites}
    greedy = request.order == "greedy"
    removals, lost = _greedy(bench, sites, effects, request.most) if greedy else ((), ())
    return Ablation(
        order=request.order,
        measure="output" if _is_probe(job) else "loss",
        varied=_varied(job, samples),
        losses=() if _is_probe(job) else tuple(sample.whole.loss for sample in samples),
        branches=tuple(
            BranchAblation(
                order=order,
                changes=effect.changes,
                output_changes=effect.output_changes,
                note=effect.note,
            )
            for order, effect in effects.items()
        ),
        removals=removals,
        forwards=bench.done,
        notes=(*_notes(samples, steps), *lost),
    )


def _key(site: ResidualRecord) -> SiteKey:
    return site.name, site.call, site.index


def _is_probe(job: Job) -> bool:
    return job.target.loss.settled().is_probe


def _samples(job: Job, steps: int, seed: int) -> tuple[_Sample, ...]:
    batches = job.target.batches
    count = max(steps, len(batches))
    samples = tuple(_sample(job, batches[at % len(batches)], seed + at) for at in range(count))
    return samples[:1] if len(batches) == 1 and _all_alike(samples) else samples


def _all_alike(samples: Sequence[_Sample]) -> bool:
    """The seed changes nothing: runs of it are one sample, and say nothing of any noise."""
    first = samples[0].whole
    return all(_same(first, sample.whole) for sample in samples)


def _same(one: _Outcome, other: _Outcome) -> bool:
    same_loss = one.loss == other.loss or (math.isnan(one.loss) and math.isnan(other.loss))
    return same_loss and _output_change(one, other) in (0.0, None)


@collection_paused()
def _sample(job: Job, batch: Batch, seed: int) -> _Sample:
    """Run the whole model twice: recorded, to know which calls add what, and plain, to compare with."""
    watching = Recorder(job.layout, batch_size=job.batch_size)
    log = CallLog(watching.dataflow, watching.hooks)
    modes = (watching, watching.forward((batch.args, dict(batch.kwargs))), log)
    recorded = _forward(job, batch, seed, modes)
    zeros = _zeros_by_site(watching, log)
    started = time.perf_counter()
    whole = _forward(job, batch, seed)
    return _Sample(
        batch=batch,
        seed=seed,
        whole=whole,
        zeros=zeros,
        unrest=_output_change(whole, recorded) or 0.0,
        seconds=time.perf_counter() - started,
    )


def _forward(
    job: Job, batch: Batch, seed: int, modes: Iterable[AbstractContextManager[Any]] = ()
) -> _Outcome:
    """Run the model and its loss as a recorded step does, gradients and all: some layers run other code without."""
    probe = _is_probe(job)
    job.snapshot.clear_gradients()
    seed_everything(seed)
    try:
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            with blamed_on(job.module, "forward"):
                outputs = job.target.forward(job.module, batch)
            leaves = tuple(leaf.detach().clone() for _, leaf in floating_leaves(outputs))
            with blamed_on(job.module, "loss"):
                loss = math.nan if probe else float(job.target.loss.compute(outputs, batch).detach().item())
        return _Outcome(loss=loss, outputs=leaves)
    finally:
        job.snapshot.restore()


def _zeros_by_site(watching: Recorder, log: CallLog) -> dict[SiteKey, Zeros]:
    found: dict[SiteKey, Zeros] = {}
    counts: Counter[tuple[str, int]] = Counter()
    for index in sorted(watching.sites.sites):
        site = watching.sites.sites[index]
        where = (watching.dataflow.nodes[index].module, site.call)
        zeros = _zeros(site.node, site.handed, log.made, watching.dataflow.nodes)
        if zeros is not None and site.found.kind in KINDS:
            found[*where, counts[where]] = zeros
        counts[where] += 1
    return found


def _zeros(
    index: int, skip: int, made: Mapping[int, SeenCall], nodes: Sequence[Node]
) -> dict[OpCall, frozenset[int]] | None:
    """The calls that add a branch to the skip, back from the sum: of ``(x + a) + b`` both; None if unclear."""
    seen = made.get(index)
    if seen is None:
        return None
    if skip in seen.nodes:
        return {seen.call: _others(seen, seen.nodes.index(skip))}
    for at, origin in enumerate(seen.nodes):
        if origin is not None and skip < origin < index and nodes[origin].op in _SUMS:
            earlier = _zeros(origin, skip, made, nodes)
            if earlier is not None:
                others = _others(seen, at)
                return {**earlier, seen.call: others} if others else earlier
    return None


def _others(seen: SeenCall, kept: int) -> frozenset[int]:
    """Which operands bring the branch, where one of the call's operands brings the skip."""
    op = seen.call.op.strip("_")
    if op in _PRODUCTS:
        return frozenset((1, 2)) if kept == 0 else frozenset((0,))
    return frozenset(range(2 if op == "lerp" else len(seen.nodes))) - {kept}


class _Bench:
    """Runs the samples with branches left out, and compares."""

    def __init__(
        self, job: Job, samples: Sequence[_Sample], total: int, count: Callable[[int, int], None]
    ) -> None:
        self.done = 0
        self._job = job
        self._samples = samples
        self._total = total
        self._count = count

    def effect(self, keys: Sequence[SiteKey]) -> _Effect:
        """What leaving these branches out together changes; the last of them is the one that is asked about."""
        changes, output_changes = [], []
        for sample in self._samples:
            outcome = self._without(sample, keys)
            self.done += 1
            self._count(self.done, self._total)
            if self.done % _BETWEEN_COLLECTIONS == 0:
                gc.collect()
            if isinstance(outcome, str):
                return _Effect(note=outcome)
            if not _is_probe(self._job):
                changes.append(outcome.loss - sample.whole.loss)
            output_change = _output_change(sample.whole, outcome)
            if output_change is not None:
                output_changes.append(output_change)
        complete = len(output_changes) == len(self._samples)
        return _Effect(changes=tuple(changes), output_changes=tuple(output_changes) if complete else ())

    @collection_paused()
    def _without(self, sample: _Sample, keys: Sequence[SiteKey]) -> _Outcome | str:
        """Run a sample without the branches; a sentence where that cannot be done."""
        if any(key not in sample.zeros for key in keys):
            return _UNMATCHED
        collect_young()
        wanted = {call: at for key in keys for call, at in sample.zeros[key].items()}
        zeroing = Zeroing(self._job.layout, wanted)
        try:
            outcome = _forward(self._job, sample.batch, sample.seed, (zeroing,))
        except GradflowError as error:
            return f"without it the model raises: {error}"
        return _UNMATCHED if zeroing.missed else outcome


def _output_change(whole: _Outcome, other: _Outcome) -> float | None:
    """||y - y'|| / ||y|| over all floating outputs; None where they are not of the same shapes, or all zero."""
    if [y.shape for y in whole.outputs] != [y.shape for y in other.outputs]:
        return None
    pairs = zip(whole.outputs, other.outputs, strict=True)
    moved = math.sqrt(math.fsum(_square(_wide(before) - _wide(after)) for before, after in pairs))
    norm = math.sqrt(math.fsum(_square(output) for output in whole.outputs))
    return moved / norm if norm > 0 or math.isnan(norm) else None


def _square(values: Tensor) -> float:
    return float(_wide(values).abs().square().sum().item())


def _wide(values: Tensor) -> Tensor:
    dense = values if values.layout is torch.strided else values.to_dense()
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64)


def _greedy(
    bench: _Bench, sites: Sequence[ResidualRecord], alone: Mapping[int, _Effect], most: int | None
) -> tuple[tuple[Removal, ...], tuple[str, ...]]:
    """Leave out the branch that does the least harm, then of the others again, with those before left out too.

    Returns:
        The removals, and a sentence for each branch that could not be followed to the end.
    """
    keys = {site.order: _key(site) for site in sites}
    names = {site.order: site.name for site in sites}
    effects = {order: effect for order, effect in alone.items() if not effect.note}
    removals: list[Removal] = []
    lost: list[str] = []
    limit = len(effects) if most is None else min(most, len(effects))
    while effects and len(removals) < limit:
        order = min(effects, key=lambda candidate: effects[candidate].harm)
        chosen = effects.pop(order)
        removals.append(Removal(order=order, changes=chosen.changes, output_changes=chosen.output_changes))
        if len(removals) == limit:
            break
        gone = [keys[removal.order] for removal in removals]
        again = {candidate: bench.effect((*gone, keys[candidate])) for candidate in effects}
        lost += [
            _lost(names[candidate], len(gone), effect) for candidate, effect in again.items() if effect.note
        ]
        effects = {candidate: effect for candidate, effect in again.items() if not effect.note}
    return tuple(removals), tuple(lost)


def _lost(name: str, removed: int, effect: _Effect) -> str:
    return f"{name or 'the model'} left the greedy order after {removed} removals: {effect.note}"


def _forwards(sites: int, samples: int, request: AblationRequest) -> int:
    """Forwards with something left out: L for each, and L - r more after the r-th removal."""
    rounds = sites if request.most is None else min(request.most, sites)
    more = sum(sites - removed for removed in range(1, rounds)) if request.order == "greedy" else 0
    return samples * (sites + more)


def _announcement(sites: int, samples: Sequence[_Sample], total: int, request: AblationRequest) -> str:
    what = "greedy ablation" if request.order == "greedy" else "ablation"
    seconds = total * math.fsum(sample.seconds for sample in samples) / len(samples)
    count = f"{sites:,} branches" if sites != 1 else "1 branch"
    on = f" on {len(samples)} samples" if len(samples) > 1 else ""
    return f"{what} of {count}{on}: {total:,} forwards, about {_duration(seconds)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _varied(job: Job, samples: Sequence[_Sample]) -> str:
    if len(samples) == 1:
        return ""
    return "batches" if len(job.target.batches) > 1 else "seeds"


def _notes(samples: Sequence[_Sample], steps: int) -> tuple[str, ...]:
    notes = []
    if len(samples) == 1 < steps:
        notes.append(
            "the seed changes nothing here, so the steps are one sample: only other batches would tell of noise"
        )
    unrest = max(sample.unrest for sample in samples)
    if unrest > 0:
        notes.append(
            f"two runs of the whole model with one seed differ by {unrest:.2g} of their output: smaller changes "
            "mean nothing"
        )
    return tuple(notes)
