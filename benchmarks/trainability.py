"""What the verdict at initialisation is worth: said before training, against what training then did.

    OMP_NUM_THREADS=1 python benchmarks/trainability.py [--nets 20] [--results FILE]

The nets and their halves are in ``trainability_nets.py``, what happened to each in ``data/trainability.csv``
(``trainability_labels.py`` made it). Two labels a net, each the majority of three seeds: **broken**, no optimizer at
any rate trained it; **fragile**, SGD did not at any rate, or Adam did not (a broken net is fragile too). gradflow
inspects each net at the same three initialisations. *Errors* are to be the broken nets, *warnings and errors* the
fragile ones; a net's verdict is the middle one of the three. Beside it stand the published rules of other tools
(``rivals.py``), which know one kind of alarm, and the bare |ln J| at the limit that does best on the tuned half.

The same is then asked, from the first seed, with the loss summed instead of averaged, scaled by 1e4, and with half the
batch: the verdict should be the same one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low

import rivals
import torch
import trainability_labels as labels
from rich.console import Console
from rich.table import Table
from scoring import HALVES, Score
from torch import Tensor
from trainability_nets import Net, batch, build, grid, loss_of

import gradflow

BATCH, BATCH_SEED = 128, 777
VARIANTS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "mean": (BATCH, loss_of),
    "summed": (BATCH, lambda outputs, targets: loss_of(outputs, targets) * targets.numel()),
    "times 1e4": (BATCH, lambda outputs, targets: loss_of(outputs, targets) * 1e4),
    "half the batch": (BATCH // 2, loss_of),
}
"""Batch size and loss of each way to ask the same question."""
RANKS = ("none", "info", "warning", "error")
LABELS = ("broken", "fragile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One net, from one seed, asked in one way."""

    net: str
    seed: int
    variant: str
    worst: str
    """The worst severity of a root cause, or "none"."""
    rules: tuple[str, ...]
    """Of warnings and errors."""
    gain: float
    """J of the trunk."""
    alarms: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Of each rival, for the mean and the summed loss."""


def inspect(net: Net, seed: int, variant: str) -> Verdict:
    """Build the net and ask gradflow, and the rivals where their answer depends on it."""
    size, loss = VARIANTS[variant]
    x, y = batch(net.data, BATCH_SEED + seed, size)
    report = gradflow.inspect(build(net, seed), x, lambda outputs, _: loss(outputs, y), seed=seed)
    roots = [finding for finding in report.findings if finding.consequence_of is None]
    sight = None
    if variant in ("mean", "summed"):
        sight = rivals.look(build(net, seed), (x,), lambda outputs, _: loss(outputs, y))
    return Verdict(
        net=net.name,
        seed=seed,
        variant=variant,
        worst=max((str(finding.severity) for finding in roots), key=RANKS.index, default="none"),
        rules=tuple(
            dict.fromkeys(f"{f.rule} {f.severity}" for f in roots if f.severity is not gradflow.Severity.INFO)
        ),
        gain=report.profile.gain,
        alarms=tuple((name, tuple(rule(sight))) for name, rule in rivals.RIVALS) if sight else (),
    )


def happened(runs: Sequence[labels.Run]) -> dict[str, dict[str, bool]]:
    """What each net's runs amount to: ``{"broken": ..., "fragile": ...}``; nets without two seeds are left out."""
    by_seed: dict[str, dict[int, dict[str, bool]]] = {}
    for run in runs:
        trained = by_seed.setdefault(run.net, {}).setdefault(run.seed, {})
        trained[run.optimizer] = trained.get(run.optimizer, False) or bool(run.trained)
    return {
        net: {
            "broken": _majority([not any(trained.values()) for trained in seeds.values()]),
            "fragile": _majority([not all(trained.values()) for trained in seeds.values()]),
        }
        for net, seeds in by_seed.items()
        if len(seeds) > 1
    }


def _majority(votes: Sequence[bool]) -> bool:
    return 2 * sum(votes) > len(votes)


def score(said: Mapping[str, bool], did: Mapping[str, bool]) -> Score:
    """Compare by name; only nets with both count."""
    both = [(said[name], did[name]) for name in said if name in did]
    return Score(
        hits=sum(a and b for a, b in both),
        misses=sum(b and not a for a, b in both),
        false=sum(a and not b for a, b in both),
    )


def said_by_gradflow(verdicts: Sequence[Verdict], label: str, variant: str = "mean") -> dict[str, bool]:
    """Whether the middle one of a net's verdicts is an error (broken), or at least a warning (fragile)."""
    least = RANKS.index("error" if label == "broken" else "warning")
    return {net: rank >= least for net, rank in middle_ranks(verdicts, variant).items()}


def middle_ranks(verdicts: Sequence[Verdict], variant: str) -> dict[str, int]:
    """The middle of each net's worst severities over its seeds, as an index into RANKS."""
    return {
        net: median_low([RANKS.index(v.worst) for v in mine])
        for net, mine in _by_net(verdicts, variant).items()
    }


def said_by_rival(verdicts: Sequence[Verdict], name: str, variant: str) -> dict[str, bool]:
    """Whether a rival raises any alarm at most of a net's seeds."""
    return {
        net: _majority([bool(dict(v.alarms)[name]) for v in mine])
        for net, mine in _by_net(verdicts, variant).items()
    }


def said_by_gain(verdicts: Sequence[Verdict], limit: float) -> dict[str, bool]:
    """Whether |ln J| is above a limit, or J no number, at most of a net's seeds."""
    return {
        net: _majority([log_size(v.gain) > limit for v in mine])
        for net, mine in _by_net(verdicts, "mean").items()
    }


def log_size(gain: float) -> float:
    """|ln J|; infinite where J is 0 or not finite."""
    return abs(math.log(gain)) if 0 < gain < math.inf else math.inf


def best_limit(verdicts: Sequence[Verdict], did: Mapping[str, bool]) -> float:
    """The limit of |ln J| with the highest F1: between two that were measured."""
    sizes = sorted({log_size(v.gain) for v in verdicts if v.variant == "mean"})
    return max(sizes, key=lambda limit: score(said_by_gain(verdicts, limit), did).f1 or 0.0, default=0.0)


def _by_net(verdicts: Sequence[Verdict], variant: str) -> dict[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.variant == variant:
            found.setdefault(verdict.net, []).append(verdict)
    return found


def moved(verdicts: Sequence[Verdict], variant: str) -> tuple[int, int]:
    """How many (net, seed) have another worst severity than for the mean loss, and of how many."""
    base = {(v.net, v.seed): v.worst for v in verdicts if v.variant == "mean"}
    other = {(v.net, v.seed): v.worst for v in verdicts if v.variant == variant}
    both = base.keys() & other.keys()
    return sum(_loud(base[key]) != _loud(other[key]) for key in both), len(both)


def _loud(worst: str) -> str:
    return worst if worst in ("warning", "error") else "none"


def show(verdicts: Sequence[Verdict], did: Mapping[str, Mapping[str, bool]], console: Console) -> None:
    """Print a table a half, what moved, and the nets of the tuned half that were judged wrong."""
    nets = {net.name: net for net in grid()}
    halves = {half: [v for v in verdicts if nets[v.net].half == half] for half in HALVES}
    limits = {
        label: best_limit(halves["tuned"], {net: truth[label] for net, truth in did.items()})
        for label in LABELS
    }
    for half in HALVES:
        console.print(_scores(half, halves[half], did, limits))
    for variant in list(VARIANTS)[1:]:
        changed, of = moved(verdicts, variant)
        console.print(f"{variant}: another verdict on {changed} of {of} nets and seeds", highlight=False)
    for name, ranks in _middle(halves["tuned"]).items():
        truth = did.get(name)
        if truth and ranks[0] != _wanted(truth):
            console.print(f"tuned {name}: {_wanted(truth)}, said {ranks[0]} {ranks[1]}", highlight=False)


def _middle(verdicts: Sequence[Verdict]) -> dict[str, tuple[str, str]]:
    ranks = middle_ranks(verdicts, "mean")
    by_net = _by_net(verdicts, "mean")
    return {
        net: (
            {"error": "broken", "warning": "fragile"}.get(RANKS[rank], "fine"),
            "; ".join(f"J {v.gain:.3g} {', '.join(v.rules)}" for v in by_net[net]),
        )
        for net, rank in ranks.items()
    }


def _wanted(truth: Mapping[str, bool]) -> str:
    return "broken" if truth["broken"] else "fragile" if truth["fragile"] else "fine"


def _scores(
    half: str,
    verdicts: Sequence[Verdict],
    did: Mapping[str, Mapping[str, bool]],
    limits: Mapping[str, float],
) -> Table:
    present = {v.net for v in verdicts}
    truths = [truth for net, truth in did.items() if net in present]
    counts = ", ".join(f"{sum(truth[label] for truth in truths)} {label}" for label in LABELS)
    table = Table(title=f"{half}: {len(truths)} nets, {counts}")
    for column in (
        "tool",
        *(f"{label}\n{what}" for label in LABELS for what in ("prec.", "recall", "F1")),
    ):
        table.add_column(column, justify="left" if column == "tool" else "right")
    rows: list[tuple[str, Callable[[str], Mapping[str, bool]]]] = [
        ("gradflow", lambda label: said_by_gradflow(verdicts, label)),
        *(
            (
                f"gradflow, {variant}",
                lambda label, variant=variant: said_by_gradflow(verdicts, label, variant),
            )
            for variant in list(VARIANTS)[1:]
        ),
        ("bare |ln J|", lambda label: said_by_gain(verdicts, limits[label])),
        *(
            (f"{name}, {variant}", lambda _, n=name, v=variant: said_by_rival(verdicts, n, v))
            for name, _ in rivals.RIVALS
            for variant in ("mean", "summed")
        ),
    ]
    for name, say in rows:
        scores = [score(say(label), {net: truth[label] for net, truth in did.items()}) for label in LABELS]
        table.add_row(name, *(f"{value:.3f}" for s in scores for value in (s.precision, s.recall, s.f1)))
    return table


def main() -> None:
    """Inspect what the results do not hold yet, and show the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", type=int, help="only so many nets of each family")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="every Nth net")
    parser.add_argument("--table", type=Path, default=labels.TABLE, help="the labels")
    parser.add_argument("--results", type=Path, help="append each verdict, and skip those the file holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    did = happened(labels.read(options.table))
    verdicts = list(judge_all(chosen(options.nets)[options.part[0] :: options.part[1]], options.results))
    show(verdicts, did, Console(width=110))


def chosen(count: int | None) -> list[Net]:
    """The grid, or the first so many nets of each family."""
    families = {net.family for net in grid()}
    return [
        net for family in sorted(families) for net in [net for net in grid() if net.family == family][:count]
    ]


def judge_all(nets: Sequence[Net], results: Path | None) -> Iterator[Verdict]:
    """Every net and seed; the first seed in every way to ask."""
    known = {(v.net, v.seed, v.variant): v for v in read(results)}
    for seed in labels.SEEDS:
        for net in nets:
            for variant in VARIANTS if seed == labels.SEEDS[0] else ("mean",):
                verdict = known.get((net.name, seed, variant))
                if verdict is None:
                    verdict = inspect(net, seed, variant)
                    append(results, verdict)
                yield verdict
            print(f"{net.name} seed {seed}", file=sys.stderr, flush=True)


def read(path: Path | None) -> list[Verdict]:
    """Verdicts of an earlier run; none without a file."""
    if path is None or not path.exists():
        return []
    return [_verdict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _verdict(row: dict[str, object]) -> Verdict:
    alarms = tuple((name, tuple(kinds)) for name, kinds in row.pop("alarms"))
    return Verdict(**{**row, "rules": tuple(row["rules"]), "alarms": alarms})


def append(path: Path | None, verdict: Verdict) -> None:
    """Write one verdict as a line of JSON (NaN and Infinity as Python's json spells them)."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(verdict)) + "\n")


if __name__ == "__main__":
    main()
