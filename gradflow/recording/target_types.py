"""What the rest of gradflow knows of a target: its batches, its loss, how it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The arguments of one forward call. A tuple of inputs is positional, a dict is keyword arguments."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]
    lone: bool = False
    """The user gave one value, not a tuple of one: ``loss(outputs, inputs)`` gets it back so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """How the outputs become the scalar that backward starts from."""

    description: str
    """For the header: "probe", "cross-entropy (random targets)", "loss() of model.py"."""
    compute: Callable[[Any, Batch], torch.Tensor]
    """``compute(outputs, batch)`` -> scalar tensor. Raises LossError for anything else."""
    is_probe: bool = False
    settle: Callable[[], Loss] | None = None
    """Set where only a step tells what the loss is (whether the model returns one, how many are summed)."""

    def settled(self) -> Loss:
        """Return the loss as it turned out to be: itself, or after ``compute`` ran, the one it ran."""
        return self.settle() if self.settle is not None else self


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model that can be run: what ``execution.record`` takes."""

    name: str
    """As given on the command line, or the class name."""
    module: nn.Module
    batches: tuple[Batch, ...]
    """One a step, reused in turn when there are more steps; never empty."""
    inputs_from: str
    loss: Loss
    forward: Callable[[nn.Module, Batch], Any]
    """``forward(module, batch)`` -> outputs; Lightning's training_step stands in here."""
    optimizer: torch.optim.Optimizer | None = None
    notes: tuple[str, ...] = ()
    checkpoint: str | None = None
    """The file that its weights were loaded from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """What the command line says about the target; empty values leave the choice to the contracts' order."""

    inputs: tuple[str, ...] = ()
    """``--input`` specifications: "8x3x32x32", "ids=4x128:int64:0..999"."""
    loss: str | None = None
    batch_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    checkpoint: str | None = None
    mode: str | None = None
    """"train", "eval", or None for as found."""


def user_inputs(batch: Batch) -> Any:
    """Return the inputs in the form in which they were given: a value, a tuple or a dict."""
    if batch.kwargs:
        return {**{str(i): arg for i, arg in enumerate(batch.args)}, **batch.kwargs}
    return batch.args[0] if batch.lone and len(batch.args) == 1 else batch.args
