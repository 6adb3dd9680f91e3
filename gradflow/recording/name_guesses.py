"""First guesses from the names of forward's arguments and the layers that may read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from gradflow.recording.guesses import SEQUENCE, VECTOR, Guess, Guesses, Sizes, first_layers
from gradflow.recording.message_refinements import is_state
from gradflow.recording.signatures import ForwardSignature

_MAX_STARTS = 8
_IDS = {
    "ids",
    "idx",
    "tokens",
    "token",
    "indices",
    "words",
    "text",
    "token_ids",
    "input_ids",
    "sequence",
    "seqs",
}
_MASKS = re.compile(r"(^|_)(mask|masks|padding|bias)$")
_TIMES = {"t", "time", "times", "timestep", "timesteps", "noise_level", "sigma", "step"}
_LENGTHS = {"lengths", "lens", "seq_lengths", "seq_lens", "input_lengths", "x_lengths", "length"}
_LABELS = {"labels", "label", "targets", "target", "y_true"}
_PLAIN: dict[str, Any] = {"bool": False, "int": 1, "float": 1.0}


def name_guesses(module: nn.Module, signature: ForwardSignature, sizes: Sizes) -> Iterator[Guesses]:
    """Propose inputs for the arguments that a call cannot leave out, the likeliest first."""
    layers = first_layers(module, sizes)
    wanted = [name for name in signature.names if name in signature.required]
    if not wanted:
        yield {}
        wanted = list(signature.names[:1])
    firsts = _distinct([guess for _, _, guess in layers])[:_MAX_STARTS] + _anything(sizes)
    for first in firsts:
        guesses = {n: _argument(n, i, first, layers, signature, sizes) for i, n in enumerate(wanted)}
        yield _one_batch(guesses, sizes)


def _one_batch(guesses: Guesses, sizes: Sizes) -> Guesses:
    """Beside a sequence, which has the smaller batch, every other input has that batch too."""
    sequences = any(g.kind == "ids" and g.shape[:1] == (sizes.sequence_batch,) for g in guesses.values())
    if not sequences:
        return guesses
    return {
        name: replace(g, shape=(sizes.sequence_batch, *g.shape[1:])) if g.shape[:1] == (sizes.batch,) else g
        for name, g in guesses.items()
    }


def _distinct(guesses: list[Guess]) -> list[Guess]:
    return list(dict.fromkeys(guesses))


def _anything(sizes: Sizes) -> list[Guess]:
    """What to try for a model without a layer that says."""
    return [sizes.vector(VECTOR), sizes.grid(3, 2), sizes.sequence(VECTOR), sizes.grid(1, 2), sizes.ids(10)]


def _argument(
    name: str,
    index: int,
    first: Guess,
    layers: list[tuple[str, nn.Module, Guess]],
    signature: ForwardSignature,
    sizes: Sizes,
) -> Guess:
    annotation = signature.annotations.get(name, "").removesuffix(" | None")
    if annotation in _PLAIN:
        return Guess(kind="value", value=_PLAIN[annotation])
    by_name = _by_name(name, first, layers, sizes)
    if by_name is not None:
        return by_name
    return first if index == 0 else _like_named_layer(name, layers) or first


def _by_name(
    name: str, first: Guess, layers: list[tuple[str, nn.Module, Guess]], sizes: Sizes
) -> Guess | None:
    batch = first.shape[0] if first.shape else sizes.batch
    if _MASKS.search(name) or is_state(name):
        return Guess(kind="value", value=None)
    if name in _TIMES:
        return Guess(shape=(batch,), kind="ids", high=1000)
    if name in _LENGTHS:
        return Guess(shape=(batch,), kind="ids", low=SEQUENCE, high=SEQUENCE + 1)
    if name == "edge_index":
        return Guess(shape=(2, 4 * batch), kind="ids", high=batch)
    if name in ("adj", "adjacency", "adjacency_matrix"):
        return Guess(shape=(batch, batch))
    if name in _LABELS:
        return Guess(shape=first.shape if first.kind == "ids" else (batch,), kind="ids", high=2)
    if name in _IDS or name.endswith(("_ids", "_tokens", "_idx")):
        tables = [guess for _, _, guess in layers if guess.kind == "ids"]
        return tables[0] if tables else None
    return None


def _like_named_layer(name: str, layers: list[tuple[str, nn.Module, Guess]]) -> Guess | None:
    """An argument `image` goes to `image_encoder.0`, `user` to `user_embedding`."""
    for path, _, guess in layers:
        if name in re.split(r"[._]", path.lower()):
            return guess
    return None
