"""Inputs for a model that says nothing about them: try, read the error, try again.

A first guess comes from the model's config, the names of its arguments and its first layers. Each failed try
names the op, the input it came from and the size it wanted (``trial``, ``refinement``), which gives the next
guesses. Tries run on a copy, so the model is as found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gradflow.errors import InputError, ModelError
from gradflow.recording.config_guesses import config_guesses
from gradflow.recording.failures import describe_failure
from gradflow.recording.guesses import Drawing, Guess, Guesses, first_layers, sizes_for, widths_made
from gradflow.recording.message_refinements import refine_message
from gradflow.recording.name_guesses import name_guesses
from gradflow.recording.op_refinements import refine_op
from gradflow.recording.refinement import Search, Step
from gradflow.recording.signatures import ForwardSignature, forward_signature
from gradflow.recording.trial import Failure, TrialResult, Trials, unwrapped

Call = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]

MAX_TRIES = 80
MAX_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InferredInputs:
    """Inputs that ran, or the best there were where the model itself is at fault."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any = None
    """What the model returned for them, without gradients; None where it failed."""


def infer_inputs(
    module: nn.Module,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    source: str = "model.py",
    call: Call | None = None,
) -> InferredInputs:
    """Work out inputs that a model runs with, leaving it and every random state as they are.

    A model that raises whatever it is given (its own code is wrong further in) gets the inputs that came
    furthest, so that running it shows its own error.

    Args:
        module: The model.
        batch_size: Samples; None for what suits the kind of input.
        seed: Of the values.
        dtype: Of floating inputs.
        source: The target as a command line starts with it, for messages.
        call: How the model is run with the arguments; None for calling it.

    Raises:
        InputError: No guess fits; the message says what was tried and how to give an input.
    """
    signature = forward_signature(module)
    drawing = Drawing(seed=seed, dtype=dtype, device=_device(module))
    inference = _Inference(module, signature, drawing, batch_size, call or _called)
    result = inference.run()
    if result is not None:
        guesses, outputs = result
        return _as_call(drawing.draw(guesses), signature, outputs)
    if inference.furthest is None:
        raise InputError(f"{type(unwrapped(module)).__name__}.forward takes nothing that could be guessed")
    guesses, failure = inference.furthest
    if isinstance(describe_failure(failure.error, module, "forward"), ModelError):
        return _as_call(drawing.draw(guesses), signature, None)
    raise InputError(_nothing_fits(module, guesses, failure, len(inference.tried), source)) from failure.error


def _called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


def _device(module: nn.Module) -> torch.device:
    first = next(iter([*module.parameters(), *module.buffers()]), None)
    return first.device if first is not None else torch.device("cpu")


class _Inference:
    """One search: a stack of guesses, the most promising on top."""

    def __init__(
        self,
        module: nn.Module,
        signature: ForwardSignature,
        drawing: Drawing,
        batch_size: int | None,
        call: Call,
    ) -> None:
        self.signature = signature
        self.drawing = drawing
        self.call = call
        self.trials = Trials(module)
        self.search = Search(sizes=sizes_for(module, batch_size), widths=widths_made(module))
        self.starts = _starts(unwrapped(module), signature, self.search, batch_size)
        self.tried: dict[str, None] = {}
        self.furthest: tuple[Guesses, Failure] | None = None

    def run(self) -> tuple[Guesses, Any] | None:
        """Return the first guesses that run, with the outputs; None when there is nothing left to try."""
        deadline = time.monotonic() + MAX_SECONDS
        for start in self.starts:
            stack = [start]
            # A start that leads nowhere must leave tries for the others.
            budget = len(self.tried) + MAX_TRIES // 2
            while stack and len(self.tried) < min(budget, MAX_TRIES) and time.monotonic() < deadline:
                guesses = stack.pop()
                if repr(guesses) in self.tried or not all(g.affordable for g in guesses.values()):
                    continue
                result = self.attempt(guesses)
                if result.failure is None:
                    return guesses, result.outputs
                stack.extend(reversed(list(self._refined(guesses, result.failure))))
        return None

    def attempt(self, guesses: Guesses) -> TrialResult:
        """Try one guess and remember it."""
        self.tried[repr(guesses)] = None
        drawn = self.drawing.draw(guesses)
        call = _as_call(drawn, self.signature, None)
        result = self.trials.run(drawn, lambda model: self.call(model, call.args, call.kwargs))
        if result.failure is not None and (
            self.furthest is None or result.failure.progress > self.furthest[1].progress
        ):
            self.furthest = (guesses, result.failure)
        return result

    def _refined(self, guesses: Guesses, failure: Failure) -> Iterator[Guesses]:
        step = Step(failure=failure, guesses=guesses, search=self.search)
        yield from refine_op(step)
        yield from refine_message(step)


def _starts(
    module: nn.Module, signature: ForwardSignature, search: Search, batch_size: int | None
) -> Iterator[Guesses]:
    yield from config_guesses(module, signature, batch_size)
    yield from name_guesses(module, signature, search.sizes)


def _as_call(drawn: dict[str, Any], signature: ForwardSignature, outputs: Any) -> InferredInputs:
    """Pass the leading arguments by position and the rest by name."""
    args, kwargs = [], dict(drawn)
    for name in signature.positional:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    return InferredInputs(args=tuple(args), kwargs=kwargs, outputs=outputs)


def _nothing_fits(module: nn.Module, guesses: Guesses, failure: Failure, tries: int, source: str) -> str:
    shown = ", ".join(f"{name} {guess.words()}" for name, guess in guesses.items())
    reason = describe_failure(failure.error, module, "forward")
    layers = first_layers(unwrapped(module), sizes_for(module, None))
    first = f" The first layer is {layers[0][0] or type(module).__name__}: {layers[0][1]}." if layers else ""
    return (
        f"no inputs could be worked out for {type(unwrapped(module)).__name__} in {tries} tries; "
        f"the closest was {shown or 'nothing'}: {reason}.{first} Give them yourself, for example\n"
        f"  gradflow inspect {source} {example_command(guesses)}\n"
        "or define get_inputs() in the file"
    )


def example_command(guesses: Guesses) -> str:
    """Write guesses as ``--input`` options, for a person to correct."""
    return " ".join(f"--input {name}={_spec(guess)}" for name, guess in guesses.items()) or "--input 8x16"


def _spec(guess: Guess) -> str:
    shape = "x".join(map(str, (guess.parts[0] if guess.parts else replace(guess)).shape)) or "scalar"
    return f"{shape}:int64:0..{guess.high - 1}" if guess.kind == "ids" else shape
