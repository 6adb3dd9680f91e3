"""What `gradflow check` of five targets takes, beside inspecting each of them.

Five `gradflow inspect` in fresh processes import torch five times, and `check` once. So that this does not hide
what `check` itself costs, four imports are taken off their sum. Every round runs check, the inspections and a
bare `import torch` one after another; what is judged is the median of the rounds' ratios. Exits with 1 when it
is above the limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
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


def seconds(*arguments: str) -> float:
    """Run Python with these arguments; findings (exit 1) are no failure."""
    start = time.perf_counter()
    command = [sys.executable, *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    taken = time.perf_counter() - start
    if done.returncode > 1:
        raise SystemExit(f"{' '.join(arguments)} exited with {done.returncode}:\n{done.stderr}")
    return taken


def one_round(files: list[str]) -> tuple[float, float, float]:
    """Seconds of the check, of the inspections together, and of one import of torch."""
    check = seconds("-m", "gradflow", "check", *files)
    inspections = sum(seconds("-m", "gradflow", "inspect", file) for file in files)
    return check, inspections, seconds("-c", "import torch")


def main() -> int:
    """Time the rounds and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    files = [str(SAMPLES / f"{name}.py") for name in TARGETS]
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where no pyproject.toml adds to it
        one_round(files)
        timed = [one_round(files) for _ in range(rounds)]
    ratios = [check / (total - (len(files) - 1) * torch) for check, total, torch in timed]
    check, total, torch = (statistics.median(column) for column in zip(*timed, strict=True))
    ratio = statistics.median(ratios)
    print(f"check of {len(files)} targets  {check:.2f} s, medians of {rounds} rounds")
    print(
        f"sum of their inspections  {total:.2f} s, with torch imported once {total - (len(files) - 1) * torch:.2f} s"
    )
    print(f"ratio to the latter       {ratio:.2f}   ≤ {LIMIT}{'' if ratio <= LIMIT else '   MISSED'}")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
