"""A target's inputs, by the contract's order: command line, file, module, inference."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gradflow.errors import InputError
from gradflow.recording.batches import cut, fitted, one_batch, placed, read_batches
from gradflow.recording.input_inference import infer_inputs
from gradflow.recording.input_specs import parse_inputs
from gradflow.recording.lightning_bridge import has_forward, labelled, training_step
from gradflow.recording.model_choice import BuiltModel
from gradflow.recording.signatures import forward_signature
from gradflow.recording.target_types import Batch, TargetOptions
from gradflow.recording.trial import unwrapped

DECLARATIONS = ("example_inputs", "get_inputs", "example_input_array")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundInputs:
    """Inputs and where they came from."""

    batches: tuple[Batch, ...]
    source: str
    """ "--input", "get_inputs()", "dummy_inputs", "inferred"."""
    from_iterable: bool = False
    """True for batches of a data loader, which may hold labels that forward does not take."""
    outputs: Any = None
    """What the model returned for them while they were inferred; None where it has not run."""
    notes: tuple[str, ...] = ()


def find_inputs(
    built: BuiltModel,
    file: ModuleType,
    options: TargetOptions,
    *,
    source: str,
    cut_to: int | None,
    dtype: torch.dtype | None,
) -> FoundInputs:
    """Find the inputs of a built model, on its device and in its dtype.

    Args:
        built: The model, with the inputs that it was returned with, if any.
        file: Where ``example_inputs`` and its like are looked up first.
        options: ``--input`` and the seed.
        source: The target as a command line starts with it, for messages.
        cut_to: How many samples to keep of declared inputs, or to infer; None for as many as there are.
        dtype: What floating inputs follow; None leaves them.
    """
    module = unwrapped(built.module)
    found = _from_options(module, options, dtype) or _declared(built, file, module) or _dummies(module)
    if found is None:
        inferred = infer_inputs(
            built.module,
            batch_size=cut_to if cut_to is not None else _file_batch_size(file, options),
            seed=options.seed,
            dtype=dtype or _float_dtype(module),
            source=source,
            call=None if has_forward(module) else _labelled_step,
        )
        batch = Batch(args=inferred.args, kwargs=inferred.kwargs, lone=len(inferred.args) == 1)
        return FoundInputs(batches=(batch,), source="inferred", outputs=inferred.outputs)
    device = _device(module)
    explicit = found.source == "--input"
    signature = forward_signature(module)
    batches = tuple(
        fitted(placed(batch, device, None if explicit else dtype), signature) for batch in found.batches
    )
    if cut_to is not None:
        batches = tuple(cut(batch, cut_to) for batch in batches)
    return FoundInputs(batches=batches, source=found.source, from_iterable=found.from_iterable)


def _labelled_step(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a LightningModule that has no forward; what its step returns are no outputs."""
    training_step(module, labelled(args[0]))


def _file_batch_size(file: ModuleType, options: TargetOptions) -> int | None:
    return getattr(file, "batch_size", None) if options.batch_size is not None else None


def _device(module: nn.Module) -> torch.device:
    first = next(iter([*module.parameters(), *module.buffers()]), None)
    return first.device if first is not None else torch.device("cpu")


def _float_dtype(module: nn.Module) -> torch.dtype:
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(floating, torch.get_default_dtype())


def _from_options(module: nn.Module, options: TargetOptions, dtype: torch.dtype | None) -> FoundInputs | None:
    specs = parse_inputs(options.inputs)
    if not specs:
        return None
    signature = forward_signature(module)
    for spec in specs:
        if spec.name is not None and not signature.accepts(spec.name):
            listed = ", ".join(signature.names)
            raise InputError(f"--input {spec.name}=…: forward takes no {spec.name!r}, only {listed}")
    generator = torch.Generator().manual_seed(options.seed)
    drawn = [(spec.name, spec.draw(generator, dtype or _float_dtype(module))) for spec in specs]
    args = tuple(tensor for name, tensor in drawn if name is None)
    kwargs = {name: tensor for name, tensor in drawn if name is not None}
    batch = Batch(args=args, kwargs=kwargs, lone=len(args) == 1)
    return FoundInputs(batches=(batch,), source="--input")


def _declared(built: BuiltModel, file: ModuleType, module: nn.Module) -> FoundInputs | None:
    if built.inputs is not None:
        return _read(built.inputs, f"{built.name}()")
    for holder in (file, module):
        for name in DECLARATIONS:
            value = getattr(holder, name, None)
            if value is not None:
                return _read(value, f"{name}()" if callable(value) else name)
    return None


def _read(value: Any, source: str) -> FoundInputs:
    batches = read_batches(value, source)
    return FoundInputs(batches=batches, source=source, from_iterable=len(batches) > 1)


def _dummies(module: nn.Module) -> FoundInputs | None:
    """``dummy_inputs`` of the module's own class, where forward takes such arguments.

    The base class of ``transformers`` has placeholder ids for every model, which most of its models that
    read images or sound inherit and none of them can use; so an inherited placeholder says nothing.
    """
    owner = next((cls for cls in type(module).__mro__ if "dummy_inputs" in vars(cls)), None)
    if owner is not None and owner.__name__ == "PreTrainedModel":
        return None
    try:
        value = getattr(module, "dummy_inputs", None)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None  # a property that its config does not support
    if not isinstance(value, (dict, tuple, list, torch.Tensor)):
        return None
    signature = forward_signature(module)
    if isinstance(value, dict) and not all(signature.accepts(str(name)) for name in value):
        return None
    return FoundInputs(batches=(one_batch(value, "dummy_inputs"),), source="dummy_inputs")
