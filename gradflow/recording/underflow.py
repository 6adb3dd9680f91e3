"""Gradients that half precision flushes to zero: the same backward again, from a larger loss.

A power of two scales every gradient without rounding it. What was zero before and is not afterwards had
underflowed; what overflows at one scale is looked at with a smaller one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gradflow.recording.records import StepRecord
from gradflow.recording.seeding import seed_everything
from gradflow.recording.steps import Job, blamed_on
from gradflow.recording.target import Batch

SCALES = (2.0**12, 2.0**6)
"""Of the loss, largest first: a parameter is judged by the first at which its gradient is finite."""


def with_underflow(job: Job, median: StepRecord, batch: Batch, seed: int) -> StepRecord:
    """Add to a step's parameters the share of their gradient that underflows, where float16 is in use."""
    dtypes = {row.dtype for row in median.layers} | {row.dtype for row in median.parameters}
    if "float16" not in dtypes or job.target.loss.settled().is_probe:
        return median
    shares = _shares(job, batch, seed)
    parameters = tuple(replace(row, underflow=shares.get(row.name)) for row in median.parameters)
    return replace(median, parameters=parameters)


def _shares(job: Job, batch: Batch, seed: int) -> dict[str, float]:
    """Share of the elements with a gradient that is zero as it is and is not from a larger loss, by name."""
    found: dict[str, float] = {}
    plain = _gradients(job, batch, seed, 1.0)
    for scale in SCALES:
        if all(name in found for name in plain):
            break
        for name, larger in _gradients(job, batch, seed, scale).items():
            if name in found or name not in plain or not bool(torch.isfinite(larger).all()):
                continue
            asked = int(torch.count_nonzero(larger).item())
            if asked:
                lost = (plain[name] == 0) & (larger != 0)
                found[name] = torch.count_nonzero(lost).item() / asked
    return found


def _gradients(job: Job, batch: Batch, seed: int, scale: float) -> dict[str, Tensor]:
    """Dense gradients by name, from ``scale`` times the loss; the model is put back."""
    job.snapshot.clear_gradients()
    seed_everything(seed)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with blamed_on(job.module, "forward"):
                outputs = job.target.forward(job.module, batch)
            with blamed_on(job.module, "loss"):
                loss = job.target.loss.compute(outputs, batch)
            if loss.requires_grad:
                with blamed_on(job.module, "backward"):
                    # A float16 loss times the scale could overflow before backward begins.
                    loss.backward(torch.full_like(loss, scale))  # type: ignore[no-untyped-call]
        gradients = ((item.names[0], item.parameter.grad) for item in job.layout.parameters)
        return {n: g.detach() for n, g in gradients if g is not None and g.layout is torch.strided}
    finally:
        job.snapshot.restore()
