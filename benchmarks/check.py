"""What `gradflow check` of five targets takes, beside inspecting each of them.

Five `gradflow inspect` in fresh processes import torch five times, and `check` once. So that this does not hide
what `check` itself costs, four imports are taken off their sum. Every round runs check, the inspections and a
bare `import torch` one after another; what is judged is the median of the rounds' ratios. Exits with 1 when it
is above the limit. On a busy machine the ratio of processor seconds, user and system, says more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SAMPLES = Path(__file__).resolve().parents[1] / "sample_models"
TARGETS = (
    "deep_sigmoid_mlp",
    "residual_sigmoid_mlp",
    "unused_head",
    "prenorm_transformer",
    "zero_gamma_resnet",
)
LIMIT = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """What processes took: on the clock, and on the processors."""

    wall: float
    cpu: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(wall=self.wall + other.wall, cpu=self.cpu + other.cpu)


def _now() -> Seconds:
    times = os.times()
    return Seconds(wall=time.perf_counter(), cpu=times.children_user + times.children_system)


def seconds(*arguments: str) -> Seconds:
    """Run Python with these arguments; findings (exit 1) are no failure."""
    before = _now()
    command = [sys.executable, *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    after = _now()
    if done.returncode > 1:
        raise SystemExit(f"{' '.join(arguments)} exited with {done.returncode}:\n{done.stderr}")
    return Seconds(wall=after.wall - before.wall, cpu=after.cpu - before.cpu)


def one_round(files: list[str]) -> tuple[Seconds, Seconds, Seconds]:
    """What the check took, of the inspections together, and of one import of torch."""
    check = seconds("-m", "gradflow", "check", *files)
    inspections = sum((seconds("-m", "gradflow", "inspect", file) for file in files), Seconds(wall=0, cpu=0))
    return check, inspections, seconds("-c", "import torch")


def ratio_line(timed: list[tuple[float, float, float]], targets: int, unit: str) -> tuple[str, float]:
    """One line of the table, and the median ratio of a check to the inspections with torch imported once."""
    alone = [total - (targets - 1) * torch for _, total, torch in timed]
    ratio = statistics.median(row[0] / once for row, once in zip(timed, alone, strict=True))
    check, total, _ = (statistics.median(column) for column in zip(*timed, strict=True))
    once = statistics.median(alone)
    return f"{unit:<12}{check:>9.2f}{total:>14.2f}{once:>26.2f}{ratio:>10.2f}", ratio


def main() -> int:
    """Time the rounds and print a line a clock."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    files = [str(SAMPLES / f"{name}.py") for name in TARGETS]
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where no pyproject.toml adds to it
        one_round(files)
        timed = [one_round(files) for _ in range(rounds)]
    wall, ratio = ratio_line([tuple(each.wall for each in row) for row in timed], len(files), "wall clock")
    cpu, _ = ratio_line([tuple(each.cpu for each in row) for row in timed], len(files), "processors")
    print(f"medians of {rounds} rounds, seconds")
    print(f"{'':<12}{'check':>9}{'inspections':>14}{'with torch imported once':>26}{'ratio':>10}")
    print(f"{wall}   ≤ {LIMIT}{'' if ratio <= LIMIT else '   MISSED'}")
    print(cpu)
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
