"""``gradflow.inspect(model, inputs, loss)``: objects from a person's own session -> Target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradflow.errors import TargetError
from gradflow.recording.batches import fitted, read_batches
from gradflow.recording.input_inference import infer_inputs
from gradflow.recording.losses import function_loss, returned_loss
from gradflow.recording.signatures import forward_signature
from gradflow.recording.target_types import Batch, Target
from gradflow.recording.trial import unwrapped


def target_from_objects(
    module: nn.Module,
    inputs: Any = None,
    loss: Callable[..., Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Target:
    """Make a target of objects.

    Args:
        module: The model, wrapped or not.
        inputs: A tensor, a tuple of positional arguments, a dict of keyword arguments, or an iterable of such
            batches; None infers them.
        loss: ``loss(outputs, inputs)`` -> scalar tensor, with ``inputs`` as they were given. Without it the
            output's own ``.loss``, else the probe.
        optimizer: The one that updates the model.
        name: For the header; the class name without it.
        seed: Of the probe, and of inferred inputs.

    Raises:
        TargetError: ``module`` is no nn.Module.
        InputError: The inputs are of no such kind.
    """
    if not isinstance(module, nn.Module):
        raise TargetError(f"the model is a {type(module).__name__}, not an nn.Module; give an instance")
    batches, source = _batches(module, inputs, seed)
    return Target(
        name=name or type(unwrapped(module)).__name__,
        module=module,
        batches=batches,
        inputs_from=source,
        loss=returned_loss(seed) if loss is None else function_loss(loss, _name_of(loss)),
        forward=lambda model, batch: model(*batch.args, **batch.kwargs),
        optimizer=optimizer,
    )


def _batches(module: nn.Module, inputs: Any, seed: int) -> tuple[tuple[Batch, ...], str]:
    if inputs is None:
        inferred = infer_inputs(module, seed=seed)
        return (Batch(args=inferred.args, kwargs=inferred.kwargs, lone=len(inferred.args) == 1),), "inferred"
    signature = forward_signature(module)
    return tuple(fitted(batch, signature) for batch in read_batches(inputs, "inputs")), "given"


def _name_of(loss: Callable[..., Any]) -> str:
    name = getattr(loss, "__name__", type(loss).__name__)
    return "the given loss" if name == "<lambda>" else f"{name}()"
