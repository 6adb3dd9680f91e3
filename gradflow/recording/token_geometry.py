"""Whether tokens that were alike at the beginning of a model are those that are alike at its end.

Attention without skips averages tokens until none is told from its neighbours by what it was. Their spread may well
survive that (a causal average differs from place to place): what is lost is *which* token stands where. Only the first
tensor and the latest ones are kept, as samples: which of them ends the trunk is known when the step is over.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradflow.recording.tensor_stats import is_transformed

FEWEST_SAMPLES, FEWEST_TOKENS, FEWEST_ROWS = 4, 8, 128
"""Of fewer the similarity is noise: its standard deviation is about 0.004 at 512 rows."""
ROWS, FEATURES = 1_024, 32
"""A sample has about so many tokens in all, and features of each."""
LATEST = 8
"""So many of the latest tensors of a shape are at hand."""


@dataclass(slots=True)
class _Samples:
    """Of the tensors that share batch and tokens."""

    first: tuple[int, Tensor]
    latest: deque[tuple[int, Tensor]] = field(default_factory=lambda: deque(maxlen=LATEST))


@dataclass(slots=True)
class TokenGeometry:
    """Keeps samples of tensors shaped (batch, tokens, features) by their probe.

    Args:
        batch_size: N, to tell samples from tokens.
    """

    batch_size: int
    _samples: dict[Any, _Samples] = field(default_factory=dict)

    def add(self, probe: int, tensor: Tensor) -> None:
        """Keep a sample of a tensor as it is now, if it is shaped so."""
        if tensor.dim() != 3 or is_transformed(tensor) or tensor.layout is not torch.strided:
            return
        axis = 0 if tensor.shape[0] == self.batch_size else 1
        samples, tokens = tensor.shape[axis], tensor.shape[1 - axis]
        if samples != self.batch_size or not _enough(samples, tokens, tensor):
            return
        drawn = probe, _drawn(tensor.detach().transpose(0, axis))
        kept = self._samples.setdefault((samples, tokens, axis, tensor.device), _Samples(drawn))
        kept.latest.append(drawn)

    def kept(self, probe: int) -> float | None:
        """How much of the geometry of the first tensor a late one has: their similarity, 1 at most.

        Returns:
            None where the tensor is not among the latest, is the first itself, or is constant or not finite.
        """
        for samples in self._samples.values():
            found = next((drawn for known, drawn in samples.latest if known == probe), None)
            if found is not None and samples.first[0] != probe:
                return similarity(samples.first[1], found)
        return None


def similarity(here: Tensor, there: Tensor) -> float | None:
    """Linear CKA of two samples [samples, tokens, features], by the unbiased estimate of HSIC.

    Each place is centred over the samples first: what a token is counts, and not where it stands. Sources: Kornblith
    et al., Similarity of neural network representations revisited, 2019; Song et al., 2007 for the estimate.

    Returns:
        About 0 for unrelated tokens (it may be slightly negative), 1 for the same geometry; None where one of the
        two is constant or not finite.
    """
    x, y = (_centred(values) for values in (here, there))
    own = _hsic(x, x) * _hsic(y, y)
    # A representation of no spread has no geometry; rounding alone may leave it a negative one.
    if not math.isfinite(own) or own <= 0:
        return None
    return _hsic(x, y) / math.sqrt(own)


def _centred(values: Tensor) -> Tensor:
    """As float64 rows of about unit size, so that no square of a square overflows."""
    wide = values.double()
    rows = (wide - wide.mean(0)).flatten(0, 1)
    largest = rows.abs().max()
    return rows / largest if largest > 0 else rows


def _hsic(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate for linear kernels, times n (n - 3): no [rows, rows] matrix is made."""
    n = len(x)
    own_x, own_y = x.square().sum(1), y.square().sum(1)
    both = (x.T @ y).square().sum() - own_x @ own_y
    sums_x, sums_y = x @ x.sum(0) - own_x, y @ y.sum(0) - own_y
    means = sums_x.sum() * sums_y.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums_x @ sums_y)
    return float(both + means)


def _enough(samples: int, tokens: int, tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return False
    return samples >= FEWEST_SAMPLES and tokens >= FEWEST_TOKENS and samples * tokens >= FEWEST_ROWS


def _drawn(values: Tensor) -> Tensor:
    """A regular sample [samples, tokens, features]: its own memory, in float32 or float64."""
    samples, tokens, features = values.shape
    by_token = math.ceil(FEWEST_SAMPLES * tokens / ROWS)
    by_sample = math.ceil(samples * math.ceil(tokens / by_token) / ROWS)
    part = values[::by_sample, ::by_token, :: math.ceil(features / FEATURES)]
    return part.to(torch.float64 if values.dtype is torch.float64 else torch.float32, copy=True)
