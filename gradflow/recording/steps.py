"""One seeded forward and backward of a model that is ready to run."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradflow.errors import GradflowError, LossError
from gradflow.recording import (
    dataflow,
    gradient_hooks,
    gradient_split,
    hooks,
    overwrite_proof,
    recorder,
    residual_recorder,
    residual_sites,
    site_measures,
    tensor_stats,
)
from gradflow.recording.dataflow import Node
from gradflow.recording.failed_adds import explain_failed_add
from gradflow.recording.failures import describe_failure
from gradflow.recording.garbage import collection_paused
from gradflow.recording.layout import ModelLayout
from gradflow.recording.leaves import tensor_leaves
from gradflow.recording.nonfinite import FiniteCheck
from gradflow.recording.overwrite_proof import AccusedSite, OverwriteWitness, Proof
from gradflow.recording.recorder import Recorder
from gradflow.recording.records import StepRecord, step_record
from gradflow.recording.seeding import seed_everything
from gradflow.recording.snapshot import Snapshot
from gradflow.recording.target import Batch, Target
from gradflow.trace_model import NonFiniteOrigin


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A target made ready: unwrapped, with what stays the same over its steps."""

    target: Target
    module: nn.Module
    layout: ModelLayout
    snapshot: Snapshot
    batch_size: int
    optimized: frozenset[int] | None
    """``id`` of each parameter of the optimizer; None where no optimizer is known."""


@collection_paused()
def run_step(job: Job, batch: Batch, seed: int) -> StepRecord:
    """Record one step; the model is put back afterwards."""
    watching = Recorder(job.layout, batch_size=job.batch_size)
    try:
        loss, end = _forward_and_backward(job, watching, batch, seed)
        value = None if job.target.loss.settled().is_probe else float(loss.detach().item())
        return step_record(watching, end=end, loss=value, optimized=job.optimized)
    finally:
        job.snapshot.restore()


@collection_paused()
def find_origins(job: Job, batch: Batch, seed: int) -> tuple[NonFiniteOrigin, ...]:
    """Run a step again, looking at every op, to find who made the first non-finite value."""
    check = FiniteCheck({item.names[0]: item.parameter for item in job.layout.parameters})
    watching = Recorder(job.layout, batch_size=job.batch_size, observer=check.on_op)
    check.look_at_inputs(tensor for _, tensor in tensor_leaves((batch.args, dict(batch.kwargs))))
    handles = check.watch_parameters()
    try:
        _, end = _forward_and_backward(job, watching, batch, seed)
        return check.origins(watching, end)
    finally:
        for handle in handles:
            handle.remove()
        job.snapshot.restore()


@collection_paused()
def prove_overwrites(job: Job, batch: Batch, seed: int, accused: tuple[AccusedSite, ...]) -> dict[int, Proof]:
    """Run the forward of a step again, keeping what accused ops overwrite; proofs by the ``order`` of the site."""
    watching = Recorder(job.layout, batch_size=job.batch_size)
    witness = OverwriteWitness(watching.dataflow, accused)
    seed_everything(seed)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            watching,
            watching.forward((batch.args, dict(batch.kwargs))),
            witness,
            blamed_on(job.module, "forward"),
        ):
            job.target.forward(job.module, batch)
        return witness.proofs
    finally:
        job.snapshot.restore()


def _forward_and_backward(
    job: Job, watching: Recorder, batch: Batch, seed: int
) -> tuple[Tensor, Node | None]:
    with torch.inference_mode(False), torch.enable_grad(), watching:
        loss = forward_and_loss(job, watching, batch, seed)
        end = watching.dataflow.node_of(loss)
        if loss.requires_grad:
            with blamed_on(job.module, "backward"):
                loss.backward()  # type: ignore[no-untyped-call]
    return loss, end


def forward_and_loss(job: Job, watching: Recorder, batch: Batch, seed: int) -> Tensor:
    """Run a seeded forward inside a recorder, and compute the loss."""
    job.snapshot.clear_gradients()
    seed_everything(seed)
    with watching.forward((batch.args, dict(batch.kwargs))):
        with blamed_on(job.module, "forward"), _adds_explained(job.module, watching):
            outputs = job.target.forward(job.module, batch)
        with blamed_on(job.module, "loss"):
            return scalar_loss(job.target.loss.compute(outputs, batch))


@contextmanager
def _adds_explained(module: nn.Module, watching: Recorder) -> Iterator[None]:
    """Turn an add that fails for its shapes into an error that says what would mend it."""
    try:
        yield
    except Exception as error:
        explained = explain_failed_add(error, module, watching.dataflow, watching.sites.graph)
        if explained is None:
            raise
        raise explained from error


def scalar_loss(loss: Tensor) -> Tensor:
    """The loss, if it is one.

    Raises:
        LossError: It is not a tensor of one element.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise LossError(f"the loss is not a scalar tensor but {got}; return loss.mean() or loss.sum()")
    return loss


_WATCHING = tuple(
    str(module.__file__)
    for module in (
        dataflow,
        gradient_hooks,
        gradient_split,
        hooks,
        overwrite_proof,
        recorder,
        residual_recorder,
        residual_sites,
        site_measures,
        tensor_stats,
    )
)
_PASSING_ON = ("__torch_function__", "_traced_apply")
"""Where the model's own ops run inside ours."""


def _raised_by_us(error: BaseException) -> bool:
    """It came out of what watches the model: a bug of gradflow, not the model's fault."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename in _WATCHING and frame.name not in _PASSING_ON for frame in frames)


@contextmanager
def blamed_on(module: nn.Module, phase: str) -> Iterator[None]:
    """Turn what the user's code raises into an error that says where; ours pass."""
    try:
        yield
    except GradflowError:
        raise
    except (Exception, SystemExit) as error:
        if _raised_by_us(error):
            raise
        raise describe_failure(error, module, phase) from error
