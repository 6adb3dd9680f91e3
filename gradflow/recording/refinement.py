"""A failed try -> better guesses: the op that raised, the tensor it got and the one it wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from gradflow.recording.guesses import Guess, Guesses, Sizes
from gradflow.recording.size_search import Tried, next_sides
from gradflow.recording.trial import Failure, Origin


@dataclass(slots=True)
class Search:
    """What the tries so far have taught; grows as they go on."""

    sizes: Sizes
    widths: tuple[int, ...] = ()
    """What the model's layers give."""
    tried: dict[tuple[str, int], list[Tried]] = field(default_factory=dict)
    """Sides tried of an input for a layer that wants a size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One failure to learn from."""

    failure: Failure
    guesses: Guesses
    search: Search

    def argument(self, index: int, name: str) -> Any:
        """Return an argument of the op that raised, however it was passed."""
        failure = self.failure
        return failure.args[index] if len(failure.args) > index else failure.kwargs.get(name)

    def origin(self, value: Any) -> Origin | None:
        """Return which inputs a tensor was made from; None for the model's own."""
        return self.failure.origins(value)

    def changed(self, name: str, guess: Guess) -> Guesses:
        """Replace one guess."""
        return {**self.guesses, name: guess}

    def with_size(self, tensor: Tensor, dim: int, wanted: int) -> Iterator[Guesses]:
        """Give dimension ``dim`` of an op's tensor the size ``wanted`` by changing the input it came from."""
        origin = self.origin(tensor)
        if origin is None or tensor.dim() == 0:
            return
        name, source = origin.name, origin.dims[dim]
        if name is not None and source is not None and source < len(self.guesses[name].shape):
            if self.guesses[name].shape[source] != wanted:
                yield self.changed(name, self.guesses[name].resized(source, wanted))
            return
        if len(origin.inputs) == 2:
            yield from self.shared(sorted(origin.inputs, key=list(self.guesses).index), wanted)
        for name in origin.inputs:
            yield from self.searched(name, tensor.shape[dim], wanted)

    def shared(self, names: list[str], wanted: int) -> Iterator[Guesses]:
        """Split a width between two joined inputs: the second is most often a state the model made."""
        first, second = (self.guesses[name] for name in names)
        batch = (first.shape or second.shape or (self.search.sizes.batch,))[0]
        for width in (w for w in self.search.widths if w < wanted):
            vectors = Guess(shape=(batch, wanted - width)), Guess(shape=(batch, width))
            yield {**self.guesses, **dict(zip(names, vectors, strict=True))}

    def searched(self, name: str, size: int, wanted: int) -> Iterator[Guesses]:
        """Change the free dimensions of an input so that a flattened ``size`` becomes ``wanted``."""
        guess = self.guesses[name]
        if not guess.free:
            return
        tried = self.search.tried.setdefault((name, wanted), [])
        tried.append(Tried(side=guess.shape[guess.free[0]], size=size))
        for side in next_sides(tuple(tried), wanted, len(guess.free)):
            yield self.changed(name, guess.scaled(side))

    def retyped(self, tensor: Any, kind: str, high: int = 10) -> Iterator[Guesses]:
        """Make the inputs behind a tensor floats, or integers below ``high``."""
        origin = self.origin(tensor)
        for name in origin.inputs if origin is not None else ():
            guess = self.guesses[name]
            if guess.kind != kind or (kind == "ids" and guess.high > high):
                yield self.changed(name, replace(guess, kind=kind, high=high, low=min(guess.low, high - 1)))

    def with_ndim(self, tensor: Tensor, wanted: int) -> Iterator[Guesses]:
        """Give the one input behind a tensor as many dimensions more or fewer as the tensor lacks or has."""
        origin = self.origin(tensor)
        if origin is None or origin.name is None:
            return
        guess = self.guesses[origin.name]
        ndim = len(guess.shape) + wanted - tensor.dim()
        if ndim != len(guess.shape) and 1 <= ndim <= 5:
            yield self.changed(origin.name, reshaped(guess, ndim, self.search.sizes))

    def grown(self) -> Iterator[Guesses]:
        """Double the free dimensions of every input that has some."""
        for name, guess in self.guesses.items():
            if guess.free:
                yield self.changed(name, guess.scaled(guess.shape[guess.free[0]] * 2))


Refinement = Callable[[Step], Iterator[Guesses]]


def reshaped(guess: Guess, ndim: int, sizes: Sizes) -> Guess:
    """Return the usual input of that many dimensions, keeping the features or channels already known."""
    known = guess.shape[1] if len(guess.shape) == 2 or len(guess.shape) >= 4 else (guess.shape or (3,))[-1]
    if guess.kind == "ids":
        shape = (sizes.sequence_batch, *[16] * (ndim - 1))
        return replace(guess, shape=shape, free=tuple(range(1, ndim)))
    if ndim == 1:
        return Guess(shape=(sizes.batch,))
    if ndim == 2:
        return sizes.vector(known)
    if ndim == 3:
        return sizes.sequence(known)
    channels = known if known <= 16 else 3
    return sizes.grid(channels, ndim - 2)
