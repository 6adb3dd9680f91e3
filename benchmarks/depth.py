"""What depth costs: a whole ``gradflow.inspect`` of residual nets of 100, 1,000 and 5,000 blocks.

Each net runs in a process of its own, which has inspected a net of one block before. It tells the processor time of the
inspect, which a busy machine does not stretch as it does the clock, and by how much its peak memory rose (resident, not
only Python's). Both, a block, must stay the same from 100 blocks to 5,000, within 1.5 times; of several runs the least
disturbed counts. Three shapes: pre-norm blocks, blocks with a batch normalisation behind each layer, and one
forward that loops over functional blocks.

    python benchmarks/depth.py [--blocks 100 1000 5000] [--shape pre-norm] [--repeat 3]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

BLOCKS = (100, 1_000, 5_000)
SHAPES = ("pre-norm", "batch-norm", "loop")
LIMIT = 1.5
WIDTH, BATCH = 16, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One net: processor seconds, and bytes beyond those that a net of one block had taken."""

    blocks: int
    sites: int
    seconds: float
    plain_seconds: float
    """A bare forward and backward."""
    bytes: float

    @property
    def milliseconds_each(self) -> float:
        return 1e3 * self.seconds / self.blocks

    @property
    def kilobytes_each(self) -> float:
        return self.bytes / 1024 / self.blocks


def measure_here(shape: str, blocks: int) -> dict[str, float]:
    """Build and inspect a net in this process; peak memory is taken before and after."""
    import torch

    import gradflow

    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randn(BATCH, WIDTH)
    gradflow.inspect(_build(shape, 1), inputs)  # what is imported and allocated once
    model = _build(shape, blocks)
    started = time.process_time()
    model(inputs).square().mean().backward()
    plain = time.process_time() - started
    model.zero_grad(set_to_none=True)
    before = _peak()
    started = time.process_time()
    report = gradflow.inspect(model, inputs)
    seconds = time.process_time() - started
    sites = len(report.trace.residuals)
    return {"seconds": seconds, "plain_seconds": plain, "bytes": _peak() - before, "sites": sites}


def _build(shape: str, blocks: int) -> Any:
    """Blocks of two layers; torch is imported only where a net is built."""
    import torch
    from torch import Tensor, nn

    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(torch.relu(self.one(self.norm(x))))

    class BatchNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.bn1 = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
            self.two, self.bn2 = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bn2(self.two(torch.relu(self.bn1(self.one(x)))))

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ones = nn.ParameterList(torch.randn(WIDTH, WIDTH) / WIDTH for _ in range(blocks))
            self.twos = nn.ParameterList(torch.randn(WIDTH, WIDTH) / WIDTH for _ in range(blocks))

        def forward(self, x: Tensor) -> Tensor:
            for one, two in zip(self.ones, self.twos, strict=True):
                x = x + torch.relu(x @ one) @ two
            return x

    if shape == "loop":
        return Loop()
    block = PreNorm if shape == "pre-norm" else BatchNorm
    return nn.Sequential(*(block() for _ in range(blocks)))


def _peak() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(shape: str, blocks: int, repeat: int) -> Result:
    """Run fresh processes and take the least of each number."""
    command = [sys.executable, __file__, "--worker", shape, str(blocks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(repeat):
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    least = {key: min(run[key] for run in runs) for key in runs[0]}
    return Result(
        blocks=blocks,
        sites=int(least["sites"]),
        seconds=least["seconds"],
        plain_seconds=least["plain_seconds"],
        bytes=least["bytes"],
    )


def show(shape: str, results: list[Result]) -> None:
    """A table, and how far the cost of a block strays over depth."""
    table = Table(title=f"inspect of residual nets: {shape}")
    for heading in ("blocks", "sites", "bare step", "inspect", "ms a block", "peak memory", "KiB a block"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            f"{result.blocks:,}",
            f"{result.sites:,}",
            f"{result.plain_seconds:.2f} s",
            f"{result.seconds:.2f} s",
            f"{result.milliseconds_each:.3f}",
            f"+{result.bytes / 2**20:.0f} MiB",
            f"{result.kilobytes_each:.1f}",
        )
    console = Console(width=100)
    console.print(table)
    times = [result.milliseconds_each for result in results]
    # A process's memory grows in steps larger than a small net: judge from 1,000 blocks on.
    memory = [result.kilobytes_each for result in results if result.blocks >= 1_000] or [1.0]
    for what, values in (("time", times), ("memory", memory)):
        spread = max(values) / min(values) if min(values) > 0 else float("inf")
        verdict = "within" if spread <= LIMIT else "BEYOND"
        console.print(f"{what} a block: largest / smallest {spread:.2f}, {verdict} {LIMIT}")
    console.print()


def main() -> None:
    """Measure, or be the measured process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("SHAPE", "BLOCKS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure_here(options.worker[0], int(options.worker[1]))))
        return
    for shape in SHAPES if options.shape == "all" else (options.shape,):
        show(shape, [measure(shape, blocks, options.repeat) for blocks in options.blocks])


if __name__ == "__main__":
    main()
