"""What recording costs: one forward and backward recorded in full against the same step bare.

Pairs of steps, plain and recorded in turn, on two copies of one model in one process. "Recorded in full" is
what ``gradflow inspect`` records: every row, every gradient, every parameter, the dataflow and the trunk, up to
the frozen records; the model is laid out once, before. Outputs and gradients are compared bit for bit. *floor* is
what one norm of everything that is measured would cost, without a line of Python around it.

    python benchmarks/overhead.py [--pairs 15] [--threads 2] [shape ...]

On Linux the allocator hands memory back and faults it in again, thousands of pages in one step and none in the
next, whoever is watching; for figures that repeat, keep it from doing so, and OpenMP from spinning:

    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 OMP_WAIT_POLICY=PASSIVE python ...
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, Shape
from torch import Tensor, nn

from gradflow.recording.garbage import collection_paused
from gradflow.recording.layout import ModelLayout, layout_of
from gradflow.recording.recorder import Recorder
from gradflow.recording.records import step_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Ratios of one shape, a pair each."""

    shape: Shape
    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    plain_ms: float
    floor: float
    """What it would cost to read everything that is measured once, and do nothing else."""
    identical: bool


def plain_step(model: nn.Module, inputs: Tensor) -> Tensor:
    """Zero, forward, loss, backward."""
    model.zero_grad(set_to_none=True)
    outputs = model(inputs)
    outputs.float().square().mean().backward()
    return outputs


@collection_paused()
def recorded_step(layout: ModelLayout, inputs: Tensor) -> Tensor:
    """The same step with everything recorded."""
    model = layout.module
    model.zero_grad(set_to_none=True)
    recorder = Recorder(layout, batch_size=inputs.shape[0])
    with recorder:
        with recorder.forward((inputs,)):
            outputs = model(inputs)
            loss = outputs.float().square().mean()
        end = recorder.dataflow.node_of(loss)
        loss.backward()
    step_record(recorder, end=end, loss=loss.item(), optimized=None)
    return outputs


def measure(shape: Shape, pairs: int) -> Result:
    """Run pairs after a warm-up, alternating which goes first."""
    torch.manual_seed(0)
    plain = shape.build()
    watched = layout_of(copy.deepcopy(plain))
    inputs = shape.inputs()
    identical = _identical(plain, watched, inputs)
    wall, cpu, base = [], [], []
    for pair in range(pairs + 2):
        order = ((plain_step, plain), (recorded_step, watched))
        times = {}
        for step, model in order if pair % 2 else order[::-1]:
            started, started_cpu = time.perf_counter(), time.process_time()
            step(model, inputs)
            times[step] = (time.perf_counter() - started, time.process_time() - started_cpu)
        if pair >= 2:
            wall.append(times[recorded_step][0] / times[plain_step][0])
            cpu.append(times[recorded_step][1] / times[plain_step][1])
            base.append(times[plain_step][0])
    return Result(
        shape=shape,
        wall=tuple(wall),
        cpu=tuple(cpu),
        plain_ms=statistics.median(base) * 1e3,
        floor=1 + reading_time(plain, inputs) / statistics.median(base),
        identical=identical,
    )


def reading_time(model: nn.Module, inputs: Tensor) -> float:
    """Seconds for one norm of every parameter, its gradient, every module's output, and as many gradients of those."""
    outputs: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _module, _args, output: outputs.append(output.detach()))
        for module in model.modules()
        if not any(module.children())
    ]
    model(inputs)
    for handle in handles:
        handle.remove()
    parameters = [tensor.detach() for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
    gradients = [output.clone() for output in outputs]
    times = []
    for _ in range(9):
        started = time.perf_counter()
        for tensor in (*outputs, *gradients, *parameters):
            torch.linalg.vector_norm(tensor)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _identical(plain: nn.Module, watched: ModelLayout, inputs: Tensor) -> bool:
    torch.manual_seed(1)
    first = plain_step(plain, inputs)
    torch.manual_seed(1)
    second = recorded_step(watched, inputs)
    pairs = zip(plain.parameters(), watched.module.parameters(), strict=True)
    same = all(a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad) for a, b in pairs)
    return same and torch.equal(first, second)


def show(results: list[Result]) -> None:
    """Print a table of medians and quartiles."""
    table = Table(title="recorded step / plain step")
    for heading in (
        "shape",
        "plain ms",
        "wall",
        "quartiles",
        "cpu",
        "floor",
        "limit",
        "goal",
        "bit-identical",
    ):
        table.add_column(heading, justify="left" if heading == "shape" else "right")
    for result in results:
        low, middle, high = statistics.quantiles(result.wall, n=4)
        table.add_row(
            result.shape.name,
            f"{result.plain_ms:.1f}",
            f"{middle:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{statistics.median(result.cpu):.3f}",
            f"{result.floor:.3f}",
            f"{result.shape.limit:.2f}",
            f"{result.shape.goal:.2f}",
            "yes" if result.identical else "NO",
        )
    Console(width=100).print(table)


def main() -> None:
    """Measure the shapes asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", choices=[*(shape.name for shape in SHAPES), []])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = [shape for shape in SHAPES if not options.shapes or shape.name in options.shapes]
    show([measure(shape, options.pairs) for shape in chosen])


if __name__ == "__main__":
    main()
