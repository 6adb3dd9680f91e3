"""What an error of Python code (a layer's own check, an unpacking, an assertion) says about the inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gradflow.recording.guesses import SEQUENCE, Guess, Guesses
from gradflow.recording.refinement import Step, reshaped
from gradflow.recording.tracebacks import frames

_TOO_SMALL = ("too small", "greater than actual", "more than 1 value per channel", "should be less than")
_LARGEST_NUMBER = 2048


def refine_message(step: Step) -> Iterator[Guesses]:
    """Propose better guesses from the layer that raised and the words it used."""
    text = str(step.failure.error)
    yield from _layer(step)
    yield from _hidden_state(step, text)
    yield from _dimensions(step, text)
    yield from _missing_value(step, text)
    yield from _single_ids(step)
    if "batch sizes > 1" in text:
        yield {name: replace(g, shape=(1, *g.shape[1:])) for name, g in step.guesses.items() if g.shape}
    if any(words in text for words in _TOO_SMALL):
        yield from step.grown()
    yield from _dtypes(step, text)
    yield from _numbers(step, text)


def _layer(step: Step) -> Iterator[Guesses]:
    """A layer of torch.nn that checked its input itself: recurrent ones, nn.Transformer."""
    for frame, _ in frames(step.failure.error):
        layer, local = frame.f_locals.get("self"), frame.f_locals
        if isinstance(layer, nn.RNNBase) and isinstance(local.get("args"), tuple):
            yield from _recurrent(step, layer, next(iter(local["args"]), local["kwargs"].get("input")))
        elif isinstance(layer, nn.RNNCellBase):
            yield from _features(step, local.get("input"), layer.input_size, 2)
        elif isinstance(layer, nn.Transformer):
            for name in ("src", "tgt"):
                yield from _features(step, local.get(name), layer.d_model, 3)


def _recurrent(step: Step, layer: nn.RNNBase, data: Any) -> Iterator[Guesses]:
    """A recurrent layer takes one sequence without a batch too, which is never meant."""
    origin = step.origin(data)
    sequence = step.search.sizes.sequence(layer.input_size, batch_first=layer.batch_first)
    if origin is not None and origin.name is not None:
        ndim = len(step.guesses[origin.name].shape)
        if data.dim() == ndim and ndim != 3:
            yield step.changed(origin.name, sequence)
    yield from _features(step, data, layer.input_size, 3)


def _features(step: Step, data: Any, features: int, ndim: int) -> Iterator[Guesses]:
    if not isinstance(data, Tensor):
        return
    if not data.is_floating_point():
        yield from step.retyped(data, "float")
    elif data.dim() != ndim:
        yield from step.with_ndim(data, ndim)
    elif data.shape[-1] != features:
        yield from step.with_size(data, ndim - 1, features)


def _hidden_state(step: Step, text: str) -> Iterator[Guesses]:
    """ "Expected hidden size (2, 4, 32), got [4, 16]": the state is an input of its own."""
    found = re.search(r"Expected hidden(?:\[\d\])? size \(([\d, ]+)\)", text)
    if found is None:
        return
    shape = tuple(int(size) for size in found[1].split(","))
    for name in step.guesses:
        if is_state(name):
            state = Guess(shape=shape)
            yield step.changed(name, Guess(parts=(state, state)) if "hidden[" in text else state)


def is_state(name: str) -> bool:
    """Tell whether an argument is named like the state of a recurrent layer."""
    return name in (
        "hidden",
        "state",
        "states",
        "h",
        "h0",
        "h_0",
        "hx",
        "hc",
        "c0",
        "prev_state",
        "init_state",
    )


def _dimensions(step: Step, text: str) -> Iterator[Guesses]:
    wanted = _wanted_ndims(text)
    if not wanted:
        return
    for tensor in _input_tensors(step):
        for ndim in wanted:
            if tensor.dim() != ndim:
                yield from step.with_ndim(tensor, ndim)
                return


def _wanted_ndims(text: str) -> list[int]:
    if (found := re.search(r"values to unpack \(expected (?:at least )?(\d)", text)) is not None:
        return [int(found[1])]
    if (found := re.search(r"expected (\d)D(?: or (\d)D)?.*input", text, re.I)) is not None:
        return [int(size) for size in (found[2], found[1]) if size]
    found = re.search(
        r"Dimension out of range \(expected to be in range of \[-?\d+, \d+\], but got (-?\d+)", text
    )
    if found is None:
        return []
    index = int(found[1])
    return [index + 1 if index >= 0 else -index]


def _input_tensors(step: Step) -> Iterator[Tensor]:
    """Tensors made from the inputs, nearest the error first: the op's own, then the frames' variables."""
    yield from (arg for arg in step.failure.args if step.origin(arg) is not None)
    for frame, _ in reversed(list(frames(step.failure.error))):
        for value in frame.f_locals.values():
            if isinstance(value, Tensor) and step.origin(value) is not None:
                yield value


def _missing_value(step: Step, text: str) -> Iterator[Guesses]:
    """An argument tried as None that the model needs after all."""
    for name, guess in step.guesses.items():
        if guess.kind == "value" and guess.value is None and "None" in text:
            first = next(iter(step.guesses.values()))
            yield step.changed(name, replace(first, kind="ones", free=()))
            yield step.changed(name, first)


def _dtypes(step: Step, text: str) -> Iterator[Guesses]:
    if re.search(r"must be (?:a )?(?:long|int)|indices.*(?:long|int)|expected.*type Long", text, re.I):
        for name, guess in step.guesses.items():
            if guess.kind == "float":
                yield step.changed(name, replace(guess, kind="ids"))
                if len(guess.shape) != 2:
                    yield step.changed(name, step.search.sizes.ids(guess.high))
    if re.search(r"Long|Int|Char|Bool|same dtype|floating", text):
        for name, guess in step.guesses.items():
            if guess.kind == "ids":
                yield step.changed(name, replace(guess, kind="float"))


def _numbers(step: Step, text: str) -> Iterator[Guesses]:
    """Numbers in an assertion's words, and the sizes that the modules on the way have as attributes."""
    numbers = [int(n) for n in re.findall(r"(?<![\w.])\d+(?![\w.])", text)] + _attribute_sizes(step)
    for number in dict.fromkeys(n for n in numbers if 1 < n <= _LARGEST_NUMBER):
        for name, guess in step.guesses.items():
            if guess.free and guess.kind != "value" and guess.shape[guess.free[0]] != number:
                yield step.changed(name, guess.scaled(number))
    if isinstance(step.failure.error, (AssertionError, IndexError, ValueError)):
        for name, guess in step.guesses.items():
            if guess.kind == "float" and len(guess.shape) == 2 and guess.shape[1] == SEQUENCE:
                yield step.changed(name, reshaped(guess, 4, step.search.sizes))


def _attribute_sizes(step: Step) -> list[int]:
    sizes: list[int] = []
    for frame, _ in frames(step.failure.error):
        module = frame.f_locals.get("self")
        for key, value in vars(module).items() if isinstance(module, nn.Module) else ():
            if "size" in key or "len" in key:
                value = value[0] if isinstance(value, tuple) and value else value
                sizes += [value] if type(value) is int else []
    return sizes


def _single_ids(step: Step) -> Iterator[Guesses]:
    """One id a sample, beside other inputs (a user and an item), not a sequence of them."""
    for name, guess in step.guesses.items():
        if guess.kind == "ids" and len(guess.shape) == 2 and len(step.guesses) > 1:
            yield step.changed(name, replace(guess, shape=guess.shape[:1], free=()))
