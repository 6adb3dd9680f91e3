"""Guesses at a model's inputs: what one is, how it is drawn, and what each kind of layer suggests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gradflow.recording.layer_wants import out_width

BATCH = 8
SEQUENCE_BATCH = 4
SEQUENCE = 16
VECTOR = 16
"""Features of an input whose layer does not say how many it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """One argument of forward, as it could be."""

    shape: tuple[int, ...] = ()
    kind: str = "float"
    """"float", "ids" (integers below ``high``), "ones", or "value" (passed as it is)."""
    high: int = 10
    low: int = 0
    last: int | None = None
    """Of ids: what every sequence ends with."""
    free: tuple[int, ...] = ()
    """Dimensions that no layer has fixed yet: the ones to try other sizes of."""
    value: Any = None
    parts: tuple[Guess, ...] = ()
    """A tuple of tensors (the two states of an LSTM) in the place of one."""

    def words(self) -> str:
        """Write it as a header does: "8×3×32×32 float32"."""
        if self.parts:
            return "(" + ", ".join(part.words() for part in self.parts) + ")"
        if self.kind == "value":
            return repr(self.value)
        return "×".join(map(str, self.shape)) + {"ids": f" int64 below {self.high}"}.get(self.kind, "")

    def resized(self, dim: int, size: int) -> Guess:
        """Fix one dimension, which is free no longer."""
        shape = tuple(size if d == dim else old for d, old in enumerate(self.shape))
        return replace(self, shape=shape, free=tuple(d for d in self.free if d != dim))

    def scaled(self, size: int) -> Guess:
        """Try another size of every free dimension; they stay free."""
        return replace(self, shape=tuple(size if d in self.free else old for d, old in enumerate(self.shape)))

    @property
    def affordable(self) -> bool:
        """Whether a try is worth its memory: images to 512×512, volumes to 96×96×96, texts to 8192 tokens."""
        side = max((self.shape[dim] for dim in self.free), default=0)
        largest = _LARGEST_SIDES.get(len(self.free), 0)
        if self.kind == "ids":
            largest = min(largest, _LONGEST_TEXT)
        return side <= largest and math.prod(self.shape) <= _LARGEST_INPUT


_LARGEST_SIDES = {0: 1, 1: 2**17, 2: 512, 3: 96}
_LONGEST_TEXT = 8_192
"""Attention over more takes minutes a try, and a layer that flattens so many tokens is none that people write."""
_LARGEST_INPUT = 16_000_000
"""Elements."""

Guesses = Mapping[str, Guess]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How guesses become tensors."""

    seed: int
    dtype: torch.dtype
    device: torch.device

    def draw(self, guesses: Guesses) -> dict[str, Any]:
        """Draw every guess, each from the same place of the same generator whatever was tried before."""
        generator = torch.Generator().manual_seed(self.seed)
        return {name: self._draw(guess, generator) for name, guess in guesses.items()}

    def _draw(self, guess: Guess, generator: torch.Generator) -> Any:
        if guess.parts:
            return tuple(self._draw(part, generator) for part in guess.parts)
        if guess.kind == "value":
            return guess.value
        if guess.kind == "ids":
            low = min(guess.low, max(guess.high - 1, 0))
            ids = torch.randint(low, max(guess.high, low + 1), guess.shape, generator=generator, device="cpu")
            if guess.last is not None:
                ids[..., -1] = guess.last
            return ids.to(self.device)
        if guess.kind == "ones":
            return torch.ones(guess.shape, dtype=torch.int64, device=self.device)
        drawn = torch.randn(guess.shape, generator=generator, device="cpu")
        return drawn.to(device=self.device, dtype=self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What guesses start from."""

    batch: int = BATCH
    sequence_batch: int = SEQUENCE_BATCH
    image: int = 32
    """Side of an image that nothing has fixed."""

    def vector(self, features: int) -> Guess:
        """(batch, features)."""
        return Guess(shape=(self.batch, features))

    def sequence(self, features: int, *, batch_first: bool = True) -> Guess:
        """(batch, sequence, features), or sequence first."""
        lead = (self.sequence_batch, SEQUENCE) if batch_first else (SEQUENCE, self.sequence_batch)
        return Guess(shape=(*lead, features), free=(1 if batch_first else 0,))

    def ids(self, high: int) -> Guess:
        """(batch, sequence) of integers below ``high``."""
        return Guess(shape=(self.sequence_batch, SEQUENCE), kind="ids", high=high, free=(1,))

    def grid(self, channels: int, dims: int, side: int | None = None) -> Guess:
        """(batch, channels, side …): a signal, an image or a volume."""
        side = side or {1: 64, 2: self.image}.get(dims, 16)
        return Guess(shape=(self.batch, channels, *[side] * dims), free=tuple(range(2, 2 + dims)))


def sizes_for(module: nn.Module, batch_size: int | None) -> Sizes:
    """Choose where to start: larger images for a network that halves them often.

    A network that divides the side by 32 leaves one position of a 32×32 image, which starves its
    normalisations; 64 leaves four.
    """
    halvings = sum(1 for child in module.modules() if _stride(child) >= 2)
    image = 64 if halvings >= 4 else 32
    if batch_size is not None:
        return Sizes(batch=batch_size, sequence_batch=batch_size, image=image)
    return Sizes(image=image)


def _stride(module: nn.Module) -> int:
    stride = getattr(module, "stride", 1)
    stride = max(stride, default=1) if isinstance(stride, tuple) else stride
    return stride if isinstance(stride, int) else 1


# Layer, spatial dimensions, where it keeps its channels.
_GRID_LAYERS: tuple[tuple[type[nn.Module], int, str], ...] = (
    (nn.Conv1d, 1, "in_channels"),
    (nn.Conv2d, 2, "in_channels"),
    (nn.Conv3d, 3, "in_channels"),
    (nn.ConvTranspose1d, 1, "in_channels"),
    (nn.ConvTranspose2d, 2, "in_channels"),
    (nn.ConvTranspose3d, 3, "in_channels"),
    (nn.BatchNorm2d, 2, "num_features"),
    (nn.BatchNorm3d, 3, "num_features"),
)


def consumed_by(layer: nn.Module, sizes: Sizes) -> Guess | None:
    """Return the input that suits a layer of torch.nn; None for one that takes anything."""
    for kind, dims, channels in _GRID_LAYERS:
        if isinstance(layer, kind):
            # Transposed convolutions grow what they get: generators start from one position or a few.
            side = (4 if _stride(layer) > 1 else 1) if "Transpose" in kind.__name__ else None
            # A lazy layer says 0 until it has seen an input.
            return sizes.grid(int(getattr(layer, channels)) or 3, dims, side)
    return _consumed_by_vector_layer(layer, sizes)


def _consumed_by_vector_layer(layer: nn.Module, sizes: Sizes) -> Guess | None:
    if isinstance(layer, nn.Linear):
        return sizes.vector(layer.in_features or VECTOR)
    if isinstance(layer, (nn.Bilinear, nn.RNNCellBase)):
        return sizes.vector(layer.in1_features if isinstance(layer, nn.Bilinear) else layer.input_size)
    if isinstance(layer, nn.BatchNorm1d):
        return sizes.vector(layer.num_features or VECTOR)
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return sizes.ids(layer.num_embeddings)
    if isinstance(layer, nn.RNNBase):
        return sizes.sequence(layer.input_size, batch_first=layer.batch_first)
    if isinstance(layer, nn.MultiheadAttention):
        return sizes.sequence(layer.embed_dim, batch_first=layer.batch_first)
    if isinstance(layer, nn.Transformer):
        return sizes.sequence(layer.d_model, batch_first=layer.batch_first)
    if isinstance(layer, nn.LayerNorm):
        return Guess(shape=(sizes.batch, *layer.normalized_shape))
    return None


def widths_made(module: nn.Module) -> tuple[int, ...]:
    """List the widths that layers give, the widest first: what a state fed back to the model can have."""
    widths = {width for child in module.modules() if (width := out_width(child)) is not None}
    return tuple(sorted(widths, reverse=True))


def first_layers(module: nn.Module, sizes: Sizes) -> list[tuple[str, nn.Module, Guess]]:
    """List the layers that fix an input, in the order the model defines them."""
    found = []
    for name, child in module.named_modules():
        guess = consumed_by(child, sizes)
        if guess is not None:
            found.append((name, child, guess))
    return found
