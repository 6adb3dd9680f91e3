"""TARGET string -> Target: the model, its inputs and its loss, ready to run."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gradflow.errors import TargetError, UsageError
from gradflow.recording.checkpoints import load_checkpoint
from gradflow.recording.declared_inputs import FoundInputs, find_inputs
from gradflow.recording.input_specs import parse_float_dtype, parse_inputs
from gradflow.recording.leaves import tensor_leaves
from gradflow.recording.lightning_bridge import (
    configured_optimizer,
    has_training_step,
    is_lightning,
    training_batch,
    training_loss,
    training_step,
)
from gradflow.recording.losses import function_loss, loss_of_outputs, named_loss, returned_loss
from gradflow.recording.model_choice import BuiltModel, build_model
from gradflow.recording.module_loading import TargetSpec, import_target, parse_spec, user_code
from gradflow.recording.object_target import target_from_objects
from gradflow.recording.seeding import seed_everything
from gradflow.recording.signatures import ForwardSignature, forward_signature
from gradflow.recording.target_types import Batch, Loss, Target, TargetOptions
from gradflow.recording.tracebacks import INFERRED, model_error

__all__ = ["Batch", "Loss", "Target", "TargetOptions", "load_target", "target_from_objects"]


def load_target(spec: str, options: TargetOptions | None = None) -> Target:
    """Import a target, build its model, and settle its inputs, loss and optimizer.

    Args:
        spec: "model.py", "model.py:NAME" or "package.module:NAME".
        options: What the command line says; the contracts' order decides the rest.

    Raises:
        UsageError: The target, its inputs, its checkpoint or an option is not understood.
        ModelError: The file's own code raised.
    """
    options = options or TargetOptions()
    parts = parse_spec(spec)
    device, dtype = _device(options.device), parse_float_dtype(options.dtype) if options.dtype else None
    parse_inputs(options.inputs)  # a typing mistake should not cost an import
    if options.loss is not None:
        named_loss(options.loss, options.seed)
    with user_code(parts):
        seed_everything(options.seed)
        file = import_target(parts)
        sized = _set_batch_size(file, options.batch_size)
        built = build_model(file, parts, options.seed)
        _prepare(built.module, options, device, dtype)
        seed_everything(options.seed)
        cut_to = None if sized else options.batch_size
        found = find_inputs(built, file, options, source=parts.source, cut_to=cut_to, dtype=dtype)
        return _assembled(spec, parts, file, built, found, options)


def _device(text: str | None) -> torch.device | None:
    """Read ``--device``.

    Raises:
        UsageError: There is no such device here; the message lists those there are.
    """
    if text is None:
        return None
    available = _available_devices()
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    name = f"{device.type}:{device.index or 0}" if device.type == "cuda" else device.type
    if name not in available:
        raise UsageError(f"--device {text!r} is not available here; there is {', '.join(available)}")
    return device


def _available_devices() -> list[str]:
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices + (["xpu"] if torch.xpu.is_available() else [])


def _set_batch_size(file: ModuleType, batch_size: int | None) -> bool:
    """Set the file's own ``batch_size``, where it has one; tell whether it has."""
    if batch_size is None:
        return False
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} must be 1 or more")
    if type(getattr(file, "batch_size", None)) is not int:
        return False
    file.batch_size = batch_size  # type: ignore[attr-defined]
    return True


def _prepare(
    module: nn.Module, options: TargetOptions, device: torch.device | None, dtype: torch.dtype | None
) -> None:
    if options.checkpoint is not None:
        load_checkpoint(module, options.checkpoint)
    if device is not None or dtype is not None:
        try:
            module.to(device=device, dtype=dtype)
        except Exception as error:
            raise model_error(error, "moving the model to its device and dtype") from error
    if options.mode is not None:
        module.train(options.mode == "train")


def _assembled(
    spec: str,
    parts: TargetSpec,
    file: ModuleType,
    built: BuiltModel,
    found: FoundInputs,
    options: TargetOptions,
) -> Target:
    optimizer, notes = _optimizer(file, built.module, parts)
    loss = _explicit_loss(parts, file, built, options)
    batches, forward = found.batches, _forward(built.module, found, has_loss=loss is not None)
    if found.source == "inferred" and found.outputs is None:
        forward = _doubting_the_inputs(forward)
    if loss is None and has_training_step(built.module):
        loss, batches, forward, why_not = _stepped(built.module, found, forward)
        notes = (*notes, why_not) if why_not else notes
    if loss is None:
        loss = returned_loss(options.seed)
        if found.outputs is not None:
            loss = loss_of_outputs(found.outputs, options.seed)
    return Target(
        name=spec,
        module=built.module,
        batches=batches,
        inputs_from=found.source,
        loss=loss,
        forward=_talking_to_stderr(forward),
        optimizer=optimizer,
        notes=(*found.notes, *notes),
        checkpoint=options.checkpoint,
    )


def _explicit_loss(
    parts: TargetSpec, file: ModuleType, built: BuiltModel, options: TargetOptions
) -> Loss | None:
    """A loss that someone wrote down; None leaves it to the model."""
    if options.loss is not None:
        return named_loss(options.loss, options.seed)
    own = getattr(file, "loss", None)
    if built.loss is not None:
        return function_loss(_talking_to_stderr(built.loss), f"loss of {parts.source}:{built.name}")
    # A module-level nn.CrossEntropyLoss() called `loss` takes (outputs, targets): it is not the contract's.
    if callable(own) and not (isinstance(own, nn.Module) and type(own).__module__.startswith("torch.")):
        name = parts.path.name if parts.path is not None else parts.source
        return function_loss(_talking_to_stderr(own), f"loss() of {name}")
    return None


def _forward(module: nn.Module, found: FoundInputs, *, has_loss: bool) -> Callable[[nn.Module, Batch], Any]:
    """Call the model; of a batch with labels for a loss, or from a data loader, forward gets what it takes."""
    signature = forward_signature(module)
    limit = None if signature.any_positional else len(signature.positional)
    if has_loss or found.from_iterable:
        return lambda model, batch: model(*batch.args[:limit], **_taken(batch, signature))
    return call_model


def _taken(batch: Batch, signature: ForwardSignature) -> dict[str, Any]:
    return {name: value for name, value in batch.kwargs.items() if signature.accepts(name)}


def call_model(module: nn.Module, batch: Batch) -> Any:
    """Call a model with a batch as it is."""
    return module(*batch.args, **batch.kwargs)


def _stepped(
    module: nn.Module, found: FoundInputs, forward: Callable[[nn.Module, Batch], Any]
) -> tuple[Loss | None, tuple[Batch, ...], Callable[[nn.Module, Batch], Any], str]:
    """Let Lightning's training_step stand in for forward and loss, where some batch runs it."""
    batch, reason = training_batch(module, found.batches[0], found.outputs)
    if batch is None:
        return None, found.batches, forward, f"training_step could not be run ({reason}): forward is, alone"
    batches = found.batches if batch is found.batches[0] else (batch,)
    return training_loss(), batches, training_step, ""


def _optimizer(
    file: ModuleType, module: nn.Module, parts: TargetSpec
) -> tuple[torch.optim.Optimizer | None, tuple[str, ...]]:
    make = getattr(file, "make_optimizer", None)
    if callable(make):
        try:
            made = make(module)
        except Exception as error:
            raise model_error(error, f"make_optimizer() of {parts.source}") from error
        if not isinstance(made, torch.optim.Optimizer):
            kind = type(made).__name__
            raise TargetError(f"make_optimizer() of {parts.source} returned a {kind}, not an optimizer")
        return made, ()
    if not is_lightning(module):
        return None, ()
    optimizer, note = configured_optimizer(module)
    return optimizer, (note,) if note else ()


def _doubting_the_inputs(forward: Callable[[nn.Module, Batch], Any]) -> Callable[[nn.Module, Batch], Any]:
    """No inferred inputs ran: what the model raises may well be their fault."""

    def call(module: nn.Module, batch: Batch) -> Any:
        try:
            return forward(module, batch)
        except Exception as error:
            shapes = ", ".join(
                "×".join(map(str, t.shape)) for _, t in tensor_leaves((batch.args, batch.kwargs))
            )
            error.add_note(f"{INFERRED}{shapes}): if they do not fit, give others with --input")
            raise

    return call


def _talking_to_stderr(function: Callable[..., Any]) -> Callable[..., Any]:
    """stdout belongs to the report, whatever the model prints while it runs."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return function(*args, **kwargs)

    return call
