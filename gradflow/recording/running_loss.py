"""The loss of a step with the running statistics of its batch normalisations: what evaluation will see."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from gradflow.errors import ModelError
from gradflow.recording.records import StepRecord
from gradflow.recording.seeding import seed_everything
from gradflow.recording.steps import Job, blamed_on, scalar_loss
from gradflow.recording.target import Batch
from gradflow.trace_model import ENOUGH_UPDATES, RunInfo

NOT_MEASURED = (
    "the loss with running statistics was not measured: the model raised with its batch norms in eval mode"
)


def with_running_loss(run: RunInfo, job: Job, step: StepRecord, batch: Batch, seed: int) -> RunInfo:
    """Run the forward of a step again, the same but for what its batch normalisations normalise with.

    Only these are put in eval mode: dropout draws the masks that it drew, so that nothing else differs. Nothing is run
    where there is no loss to compare with, or no running statistics that have settled.
    """
    try:
        return replace(run, running_loss=_running_loss(job, step, batch, seed))
    except ModelError:
        return replace(run, notes=(*run.notes, NOT_MEASURED))


def _running_loss(job: Job, step: StepRecord, batch: Batch, seed: int) -> float | None:
    settled = any(row.batch_statistics and (row.updates or 0) >= ENOUGH_UPDATES for row in step.batch_norms)
    if not settled or step.loss is None or not math.isfinite(step.loss):
        return None
    for module in job.module.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.eval()
    seed_everything(seed)
    try:
        with torch.inference_mode(False), torch.no_grad():
            with blamed_on(job.module, "forward"):
                outputs = job.target.forward(job.module, batch)
            with blamed_on(job.module, "loss"):
                return float(scalar_loss(job.target.loss.compute(outputs, batch)).item())
    finally:
        job.snapshot.restore()
