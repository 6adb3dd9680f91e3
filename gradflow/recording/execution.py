"""Target -> Trace: seeded steps on a model that is left exactly as it was found."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from gradflow._version import __version__
from gradflow.errors import InputError, UsageError
from gradflow.recording.ablation import AblationRequest, ablate
from gradflow.recording.garbage import collect_young, collection_paused
from gradflow.recording.layout import COMPILED_CHILD, layout_of
from gradflow.recording.leaves import tensor_leaves
from gradflow.recording.medians import median_step, site_key
from gradflow.recording.overwrite_proof import Proof
from gradflow.recording.path_passes import PathRequest, Paths, record_paths
from gradflow.recording.records import StepRecord
from gradflow.recording.running_loss import with_running_loss
from gradflow.recording.seeding import random_state_kept, seed_everything
from gradflow.recording.signatures import forward_signature
from gradflow.recording.snapshot import Snapshot, preserved
from gradflow.recording.sources import class_sources
from gradflow.recording.steps import Job, blamed_on, find_origins, prove_overwrites, run_step
from gradflow.recording.target import Batch, Target
from gradflow.recording.underflow import with_underflow
from gradflow.recording.updates import Updates, with_updates
from gradflow.trace_model import NonFiniteOrigin, ResidualRecord, RunInfo, Trace

Progress = Callable[[str], None]


@collection_paused()
def record(
    target: Target,
    *,
    seed: int = 0,
    steps: int = 1,
    trained: bool = False,
    mode: str | None = None,
    progress: Progress | None = None,
    ablation: AblationRequest | None = None,
    paths: PathRequest | None = None,
) -> Trace:
    """Run forward and backward and return what was seen.

    Args:
        target: The model with its inputs and loss.
        seed: Seed of the first step; step k runs with seed + k.
        steps: How many; numbers in the trace are medians over them.
        trained: The parameters come from training, so rules about initialisation step back.
        mode: "train", "eval", or None to run each module in the mode it is in.
        progress: Told in a few words what is going on.
        ablation: Also leave out each branch in turn, or greedily; None for not.
        paths: Also take the gradient of the first step apart by how many branches it came through; None for not.

    Raises:
        UsageError: ``steps`` is below one, or the inputs do not fit.
        ModelError: The model raised, in forward, loss or backward.
    """
    _check(target, steps)
    say = progress or (lambda phrase: None)
    with random_state_kept(), _room_for_hooks():
        module, notes = _runnable(target, seed)
        with preserved(module, _input_tensors(target)) as snapshot, _eager():
            if mode is not None:
                module.train(mode == "train")
            job = _job(target, module, snapshot)
            recorded = tuple(_steps(job, steps, seed, say))
            median = with_underflow(job, median_step(recorded), target.batches[0], seed)
            median, updates = with_updates(job, median, target.batches, seed, steps)
            origins = _origins(job, recorded, seed, say)
            residuals = _proved(job, recorded, median.residuals, seed, say)
            without = None if ablation is None else ablate(job, median.residuals, steps, seed, ablation)
            apart = _paths(job, median.residuals, seed, paths, say)
            notes = (*notes, *median.notes)
            run = _run_info(job, recorded, updates, seed=seed, trained=trained, notes=notes)
            run = with_running_loss(run, job, recorded[0], target.batches[0], seed)
    return Trace(
        run=run,
        layers=median.layers,
        parameters=median.parameters,
        trunk=median.trunk,
        side_trunks=median.side_trunks,
        residuals=residuals,
        origins=origins,
        activations=median.activations,
        batch_norms=median.batch_norms,
        ablation=without,
        paths=apart.streams,
        paths_note=apart.note,
        attentions=median.attentions,
    )


def _check(target: Target, steps: int) -> None:
    """Refuse what runs and yet measures nothing.

    Raises:
        UsageError: No steps, or parameters without values.
        InputError: Inputs without a sample.
    """
    if steps < 1:
        raise UsageError(f"{steps} steps were asked for; at least one is needed")
    for name, parameter in target.module.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f"{name} is on the meta device, where a tensor has a shape and no values: build the model on "
                "a real device, or fill it with module.to_empty(device=...) and its weights"
            )
    tensors = _input_tensors(target)
    if tensors and not any(tensor.numel() for tensor in tensors):
        shapes = ", ".join("×".join(map(str, tensor.shape)) for tensor in tensors)
        raise InputError(f"the inputs hold no sample ({shapes}): at least one is needed")


@contextmanager
def _room_for_hooks() -> Iterator[None]:
    """Allow twice the recursion: hooks add frames to each level of nesting, and a deep model has few left."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(2 * limit)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _steps(job: Job, steps: int, seed: int, say: Progress) -> Iterator[StepRecord]:
    for step in range(steps):
        if step:
            collect_young()
        say(f"step {step + 1} of {steps}" if steps > 1 else "forward and backward")
        yield run_step(job, _batch(job.target, step), seed + step)


def _batch(target: Target, step: int) -> Batch:
    return target.batches[step % len(target.batches)]


def _origins(
    job: Job, recorded: tuple[StepRecord, ...], seed: int, say: Progress
) -> tuple[NonFiniteOrigin, ...]:
    for step, done in enumerate(recorded):
        if done.has_nonfinite:
            say("looking for the first non-finite value")
            return find_origins(job, _batch(job.target, step), seed + step)
    return ()


def _paths(
    job: Job, residuals: tuple[ResidualRecord, ...], seed: int, request: PathRequest | None, say: Progress
) -> Paths:
    if request is None:
        return Paths()
    say("the gradient by the branches it came through")
    return record_paths(job, _batch(job.target, 0), seed, residuals, request)


def _proved(
    job: Job,
    recorded: tuple[StepRecord, ...],
    residuals: tuple[ResidualRecord, ...],
    seed: int,
    say: Progress,
) -> tuple[ResidualRecord, ...]:
    """The sites, those with an overwritten skip with how far it is off; from the first step that has any."""
    for step, done in enumerate(recorded):
        if done.accused:
            say("measuring overwritten skips")
            proofs = prove_overwrites(job, _batch(job.target, step), seed + step, done.accused)
            found = {site_key(row): proofs[row.order] for row in done.residuals if row.order in proofs}
            return tuple(_with_proof(row, found.get(site_key(row))) for row in residuals)
    return residuals


def _with_proof(row: ResidualRecord, proof: Proof | None) -> ResidualRecord:
    if proof is None or row.overwritten is None:
        return row
    return replace(row, overwritten=replace(row.overwritten, change=proof.change, distance=proof.distance))


def _runnable(target: Target, seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    """The module to run: out of its wrappers, and a copy where lazy parameters have yet to be made."""
    module, notes = _unwrapped(target.module)
    if any(_is_compiled(child) for child in module.modules()) or "torch.compile" in notes:
        notes = (*(note for note in notes if note != "torch.compile"), "torch.compile: run eager")
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        module = _materialised(module, target, seed)
        notes = (*notes, "lazy modules: a copy was initialised and run")
    return module, notes


def _unwrapped(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    while True:
        if COMPILED_CHILD in module._modules:
            module, notes = module._modules[COMPILED_CHILD] or module, (*notes, "torch.compile")
        elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            notes = (*notes, f"{type(module).__name__}: the module inside was run, on one device")
            module = module.module
        else:
            return module, notes


def _is_compiled(module: nn.Module) -> bool:
    return COMPILED_CHILD in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _materialised(module: nn.Module, target: Target, seed: int) -> nn.Module:
    copied = copy.deepcopy(module)
    seed_everything(seed)
    with torch.no_grad(), blamed_on(copied, "forward"):
        target.forward(copied, target.batches[0])
    return copied


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled code runs as it was written, also what the model compiles only as it runs (flex_attention does).

    Dynamo is not loaded before there is something to compile.
    """
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    original: Any = torch.compile
    with ExitStack() as stack:

        def compile_eager(*args: Any, **options: Any) -> Any:
            _set_compile(original)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            return original(*args, **options)

        _set_compile(compile_eager)
        try:
            yield
        finally:
            _set_compile(original)


def _set_compile(function: Any) -> None:
    vars(torch)["compile"] = function


def _input_tensors(target: Target) -> list[Tensor]:
    return [
        tensor
        for batch in target.batches
        for _, tensor in tensor_leaves((batch.args, dict(batch.kwargs)))
        if tensor.layout is torch.strided
    ]


def _job(target: Target, module: nn.Module, snapshot: Snapshot) -> Job:
    return Job(
        target=target,
        module=module,
        layout=layout_of(module),
        snapshot=snapshot,
        batch_size=_batch_size(target.batches[0]),
        optimized=_optimized(target, module),
    )


def _optimized(target: Target, module: nn.Module) -> frozenset[int] | None:
    """``id`` of each parameter that the optimizer updates, as they are in the module that runs."""
    if target.optimizer is None:
        return None
    updated = {id(p) for group in target.optimizer.param_groups for p in group["params"]}
    given = _unwrapped(target.module)[0].parameters()
    return frozenset(
        id(runs) for runs, own in zip(module.parameters(), given, strict=True) if id(own) in updated
    )


def _batch_size(batch: Batch) -> int:
    """The leading dimension that the inputs share; of inputs that differ, that of the first."""
    values = (*batch.args, *batch.kwargs.values())
    packed = [value for value in values if isinstance(value, PackedSequence)]
    if packed:
        return int(packed[0].batch_sizes[0].item())
    leading = [int(tensor.shape[0]) for _, tensor in tensor_leaves(values) if tensor.dim()]
    return leading[0] if leading else 0


def _run_info(
    job: Job,
    recorded: tuple[StepRecord, ...],
    updates: Updates,
    *,
    seed: int,
    trained: bool,
    notes: tuple[str, ...],
) -> RunInfo:
    target, module = job.target, job.module
    parameters = tuple(module.parameters())
    steps = len(recorded)
    if steps > 1 and len(target.batches) == 1:
        notes = (*notes, "one fixed batch: only the seed varies")
    return RunInfo(
        target=target.name,
        model=type(module).__name__,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        buffers=sum(b.numel() for b in module.buffers()),
        inputs=_input_phrases(target.batches[0], forward_signature(module).positional),
        inputs_from=target.inputs_from,
        loss=target.loss.settled().description,
        loss_values=tuple(step.loss for step in recorded if step.loss is not None),
        optimizer=None if target.optimizer is None else type(target.optimizer).__name__,
        device=", ".join(sorted({str(p.device) for p in parameters})) or "cpu",
        dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) or "",
        mode=_mode(module),
        seed=seed,
        steps=steps,
        batch_size=job.batch_size,
        trained=trained,
        gradflow_version=__version__,
        torch_version=torch.__version__,
        notes=(*target.notes, *notes, *([updates.note] if updates.note else [])),
        optimizer_steps=updates.steps,
        checkpoint=target.checkpoint,
        sources=class_sources(job.layout.names),
    )


def _mode(module: nn.Module) -> str:
    modes = {child.training for child in module.modules()}
    return "mixed" if len(modes) > 1 else "train" if modes == {True} else "eval"


def _input_phrases(batch: Batch, names: tuple[str, ...]) -> tuple[str, ...]:
    """One phrase a tensor: "ids 4×128 int64"; positional ones by what forward calls them."""
    positional = [names[i] if i < len(names) else i for i in range(len(batch.args))]
    named = [*zip(positional, batch.args, strict=True), *batch.kwargs.items()]
    return tuple(
        _phrase(f"{name}.{path}" if path else str(name), tensor)
        for name, value in named
        for path, tensor in tensor_leaves(value)
    )


def _phrase(name: str, tensor: Tensor) -> str:
    shape = "×".join(map(str, tensor.shape)) or "scalar"
    return f"{name} {shape} {str(tensor.dtype).removeprefix('torch.')}"
