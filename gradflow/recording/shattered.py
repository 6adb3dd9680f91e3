"""Whether nearby inputs get alike gradients: two more passes, at x and at x plus a little noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from gradflow.recording.leaves import tensor_leaves
from gradflow.recording.losses import probe_loss
from gradflow.recording.seeding import random_state_kept, seed_everything
from gradflow.recording.snapshot import preserved
from gradflow.recording.steps import blamed_on
from gradflow.recording.target import Batch, Target
from gradflow.trace_model import Trace

NOISE = 0.1
"""Of the RMS of what is moved; C of other sizes cannot be compared with the limits."""
NOT_MEASURED = "gradients side by side not measured: no input with a row a sample gets one that is finite"


def with_correlation(target: Target, trace: Trace, *, seed: int = 0, mode: str | None = None) -> Trace:
    """Add C to a trace: the mean over samples of cos(dL/dx at x, dL/dx at x'); a note where it has none.

    Raises:
        ModelError: The model raised.
    """
    batch = target.batches[0]
    given = [tensor for _, tensor in tensor_leaves((batch.args, dict(batch.kwargs)))]
    with random_state_kept(), preserved(target.module, given) as snapshot:
        if mode is not None:
            target.module.train(mode == "train")
        gradients = []
        for noise in (0.0, NOISE):
            gradients.append(_gradients(target, batch, seed, noise, trace.run.batch_size))
            snapshot.restore()
            if mode is not None:
                target.module.train(mode == "train")
    value = _correlation(*gradients)
    notes = trace.run.notes if value is not None else (*trace.run.notes, NOT_MEASURED)
    return replace(trace, gradient_correlation=value, run=replace(trace.run, notes=notes))


@dataclass(slots=True)
class _Moved:
    """Moves tensors by noise, and keeps what their gradients are to be asked of."""

    noise: float
    generator: torch.Generator
    leaves: list[Tensor] = field(default_factory=list)

    def moved(self, tensor: Tensor) -> Tensor:
        """The tensor plus noise, as a leaf of the graph; one that is not floating as it is."""
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or not tensor.dim():
            return tensor
        values = tensor.detach()
        drawn = torch.randn(values.shape, generator=self.generator, device="cpu").to(values)
        rms = values.float().square().mean().sqrt().to(values)
        leaf = (values + self.noise * rms * drawn).requires_grad_()
        self.leaves.append(leaf)
        return leaf


def _gradients(target: Target, batch: Batch, seed: int, noise: float, samples: int) -> list[Tensor]:
    """dL/dx of each moved tensor that has the samples in front, as [samples, elements]."""
    moved = _Moved(noise, torch.Generator().manual_seed(seed))
    module, loss = target.module, probe_loss(seed)
    with torch.inference_mode(False), torch.enable_grad(), blamed_on(module, "forward"):
        args, kwargs = _pytree.tree_map_only(Tensor, moved.moved, (batch.args, dict(batch.kwargs)))
        # Token numbers cannot be moved: what they are looked up as can.
        with _embeddings(module, moved) if not moved.leaves else nullcontext():
            seed_everything(seed)
            outputs = target.forward(module, replace(batch, args=args, kwargs=kwargs))
        total = loss.compute(outputs, batch)
        wanted = [leaf for leaf in moved.leaves if leaf.shape[0] == samples]
        if not wanted or not total.requires_grad:
            return []
        found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [gradient.float().flatten(1) for gradient in found if gradient is not None]


@contextmanager
def _embeddings(module: nn.Module, moved: _Moved) -> Iterator[None]:
    """Move what every embedding returns."""

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return moved.moved(output)

    handles = [m.register_forward_hook(hook) for m in module.modules() if isinstance(m, nn.Embedding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _correlation(here: list[Tensor], there: list[Tensor]) -> float | None:
    """The mean over samples of the cosine; None where no gradient arrives, or none is finite."""
    if not here or len(here) != len(there):
        return None
    cosine = torch.nn.functional.cosine_similarity(torch.cat(here, 1), torch.cat(there, 1), dim=1, eps=1e-30)
    lengths = torch.cat(here, 1).norm(dim=1) * torch.cat(there, 1).norm(dim=1)
    kept = cosine[(lengths > 0) & torch.isfinite(lengths)]
    value = float(kept.mean()) if kept.numel() else math.nan
    return None if math.isnan(value) else value
