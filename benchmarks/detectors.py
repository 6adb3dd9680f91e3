"""How good the verdicts are: forty models with known faults or none, at three widths, three depths and five seeds.

    OMP_NUM_THREADS=1 python benchmarks/detectors.py [--full] [--seeds 5] [--only V1a H5] [--results FILE]

The models are those of the tests (``tests/zoo*.py``); ``AXES`` says at which widths and depths each is built, and
what was kept fixed so that the label stays true. With each seed three of the nine sizes are built, every width and
every depth once (600 models; a third seed has met all nine); ``--full`` builds all of them (1800). Each is judged by
gradflow, and by the published rules of other tools (``rivals.py``) on the same weights and inputs.

Scoring. Of a faulty model the expected rule must come first, at the expected severity or above, at the place of the
fault or within one block of it: a hit, else a miss. Any other warning or error that is not the stated consequence of
another finding is a false positive, and so is any warning or error on a healthy model. R1a is a model about which
something true and harmless is to be said: its *info* is asked for, a warning is false.

The other tools are scored twice: ``detects`` asks only for any alarm on a faulty model and none on a healthy one,
``names`` for the alarm nearest to the fault. R1a is left out there.

Halves. The thresholds of the rules were chosen while looking at the recipes as the tests build them. All of these are
in the half ``tuned``, with half of the rest, by a hash of name, width, depth and seed; the others are ``untouched``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import gradflow

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import rivals
import zoo
import zoo_attention
import zoo_residual
import zoo_units
from scoring import HALVES, Score, half_of

SEEDS = 5
FAULTY = (*zoo.FAULTY, *zoo_residual.FAULTY, *zoo_units.FAULTY, *zoo_attention.FAULTY)
INFORMED = zoo_units.INFORMED
HEALTHY = (*zoo.HEALTHY, *zoo_residual.HEALTHY)
CASES = {case.name: case for case in (*FAULTY, *INFORMED, *HEALTHY)}

DENSE, IMAGES, TOKENS = (128, 256, 512), (8, 16, 32), (64, 96, 128)
AXES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # Layers; the gain of one layer is given, so depth moves J between the limits of its severity.
    "V1a": (DENSE, (4, 5, 6)),
    "V1b": (DENSE, (10, 12, 16)),
    "V2a": (DENSE, (24, 26, 28)),
    "V2b": (DENSE, (40, 44, 48)),
    "X1a": (DENSE, (27, 30, 34)),
    "X1b": (DENSE, (30, 34, 38)),
    "X2a": (DENSE, (28, 32, 38)),
    "X2b": (DENSE, (64, 68, 72)),
    "U1a": (DENSE, (4, 6, 8)),
    # Layers before and after the cut.
    "U1b": (DENSE, (2, 3, 4)),
    # Blocks; fewer than eight are no trend, fewer than 14 keep J below an explosion, more than 40 do not.
    "G1a": ((16, 32, 64), (8, 10, 12)),
    "G1b": ((16, 32, 48), (42, 48, 54)),
    # Blocks; the weak or dead ones stay where they are, or are the deep half.
    "I1a": (TOKENS, (8, 12, 16)),
    "I1b": (TOKENS, (8, 12, 16)),
    "Z1a": (DENSE, (6, 8, 12)),
    "Z1b": (DENSE, (6, 8, 12)),
    # Layers; the share of dead channels is given, so 2% of them must be a whole channel.
    "D1a": ((32, 64, 128), (3, 4, 5)),
    "D1b": ((128, 192, 256), (3, 4, 5)),
    # Layers behind the one that saturates.
    "S1a": (DENSE, (2, 3, 4)),
    "S1b": (DENSE, (2, 3, 4)),
    # Skips keep some of what tells tokens apart: fewer than ten layers most of it, sixteen next to nothing.
    "R1a": ((64, 128, 192), (11, 12, 13)),
    "R1b": ((64, 128, 192), (10, 12, 16)),
    "A1a": ((64, 96, 128), (2, 4, 6)),
    "A1b": ((64, 96, 128), (2, 4, 6)),
    "H1": (DENSE, (4, 6, 8)),
    # Default weights keep 0.41 a layer: three or four layers are healthy, ten are not.
    "H2": (DENSE, (2, 3, 4)),
    # Stages of two convolutions; default weights again.
    "H3": ((16, 32, 48), (1, 2, 3)),
    "H4": ((16, 32, 48), (2, 3, 4)),
    # Blocks in each of three stages.
    "H5": (IMAGES, (2, 3, 4)),
    "H6": (IMAGES, (2, 3, 4)),
    "H8": (IMAGES, (2, 3, 4)),
    "H7": (DENSE, (12, 24, 48)),
    # The weight variance is critical for a width without end: a wider net stays critical for more layers.
    "H9": ((192, 256, 384), (20, 30, 36)),
    "H10": (TOKENS, (4, 8, 12)),
    "H11": (TOKENS, (4, 8, 12)),
    "H12": ((96, 144, 192), (4, 8, 12)),
    # Layers of the LSTM, over fifty steps.
    "H13": ((32, 64, 96), (1, 2, 3)),
    # Convolutions a level.
    "H14": (IMAGES, (1, 2, 3)),
    "H15": (TOKENS, (2, 4, 6)),
    "H16": (DENSE, (24, 48, 64)),
}
"""Widths and depths of each model; the recipe's own are among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A warning or an error that is a root cause, as gradflow ranked it; or the info that was asked for."""

    rule: str
    severity: str
    first: str
    last: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One model and all verdicts on it."""

    case: str
    width: int
    depth: int
    seed: int
    findings: tuple[Said, ...]
    alarms: tuple[tuple[str, tuple[str, ...]], ...]
    """Of each rival, by name."""

    @property
    def half(self) -> str:
        """See the module's text."""
        return half_in(CASES[self.case], self.width, self.depth, self.seed)


def half_in(case: zoo.Case, width: int, depth: int, seed: int) -> str:
    """The half of a model: tuned as the tests build it, else by a hash."""
    if (width, depth) == case.build.__defaults__[-2:]:
        return "tuned"
    return half_of(f"{case.name}/{width}/{depth}/{seed}")


def judge(case: zoo.Case, width: int, depth: int, seed: int) -> Judged:
    """Build a model twice, once for gradflow and once for the others, and take down what each says."""
    report = gradflow.inspect(*case.build(seed, width, depth), seed=seed, trained=case.trained)
    module, inputs, loss = case.build(seed, width, depth)
    sight = rivals.look(module, inputs, loss)
    return Judged(
        case=case.name,
        width=width,
        depth=depth,
        seed=seed,
        findings=tuple(_said(finding) for finding in report.findings if _counts(finding, case)),
        alarms=tuple((name, tuple(rule(sight))) for name, rule in rivals.RIVALS),
    )


def _said(finding: gradflow.Finding) -> Said:
    first = finding.location.first
    return Said(
        rule=finding.rule,
        severity=str(finding.severity),
        first=first,
        last=finding.location.last or first,
    )


def _counts(finding: gradflow.Finding, case: zoo.Case) -> bool:
    if finding.consequence_of is not None:
        return False
    asked = case.severity is gradflow.Severity.INFO and finding.rule == case.rule
    return asked or finding.severity is not gradflow.Severity.INFO


def hit(judged: Judged) -> bool:
    """Whether a faulty model's expected finding came first, severe enough and at the right place."""
    case = CASES[judged.case]
    if not judged.findings or judged.findings[0].rule not in (case.rule, *case.also):
        return False
    found = next((said for said in judged.findings if said.rule == case.rule), None)
    return (
        found is not None
        and gradflow.Severity(found.severity).rank >= case.severity.rank
        and _located(found, case, judged.depth)
    )


def _located(found: Said, case: zoo.Case, depth: int) -> bool:
    if case.name == "I1b":
        return _near(found.first, depth // 2) and _near(found.last, depth - 1)
    if case.region.startswith("blocks.") and case.region != "blocks.":
        block = int(case.region.removeprefix("blocks."))
        return _near(found.first, block) and _near(found.last, block)
    return found.first.startswith(case.region) and found.last.startswith(case.region)


def _near(place: str, block: int) -> bool:
    """``blocks.5`` and anything in it is near the blocks 4, 5 and 6."""
    parts = place.split(".")
    return len(parts) > 1 and parts[1].isdigit() and abs(int(parts[1]) - block) <= 1


def extra(judged: Judged) -> tuple[Said, ...]:
    """Warnings and errors that nobody expects."""
    case = CASES[judged.case]
    expected = (case.rule, *case.also)
    too_loud = case.severity is gradflow.Severity.INFO
    return tuple(
        said
        for said in judged.findings
        if said.severity != "info" and (said.rule not in expected or too_loud)
    )


def overall(models: Sequence[Judged]) -> Score:
    """gradflow over all models."""
    faulty = [m for m in models if CASES[m.case].rule]
    hits = sum(map(hit, faulty))
    return Score(hits=hits, misses=len(faulty) - hits, false=sum(bool(extra(m)) for m in models))


def of_rule(models: Sequence[Judged], rule: str) -> Score:
    """gradflow, one rule: models that expect it, and models on which it speaks unasked."""
    mine = [m for m in models if CASES[m.case].rule == rule]
    hits = sum(map(hit, mine))
    false = sum(any(said.rule == rule for said in extra(m)) for m in models)
    return Score(hits=hits, misses=len(mine) - hits, false=false)


def detects(models: Sequence[Judged], alarms: Callable[[Judged], Sequence[str]]) -> Score:
    """Any alarm on a faulty model, none on a healthy one."""
    faulty = [m for m in models if CASES[m.case].rule and m.case not in _informed()]
    hits = sum(bool(alarms(m)) for m in faulty)
    false = sum(bool(alarms(m)) for m in models if not CASES[m.case].rule)
    return Score(hits=hits, misses=len(faulty) - hits, false=false)


def names(models: Sequence[Judged], alarms: Callable[[Judged], Sequence[str]]) -> Score:
    """The alarm nearest to the fault; another one, or any on a healthy model, is false."""
    counted = [m for m in models if m.case not in _informed()]
    faulty = [m for m in counted if CASES[m.case].rule]
    hits = sum(any(map(_nearest(m), alarms(m))) for m in faulty)
    false = sum(not all(map(_nearest(m), alarms(m))) for m in counted)
    return Score(hits=hits, misses=len(faulty) - hits, false=false)


def _nearest(judged: Judged) -> Callable[[str], bool]:
    case = CASES[judged.case]
    return lambda alarm: any(rule in (case.rule, *case.also) for rule in rivals.NEAREST[alarm])


def _informed() -> set[str]:
    return {case.name for case in INFORMED}


def alarms_of(name: str) -> Callable[[Judged], Sequence[str]]:
    """The alarms of one rival."""
    return lambda judged: dict(judged.alarms)[name]


def grid(
    seeds: int, only: Sequence[str] = (), *, full: bool = False
) -> Iterator[tuple[zoo.Case, int, int, int]]:
    """Every model, a seed after the other: three of its nine sizes with each seed, in turn, or all nine."""
    for seed in range(seeds):
        for name, (widths, depths) in AXES.items():
            if only and name not in only:
                continue
            for (i, width), (j, depth) in product(enumerate(widths), enumerate(depths)):
                if full or (i + seed) % 3 == j:
                    yield CASES[name], width, depth, seed


def show(models: Sequence[Judged], console: Console) -> None:
    """Print the tables, a half at a time, and what gradflow got wrong in the half that may be looked at."""
    for half in HALVES:
        mine = [m for m in models if m.half == half]
        if not mine:
            continue
        healthy = [m for m in mine if not CASES[m.case].rule]
        console.print(
            f"\n{half}: {len(mine)} models, {len(healthy)} of them healthy", style="bold", highlight=False
        )
        console.print(_tools(mine, healthy))
        console.print(_rules(mine))
    for m in models:
        wrong = CASES[m.case].rule and not hit(m)
        if m.half == "tuned" and (wrong or extra(m)):
            said = ", ".join(f"{s.rule} {s.severity} {s.first}–{s.last}" for s in m.findings) or "nothing"
            console.print(f"tuned {m.case} width {m.width} depth {m.depth} seed {m.seed}: {said}")


def _tools(mine: Sequence[Judged], healthy: Sequence[Judged]) -> Table:
    table = Table("tool", "precision", "recall", "F1", "false alarms on healthy", title="tools")
    rows = [("gradflow", overall(mine), sum(bool(m.findings) for m in healthy))]
    rows.append(("gradflow, detects", detects(mine, lambda m: m.findings), rows[0][2]))
    for name, _ in rivals.RIVALS:
        alarms = alarms_of(name)
        false = sum(bool(alarms(m)) for m in healthy)
        rows.append((f"{name}, detects", detects(mine, alarms), false))
        rows.append((f"{name}, names", names(mine, alarms), false))
    for name, score, false in rows:
        table.add_row(name, *score.cells(), f"{false} of {len(healthy)}")
    return table


def _rules(mine: Sequence[Judged]) -> Table:
    table = Table("rule", "precision", "recall", "F1", "hits", "misses", "false", title="gradflow, by rule")
    spoken = {said.rule for m in mine for said in extra(m)}
    for rule in sorted({CASES[m.case].rule for m in mine if CASES[m.case].rule} | spoken):
        score = of_rule(mine, rule)
        table.add_row(rule, *score.cells(), str(score.hits), str(score.misses), str(score.false))
    return table


def main() -> None:
    """Judge the models, or show an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--full", action="store_true", help="all nine sizes with each seed")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--half", choices=HALVES, help="only the models of one half")
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="every Nth model"
    )
    parser.add_argument("--results", type=Path, help="append each verdict, and skip those the file holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = list(_judge_all(options))
    show(models, Console(width=110))


def _judge_all(options: argparse.Namespace) -> Iterator[Judged]:
    known = {(m.case, m.width, m.depth, m.seed): m for m in read(options.results)}
    models = [
        model
        for model in grid(options.seeds, options.only, full=options.full)
        if options.half in (None, half_in(*model))
    ]
    for case, width, depth, seed in models[options.part[0] :: options.part[1]]:
        judged = known.get((case.name, width, depth, seed))
        if judged is None:
            started = time.process_time()
            judged = judge(case, width, depth, seed)
            seconds = time.process_time() - started
            print(f"{case.name} {width} {depth} {seed}: {seconds:.1f} s", file=sys.stderr, flush=True)
            append(options.results, judged)
        yield judged


def read(path: Path | None) -> list[Judged]:
    """Verdicts of an earlier run; none without a file."""
    if path is None or not path.exists():
        return []
    return [_judged(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _judged(row: dict[str, Any]) -> Judged:
    findings = tuple(Said(**said) for said in row.pop("findings"))
    alarms = tuple((name, tuple(kinds)) for name, kinds in row.pop("alarms"))
    return Judged(findings=findings, alarms=alarms, **row)


def append(path: Path | None, judged: Judged) -> None:
    """Write one verdict as a line of JSON."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(judged)) + "\n")


if __name__ == "__main__":
    main()
