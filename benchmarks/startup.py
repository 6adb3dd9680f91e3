"""How long a start takes: `gradflow --help` beyond its libraries, `gradflow inspect` beside a bare step.

Every pair runs both commands as fresh processes, one after the other, and the order turns over from pair to
pair, so that a machine that slows down slows both. What is judged is the median over the pairs. Exits with 1
when a limit is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SMALL_MODEL = str(Path(__file__).with_name("small_model.py"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two commands, and what of their times is judged."""

    name: str
    gradflow: tuple[str, ...]
    bare: tuple[str, ...]
    judge: Callable[[float, float], float]
    """(seconds of gradflow, seconds of bare) -> the number that the limit is for."""
    unit: str
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """What one process took: on the clock, and on the processors (user and system)."""

    wall: float
    cpu: float


COMPARISONS = (
    Comparison(
        name="gradflow --help, beyond `import typer, rich`",
        gradflow=("-m", "gradflow", "--help"),
        bare=("-c", "import typer, rich"),
        judge=lambda ours, bare: ours - bare,
        unit="s",
        limit=0.25,
    ),
    Comparison(
        name="gradflow inspect small_model.py, by a bare step",
        gradflow=("-m", "gradflow", "inspect", SMALL_MODEL),
        bare=(SMALL_MODEL,),
        judge=lambda ours, bare: ours / bare,
        unit="×",
        limit=1.3,
    ),
)


def run(arguments: tuple[str, ...]) -> Seconds:
    """Run Python with ``arguments`` once. Raises CalledProcessError when it fails."""
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Seconds(wall=wall, cpu=cpu)


def run_pairs(comparison: Comparison, pairs: int) -> list[tuple[Seconds, Seconds]]:
    """Return (gradflow, bare) of every pair, after one of each that only fills the caches."""
    run(comparison.gradflow), run(comparison.bare)
    done = []
    for index in range(pairs):
        if index % 2:
            bare = run(comparison.bare)
            done.append((run(comparison.gradflow), bare))
        else:
            ours = run(comparison.gradflow)
            done.append((ours, run(comparison.bare)))
    return done


def row(comparison: Comparison, timed: list[tuple[Seconds, Seconds]]) -> tuple[str, bool]:
    """Return the table's line for a comparison, and whether its limit holds."""
    wall = [comparison.judge(ours.wall, bare.wall) for ours, bare in timed]
    cpu = [comparison.judge(ours.cpu, bare.cpu) for ours, bare in timed]
    low, median, high = statistics.quantiles(wall, n=4)
    ours = statistics.median(ours.wall for ours, _ in timed)
    bare = statistics.median(bare.wall for _, bare in timed)
    unit = comparison.unit
    line = (
        f"{comparison.name:<50}{ours:>7.2f}{bare:>7.2f}   {median:5.2f} {unit} [{low:.2f}–{high:.2f}]"
        f"   {statistics.median(cpu):5.2f} {unit}   ≤ {comparison.limit} {unit}"
    )
    return line, median <= comparison.limit


def main() -> int:
    """Time both comparisons and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=11, help="pairs of runs a comparison, 9 or more")
    pairs = max(9, parser.parse_args().pairs)
    print(f"{'seconds of wall clock; median of ' + str(pairs) + ' pairs':<50}{'ours':>7}{'bare':>7}", end="")
    print("   judged [quartiles]    CPU      limit")
    held = True
    for comparison in COMPARISONS:
        line, holds = row(comparison, run_pairs(comparison, pairs))
        print(line if holds else f"{line}   MISSED", flush=True)
        held = held and holds
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
