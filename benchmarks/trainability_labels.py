"""Train every net of the grid and write down what happened: ``data/trainability.csv``.

Each net is trained from three seeds with SGD (momentum 0.9) and with Adam, at each rate below until one trains it (the
second and third seed at the two rates that did best from the first), for 120 steps of 64 digits, or 32 where the net
convolves or attends. A run *trains* a net when, at any of its checks every 20 steps, the net's accuracy on 256 fixed
samples has come half of the way from chance (the most frequent target) to what a linear model reaches with the same
budget at its best rate; one that has not come a tenth of it by step 60 is given up. Accuracy and not loss, so that a
net that is sure of itself is not called untrained; in the mode it trains in, so that running statistics do not count.

Slow is not broken: ``--patient`` gives each optimizer that did not train a net 600 steps at its two best rates, and
appends those runs, which are told by their steps.

    OMP_NUM_THREADS=1 nice python benchmarks/trainability_labels.py [--limit N] [--patient]

It goes on where an earlier run of it stopped: rows are appended a net and seed at a time, all nets of a seed first.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from trainability_nets import Net, batch, build, chance, grid, linear, loss_of

TABLE = Path(__file__).parent / "data" / "trainability.csv"


class Run(NamedTuple):
    """A row of the table."""

    net: str
    seed: int
    optimizer: str
    rate: float
    steps: int
    """Until it was found trained, was given up, or the budget was spent."""
    score: float
    """The best accuracy, 0 at chance and 1 at the linear model's."""
    trained: int


SEEDS = (0, 1, 2)
STEPS, EVERY = 120, 20
RATES = {"sgd": (0.03, 0.1, 0.002), "adam": (0.003, 0.01, 0.0005)}
LINEAR_RATES = {"sgd": (1.0, 0.3, 0.1), "adam": (0.1, 0.03, 0.01)}
PATIENT_STEPS = 600
"""What a net is given before it is called broken: slow is not broken."""
HOPELESS = 0.1
"""A run that has come less than this far by half its time is given up."""
BEST = 2
EVALUATION, EVALUATION_SEED = 256, 12_345
ENOUGH = 0.5
"""The share of the way from chance to the linear model that counts as trained."""


def batch_size(family: str) -> int:
    """Samples a step."""
    return 64 if family == "dense" else 32


def accuracies(
    module: nn.Module, data: str, size: int, optimizer: str, rate: float, seed: int, steps: int = STEPS
) -> Iterator[float]:
    """Train and yield the accuracy every so many steps; ends early where the loss is no longer finite."""
    make = {
        "sgd": lambda p: torch.optim.SGD(p, rate, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, rate),
    }
    stepper = make[optimizer](module.parameters())
    inputs, targets = batch(data, EVALUATION_SEED, EVALUATION)
    for step in range(1, steps + 1):
        x, y = batch(data, 100_000 * (seed + 1) + step, size)
        loss = loss_of(module(x), y)
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        if step % EVERY == 0:
            if not torch.isfinite(loss):
                return
            with torch.no_grad():
                right = module(inputs).argmax(-1) == targets
            yield right.float().mean().item()


@cache
def linear_accuracy(data: str) -> float:
    """What a linear model reaches in the same number of steps, with the better optimizer at its best rate."""
    return max(
        accuracy
        for optimizer, rates in LINEAR_RATES.items()
        for rate in rates
        for accuracy in accuracies(linear(data), data, 64, optimizer, rate, 0)
    )


def score(accuracy: float, data: str) -> float:
    """0 at chance, 1 at the linear model's accuracy."""
    return (accuracy - chance(data)) / (linear_accuracy(data) - chance(data))


def runs(net: Net, seed: int, first: Sequence[Run]) -> Iterator[Run]:
    """One row a run: the rates of each optimizer in order, up to the first that trains the net.

    Args:
        net: What to train.
        seed: Of weights and batches.
        first: The net's rows from the first seed; empty for that seed itself.
    """
    for optimizer in RATES:
        for rate in rates(optimizer, first):
            run = train(net, seed, optimizer, rate)
            yield run
            if run.trained:
                break


def patient_runs(net: Net, seed: int, known: Sequence[Run]) -> Iterator[Run]:
    """Train once more, five times as long, with each optimizer that did not train a net at its two best rates."""
    for optimizer in RATES:
        own = [run for run in known if (run.net, run.seed, run.optimizer) == (net.name, seed, optimizer)]
        if any(run.trained or run.steps > STEPS for run in own):
            continue
        for rate in rates(optimizer, own):
            run = train(net, seed, optimizer, rate, PATIENT_STEPS)
            yield run
            if run.trained:
                break


def rates(optimizer: str, first: Sequence[Run]) -> Sequence[float]:
    """All rates, or the two best of the first seed's, best first."""
    known = sorted((run for run in first if run.optimizer == optimizer), key=lambda run: -run.score)
    return [run.rate for run in known[:BEST]] if first else RATES[optimizer]


def train(net: Net, seed: int, optimizer: str, rate: float, budget: int = STEPS) -> Run:
    """One run, up to the check that finds the net trained."""
    best, steps = 0.0, 0
    module, size = build(net, seed), batch_size(net.family)
    for accuracy in accuracies(module, net.data, size, optimizer, rate, seed, budget):
        steps += EVERY
        best = max(best, score(accuracy, net.data))
        if best >= ENOUGH or (steps >= budget // 2 and best < HOPELESS):
            break
    return Run(net.name, seed, optimizer, rate, steps, round(best, 4), int(best >= ENOUGH))


def main() -> None:
    """Train what the table does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="stop after so many nets and seeds")
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="every Nth net from the Kth on"
    )
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--patient", action="store_true", help="give what failed five times as long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # vanished gradients are subnormal, which costs a processor a hundredfold
    known = read(options.table)
    mine = set(grid()[options.part[0] :: options.part[1]])
    if options.patient:
        for net, seed in [(net, seed) for seed in SEEDS for net in grid() if net in mine]:
            append(options.table, list(patient_runs(net, seed, known)))
        return
    for net, seed in [item for item in todo(known) if item[0] in mine][: options.limit]:
        started = time.process_time()
        first = [run for run in known if run.net == net.name and run.seed == SEEDS[0]]
        fresh = list(runs(net, seed, first))
        known.extend(fresh)
        append(options.table, fresh)
        print(f"{net.name} seed {seed}: {time.process_time() - started:.1f} s", flush=True)


def todo(known: Sequence[Run]) -> list[tuple[Net, int]]:
    """What is not trained yet: a seed after the other, and first the nets whose seeds do not agree so far."""
    outcomes: dict[tuple[str, int], dict[str, int]] = {}
    for run in known:
        outcomes.setdefault((run.net, run.seed), {})[run.optimizer] = run.trained

    def agree(net: Net) -> bool:
        seen = [outcomes[net.name, seed] for seed in SEEDS if (net.name, seed) in outcomes]
        return all(outcome == seen[0] for outcome in seen)

    missing = [(net, seed) for seed in SEEDS for net in grid() if (net.name, seed) not in outcomes]
    return sorted(missing, key=lambda item: (item[1], agree(item[0])))


def read(table: Path = TABLE) -> list[Run]:
    """Every run in the table; none where there is no table yet."""
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [
        Run(net, int(seed), optimizer, float(rate), int(steps), float(score), int(trained))
        for net, seed, optimizer, rate, steps, score, trained in rows
    ]


def append(table: Path, fresh: Sequence[Run]) -> None:
    """Write runs behind those the table holds, under a line of column names."""
    new = not table.exists()
    table.parent.mkdir(exist_ok=True)
    with table.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(Run._fields)
        writer.writerows(fresh)


if __name__ == "__main__":
    main()
