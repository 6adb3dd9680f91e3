"""LightningModules: their training_step as the forward, their optimizer, without importing lightning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import LossError
from gradflow.recording.leaves import floating_leaves
from gradflow.recording.losses import total
from gradflow.recording.signatures import positional_count
from gradflow.recording.target_types import Batch, Loss, user_inputs
from gradflow.recording.tracebacks import one_line
from gradflow.recording.trial import Trials

_LIBRARIES = ("lightning", "pytorch_lightning")


def is_lightning(module: nn.Module) -> bool:
    """Tell a LightningModule by the names of its ancestors: lightning need not be installed."""
    return any(cls.__name__ == "LightningModule" for cls in type(module).__mro__)


def has_training_step(module: nn.Module) -> bool:
    """Tell whether the class writes a training_step of its own."""
    return is_lightning(module) and _is_own(module, "training_step")


def has_forward(module: nn.Module) -> bool:
    """Tell whether forward is written: some LightningModules have a training_step alone."""
    return not is_lightning(module) or _is_own(module, "forward")


def _is_own(module: nn.Module, method: str) -> bool:
    function = getattr(type(module), method, None)
    return function is not None and function.__module__.partition(".")[0] not in _LIBRARIES


def training_step(module: Any, batch: Batch) -> Any:
    """Run ``training_step(batch, 0)``; all that ``self.log`` does without a trainer is warn: dropped."""
    arguments = (user_inputs(batch), 0, 0)[: positional_count(module.training_step) or 2]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*self.trainer. reference is not registered.*")
        return module.training_step(*arguments)


def training_loss() -> Loss:
    """Read the loss that a training_step returned: a scalar, or a dict with "loss"."""
    return Loss(description="training_step", compute=lambda outputs, _: _loss(outputs))


def _loss(outputs: Any) -> Tensor:
    value = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if value is None:
        raise LossError(
            "training_step returned no loss (manual optimisation?); write a loss(outputs, inputs)"
        )
    return total(value, "the loss of training_step")


def training_batch(module: nn.Module, batch: Batch, outputs: Any) -> tuple[Batch | None, str]:
    """Find the batch that training_step takes, given the inputs of forward.

    Returns:
        The batch, or None with the reason why none runs.
    """
    trials, reason = Trials(module), "no batch was tried"
    if outputs is None and has_forward(module):
        outputs = trials.run({}, lambda model: model(*batch.args, **batch.kwargs)).outputs
    for candidate in _candidates(batch, outputs):
        tensors = {str(i): arg for i, arg in enumerate(candidate.args)} | dict(candidate.kwargs)
        result = trials.run(tensors, _step_of(candidate))
        if result.failure is None:
            return candidate, ""
        reason = one_line(result.failure.error)
    return None, reason


def _step_of(batch: Batch) -> Callable[[nn.Module], Any]:
    return lambda module: _loss(training_step(module, batch))


def _candidates(batch: Batch, outputs: Any) -> Iterator[Batch]:
    """As given; then with class labels, with a target like the output, and without the tuple around it."""
    yield batch
    leaves = floating_leaves(outputs)
    inputs = batch.args[0] if len(batch.args) == 1 else batch.args
    for target in _targets(leaves[0][1]) if leaves and not batch.kwargs else ():
        yield Batch(args=(inputs, target), kwargs={})
    if isinstance(inputs, Tensor) and inputs.dim():
        yield labelled(inputs)
    if len(batch.args) == 1:
        yield replace(batch, lone=not batch.lone)


def labelled(inputs: Tensor) -> Batch:
    """Pair inputs with class labels that suit any number of classes."""
    return Batch(args=(inputs, torch.arange(inputs.shape[0], device=inputs.device) % 2), kwargs={})


def _targets(output: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    if output.dim() >= 2:
        shape = (output.shape[0], *output.shape[2:])
        yield torch.randint(0, output.shape[1], shape, generator=generator, device="cpu").to(output.device)
        tokens = torch.randint(0, output.shape[-1], output.shape[:-1], generator=generator, device="cpu")
        yield tokens.to(output.device)
    yield torch.randn(output.shape, generator=generator, device="cpu").to(output)


def configured_optimizer(module: Any) -> tuple[torch.optim.Optimizer | None, str]:
    """Call ``configure_optimizers``.

    Returns:
        The optimizer, or None with a note that says why there is none.
    """
    if not _is_own(module, "configure_optimizers"):
        return None, ""
    try:
        made = module.configure_optimizers()
    except Exception as error:  # most often it asks for the trainer
        return None, f"configure_optimizers() raised {one_line(error)}; the optimizer is not checked"
    optimizers = list(_optimizers(made))
    if len(optimizers) == 1:
        return optimizers[0], ""
    if not optimizers:
        return None, ""
    return None, f"configure_optimizers() returned {len(optimizers)} optimizers; they are not checked"


def _optimizers(made: Any) -> Iterator[torch.optim.Optimizer]:
    if isinstance(made, torch.optim.Optimizer):
        yield made
    elif isinstance(made, Mapping):
        yield from _optimizers(made.get("optimizer"))
    elif isinstance(made, (list, tuple)):
        for part in made:
            yield from _optimizers(part)
