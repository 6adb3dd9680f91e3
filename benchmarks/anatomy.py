"""What splitting the gradient at residual sums costs: an inspected step with it against the same step without.

The model is shaped as GPT-2 small: 12 layers of width 768, 4 × 128 tokens. Pairs of steps run in turned order in one
process. "With" also profiles the streams; both go up to the frozen records. Limits: a quarter more time, and at the
peak one more tensor of the stream's size. The exact path passes (``paths``), which are asked for, are timed besides.

    python benchmarks/anatomy.py [--pairs 5] [--threads 1] [--paths]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from shapes import GPT2Shape
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gradflow.recording.execution import record
from gradflow.recording.garbage import collection_paused
from gradflow.recording.layout import ModelLayout, layout_of
from gradflow.recording.path_passes import PathRequest
from gradflow.recording.recorder import Recorder
from gradflow.recording.records import step_record
from gradflow.recording.target import target_from_objects
from gradflow.stream_profile import stream_profiles
from gradflow.trace_model import Trace

TIME_LIMIT, MEMORY_LIMIT = 1.25, 1.0
BATCH, LENGTH, WIDTH, VOCABULARY = 4, 128, 768, 8192


@collection_paused()
def inspected_step(layout: ModelLayout, ids: Tensor, blank: Trace, *, splits: bool) -> None:
    """One recorded step, with the gradient split at every sum and the streams profiled, or without."""
    model = layout.module
    model.zero_grad(set_to_none=True)
    recorder = Recorder(layout, batch_size=BATCH, splits=splits)
    with recorder:
        with recorder.forward((ids,)):
            loss = model(ids).float().square().mean()
        end = recorder.dataflow.node_of(loss)
        loss.backward()
    step = step_record(recorder, end=end, loss=float(loss.detach()), optimized=None)
    if splits:
        profiles = stream_profiles(replace(blank, residuals=step.residuals))
        assert profiles[0].measured == len(profiles[0].sites) == 24


def paired_ratios(with_it: Callable[[], None], without: Callable[[], None], pairs: int) -> list[float]:
    """Processor time with, over without, a pair each; the first pair warms up."""
    ratios = []
    for pair in range(pairs + 1):
        times = {}
        for step in (with_it, without) if pair % 2 else (without, with_it):
            started = time.process_time()
            step()
            times[step] = time.process_time() - started
        ratios.append(times[with_it] / times[without])
    return ratios[1:]


def peak_bytes(model: nn.Module, step: Callable[[], None]) -> int:
    """The most bytes of tensors that a step holds at once beyond those it found."""
    model.zero_grad(set_to_none=True)  # what was there before is freed at an unknown size
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    kineto = watched.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in kineto if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return most


def main() -> None:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--paths", action="store_true", help="also time the exact path passes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, ids = GPT2Shape(), torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    target = target_from_objects(copy.deepcopy(model), ids, None, optimizer=None, seed=0)
    started = time.process_time()
    blank = record(target)
    inspect_seconds = time.process_time() - started
    layout = layout_of(model)
    with_it, without = (
        lambda splits=splits: inspected_step(layout, ids, blank, splits=splits) for splits in (True, False)
    )
    ratios = paired_ratios(with_it, without, options.pairs)
    extra = (peak_bytes(model, with_it) - peak_bytes(model, without)) / (BATCH * LENGTH * WIDTH * 4)
    low, middle, high = statistics.quantiles(ratios, n=4)
    show = Console(width=100).print
    verdict = "within" if middle <= TIME_LIMIT else "BEYOND"
    show(f"processor time with / without: {middle:.3f} ({low:.3f}–{high:.3f}), {verdict} {TIME_LIMIT}")
    verdict = "within" if extra <= MEMORY_LIMIT else "BEYOND"
    show(f"peak memory: {extra:+.2f} tensors of the stream's size, {verdict} {MEMORY_LIMIT}")
    if options.paths:
        started = time.process_time()
        orders = len(record(target, paths=PathRequest()).paths[0].norms)
        seconds = time.process_time() - started
        show(f"a whole inspect {inspect_seconds:.1f} s; with {orders} exact orders {seconds:.1f} s")


if __name__ == "__main__":
    main()
