"""A target with a repair in it, for as long as a block runs; the model is put back however the block ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from gradflow.recording.layout import ModelLayout, layout_of
from gradflow.recording.repairs import Ground, NothingToRepair, Repair, Workpiece
from gradflow.recording.rewiring import Rewiring
from gradflow.recording.seeding import random_state_kept, seed_everything
from gradflow.recording.snapshot import preserved
from gradflow.recording.target import Target


@contextmanager
def repaired(target: Target, repair: Repair, ground: Ground, *, seed: int) -> Iterator[Target]:
    """Apply a repair in memory.

    Args:
        target: The model, which holds other weights inside the block.
        repair: What to do.
        ground: Where.
        seed: Of new initial values.

    Yields:
        The target whose ``forward`` runs the repaired model; without an optimizer, which knows nothing of it.

    Raises:
        NothingToRepair: The repair has nothing to act on, which may show only at the end of the block, when the
            repaired model ran and no op was changed.
    """
    with random_state_kept(), preserved(target.module):
        seed_everything(seed)
        rewired = repair.apply(_workpiece(target, ground, seed))
        if rewired is None:
            yield replace(target, optimizer=None)
            return
        wired = Rewiring(rewired.wiring, (item.parameter for item in rewired.scope))
        yield replace(target, forward=_inside(wired, target.forward), optimizer=None)
        if not wired.changes:
            raise NothingToRepair


def _inside(wired: Rewiring, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(module: Any, batch: Any) -> Any:
        with wired:
            return forward(module, batch)

    return run


def _workpiece(target: Target, ground: Ground, seed: int) -> Workpiece:
    layout = layout_of(target.module)
    by_name = {name: item for item in layout.parameters for name in item.names}
    own = [tuple(by_name[name] for name in b.parameters if name in by_name) for b in ground.branches]

    def run() -> Any:
        with torch.no_grad():
            return target.forward(target.module, target.batches[0])

    return Workpiece(
        scope=tuple(item for item in layout.parameters if item.names[0] in ground.parameters),
        activation=ground.activation,
        branches=tuple((b, items) for b, items in zip(ground.branches, own, strict=True) if items),
        run=run,
        generator=torch.Generator(device=_device(layout)).manual_seed(seed),
    )


def _device(layout: ModelLayout) -> torch.device:
    return next((item.parameter.device for item in layout.parameters), torch.device("cpu"))
