"""Does the repair that ``--try-fixes`` ranks first make a model train that did not?

Every faulty model of the zoo that a repair answers is trained for 300 steps on its batch as it is, and again with
the repair ranked first, with SGD and with Adam. A model trains when its loss ends at half of what a constant
prediction costs, or less, and is finite. Counted are the models that neither optimizer trains as they are: the
share of them that an optimizer trains repaired; and, optimizer by optimizer, the runs that failed and now do not.

    python benchmarks/repairs.py [--steps 300] [--seeds 0 1 2] [--only V1b X1b]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gradflow.analyzer import analyze
from gradflow.config import Config
from gradflow.recording.execution import record
from gradflow.recording.repair_runs import repaired
from gradflow.recording.repairs import REPAIRS
from gradflow.recording.target import Target, target_from_objects
from gradflow.repair_trials import ground_of, try_repairs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import zoo
import zoo_residual
import zoo_units

GOAL = 0.9
TRAINED = 0.5
"""Of the loss of a constant prediction."""
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.03, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One faulty model: how its training ended, as it is and repaired, by optimizer."""

    name: str
    seed: int
    repair: str
    before: dict[str, bool]
    after: dict[str, bool]


def outcome(case: zoo.Case, seed: int, steps: int) -> Outcome | None:
    """Train a model of the zoo both ways; None where no repair helps it."""
    target = target_from_objects(*case.build(seed), seed=seed)
    report = analyze(record(target, seed=seed, trained=case.trained), Config())
    tried = [found for found in try_repairs(target, report).repairs if found.helped]
    if not tried:
        return None
    before = {name: trains(case, seed, steps, name, "") for name in OPTIMIZERS}
    after = {name: trains(case, seed, steps, name, tried[0].name) for name in OPTIMIZERS}
    return Outcome(name=case.name, seed=seed, repair=tried[0].name, before=before, after=after)


def trains(case: zoo.Case, seed: int, steps: int, optimizer: str, repair: str) -> bool:
    """Train from the start, with a repair by name or without one."""
    target = target_from_objects(*case.build(seed), seed=seed)
    found = next((candidate for candidate in REPAIRS if candidate.name == repair), None)
    if found is None:
        return _trains(target, optimizer, steps)
    report = analyze(record(target, seed=seed, trained=case.trained), Config())
    with repaired(target, found, ground_of(report, found), seed=seed) as mended:
        return _trains(mended, optimizer, steps)


def _trains(target: Target, optimizer: str, steps: int) -> bool:
    updates = OPTIMIZERS[optimizer]([p for p in target.module.parameters() if p.requires_grad])
    torch.manual_seed(0)
    batch, loss = target.batches[0], math.inf
    for _ in range(steps):
        updates.zero_grad()
        value = target.loss.compute(target.forward(target.module, batch), batch)
        loss = float(value.detach())
        if not math.isfinite(loss):
            return False
        value.backward()
        updates.step()
    return loss <= TRAINED * _constant_loss(target)


def _constant_loss(target: Target) -> float:
    """The cross-entropy of predicting every class alike."""
    with torch.no_grad():
        outputs = target.forward(target.module, target.batches[0])
        return float(target.loss.compute(torch.zeros_like(outputs), target.batches[0]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [*zoo.FAULTY, *zoo_residual.FAULTY, *zoo_units.FAULTY]
    console, outcomes = Console(), []
    for case in cases:
        for seed in options.seeds:
            found = (
                None if options.only and case.name not in options.only else outcome(case, seed, options.steps)
            )
            if found is not None:
                outcomes.append(found)
                console.print(
                    f"{found.name} seed {found.seed}: {found.repair} {found.before} -> {found.after}"
                )
    summarise(outcomes, console)


def summarise(outcomes: list[Outcome], console: Console) -> None:
    failed = [found for found in outcomes if not any(found.before.values())]
    mended = [found for found in failed if any(found.after.values())]
    runs = [(f.before[name], f.after[name]) for f in outcomes for name in OPTIMIZERS]
    table = Table("what", "share", title=f"{len(outcomes)} faulty models with a repair that helps")
    table.add_row("no optimizer trained it; repaired, one does", _share(len(mended), len(failed)))
    table.add_row(
        "runs that failed; repaired, they train",
        _share(sum(after for before, after in runs if not before), sum(not before for before, _ in runs)),
    )
    table.add_row(
        "runs that trained; repaired, they still do",
        _share(sum(after for before, after in runs if before), sum(before for before, _ in runs)),
    )
    console.print(table, f"goal: {GOAL}")


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.2f})" if whole else "0 of 0"


if __name__ == "__main__":
    main()
