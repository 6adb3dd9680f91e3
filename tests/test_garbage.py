"""The collector rests while a model is recorded, and what a run leaves in cycles does not pile up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.errors import ModelError


class Knot:
    """A cycle that holds a tensor."""

    def __init__(self, held: Tensor) -> None:
        self.held, self.myself = held, self


class Knots(nn.Module):
    """A residual block that ties a knot in every forward, and says how many are alive then."""

    def __init__(self, say: Callable[[int], None]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.tied = weakref.WeakSet[Knot]()
        self.say = say

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.layer(x)
        self.tied.add(Knot(y))
        assert not gc.isenabled()
        self.say(len(self.tied))
        return y


@pytest.fixture
def _enabled() -> Iterator[None]:
    was = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was else gc.disable)()


@pytest.mark.usefixtures("_enabled")
def test_cycles_of_earlier_steps_are_gone() -> None:
    alive: list[int] = []
    gradflow.inspect(Knots(alive.append), torch.randn(2, 4), steps=8)
    assert alive == [1] * 8
    assert gc.isenabled()


@pytest.mark.usefixtures("_enabled")
def test_the_collector_is_back_when_the_model_raises() -> None:
    with pytest.raises(ModelError):
        gradflow.inspect(nn.Linear(4, 4), torch.randn(2, 4), lambda outputs, inputs: 1 / 0)
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    was = gc.isenabled()
    gc.disable()
    try:
        gradflow.inspect(nn.Linear(4, 4), torch.randn(2, 4))
        assert not gc.isenabled()
    finally:
        if was:
            gc.enable()
