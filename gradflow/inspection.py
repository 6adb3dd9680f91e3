"""``gradflow.inspect``: the whole path from a model to a Report, from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gradflow.analyzer import analyze
from gradflow.config import Config
from gradflow.report import Report

if TYPE_CHECKING:
    import torch
    from torch import nn


def inspect(
    model: nn.Module,
    inputs: Any,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 1,
    seed: int = 0,
    trained: bool = False,
    try_fixes: bool = False,
    ablate: str | None = None,
    ablate_top: int | None = None,
    paths: bool = False,
    shattered: bool = False,
) -> Report:
    """Run forward and backward once and say where the gradient goes.

    The model, its gradients, buffers and modes and every random number generator are left as found.

    Args:
        model: Any module, in the modes it is to be measured in.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        loss: ``loss(outputs, inputs)`` -> scalar tensor. Without it the output's own ``.loss`` is taken, else a
            seeded N(0, 1) cotangent on every floating output: what is measured is then the Jacobian.
        optimizer: To tell parameters that it does not update; without it that is "not checked".
        steps: How many; every number is the median over them.
        seed: Seed of the first step; step k runs with ``seed + k``.
        trained: The parameters come from training.
        try_fixes: Apply candidate repairs in memory and measure again: ``report.repairs``, the best first.
        ablate: "each" also runs the model without each branch (one forward each and sample), "greedy" also finds the
            order of least harm (L²/2 forwards): ``report.ablation``, ``report.anatomy()``.
        ablate_top: Stop the greedy order after so many removals.
        paths: Also take the gradient of the first step apart by how many branches it came through, exactly:
            ``report.stream.exact``. Costs a backward for each block of a stream, and two.
        shattered: Also compare the gradients at the input and beside it (GF106). Costs two forwards and backwards.

    Raises:
        UsageError: The inputs do not fit, the loss is not a scalar, or ``ablate`` is something else.
        ModelError: The model raised.
    """
    from gradflow.recording.ablation import requested
    from gradflow.recording.execution import record
    from gradflow.recording.garbage import collection_paused
    from gradflow.recording.path_passes import PathRequest
    from gradflow.recording.shattered import with_correlation
    from gradflow.recording.target import target_from_objects
    from gradflow.repair_trials import try_repairs

    ablation = requested(ablate, ablate_top)
    with collection_paused():
        target = target_from_objects(model, inputs, loss, optimizer=optimizer, seed=seed)
        apart = PathRequest() if paths else None
        trace = record(target, seed=seed, steps=steps, trained=trained, ablation=ablation, paths=apart)
        report = analyze(with_correlation(target, trace, seed=seed) if shattered else trace, Config())
    return try_repairs(target, report) if try_fixes else report
