"""Whose fault a failed run is, and the sentence that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.errors import GradflowError, InputError, LossError, ModelError
from gradflow.recording.failures import describe_failure


class Calls(nn.Module):
    """A model whose forward is a function of itself and its inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class Plain(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def lenet() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.fc(F.max_pool2d(net.conv(x), 2).flatten(1))

    return Calls(forward, conv=nn.Conv2d(1, 6, 5), fc=nn.Linear(6 * 14 * 14, 10))


def failure(module: nn.Module, *inputs: Any, phase: str = "forward") -> GradflowError:
    with pytest.raises(Exception) as caught:
        module(*inputs)
    return describe_failure(caught.value, module, phase)


def ids(high: int) -> Tensor:
    return torch.full((2, 5), high)


X = torch.zeros


@pytest.mark.parametrize(
    ("module", "inputs", "words"),
    [
        (nn.Sequential(nn.Linear(6, 3)), X(4, 7), ["layer 0 (Linear)", "got 4×7 float32", "wants (…, 6)"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), X(4, 7, 1), ["layer 1 (Linear)", "got 4×7", "(…, 6)"]),
        (lenet(), X(8, 3, 32, 32), ["layer conv (Conv2d)", "8×3×32×32", "(batch, 1, height, width)"]),
        (lenet(), X(8, 1, 28, 28), ["layer fc (Linear)", "got 8×864", "wants (…, 1176)"]),
        (nn.Sequential(nn.Embedding(9, 2)), ids(9), ["layer 0 (Embedding)", "int64 (9..9)", "integers 0..8"]),
        (nn.Sequential(nn.Embedding(9, 2)), X(2, 5), ["layer 0 (Embedding)", "2×5 float32", "integers 0..8"]),
        (nn.Sequential(nn.LSTM(4, 3, batch_first=True)), X(2, 5, 3),
         ["layer 0 (LSTM)", "(batch, sequence, 4)"]),
        (nn.Sequential(nn.Linear(6, 3)), X(4, 6).double(), ["4×6 float64", "wants (…, 6) float32"]),
        (nn.Sequential(nn.BatchNorm2d(3)), X(4, 5, 2, 2),
         ["layer 0 (BatchNorm2d)", "(batch, 3, height, width)"]),
        (nn.Sequential(nn.LayerNorm(6)), X(4, 5), ["layer 0 (LayerNorm)", "got 4×5", "(…, 6)"]),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(module: nn.Module, inputs: Tensor, words: list[str]) -> None:
    error = failure(module, inputs)
    assert isinstance(error, InputError) and error.exit_code == 2
    for word in [*words, "--input"]:
        assert word in str(error)


def test_an_argument_that_is_missing() -> None:
    error = failure(Plain(), X(2))
    assert isinstance(error, InputError)
    assert "Plain.forward" in str(error) and "--input y=SHAPE" in str(error)


def _broken_width() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.Linear(30, 5))


def _raises(net: Any, x: Tensor) -> Tensor:
    raise KeyError("depth")


def _bad_add(net: Any, x: Tensor) -> Tensor:
    return net.fc(x) + x


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (_broken_width(), ["layer 1 (Linear) got 4×20", "wants (…, 30)", "whatever the inputs are"]),
        (Calls(_raises), ["the model's forward raised", "test_failures.py:", "KeyError: 'depth'"]),
        (Calls(_bad_add, fc=nn.Linear(6, 20)), ["size of tensor a (20)", "test_failures.py:"]),
    ],
)
def test_a_model_that_is_wrong_itself(module: nn.Module, words: list[str]) -> None:
    error = failure(module, X(4, 6))
    assert isinstance(error, ModelError) and error.exit_code == 3
    for word in words:
        assert word in str(error)
    assert "torch/nn/modules" not in error.trace_text and "test_failures.py" in error.trace_text


@pytest.mark.parametrize("phase", ["forward", "loss", "backward"])
@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory(raised: BaseException, phase: str) -> None:
    error = describe_failure(raised, nn.Linear(2, 2), phase)
    assert isinstance(error, ModelError)
    assert phase in str(error) and "--batch-size" in str(error) and "--device cpu" in str(error)


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("no way back")


def test_backward() -> None:
    out = BadBackward.apply(X(2).requires_grad_()).sum()
    with pytest.raises(ValueError) as caught:
        out.backward()
    error = describe_failure(caught.value, nn.Linear(2, 2), "backward")
    assert isinstance(error, ModelError)
    assert "backward" in str(error) and "no way back" in str(error) and "test_failures.py" in error.trace_text


def test_our_own_errors_pass() -> None:
    own = LossError("the loss is 3×3")
    assert describe_failure(own, nn.Linear(2, 2), "loss") is own


def test_causes_are_shown_without_our_frames() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        try:
            return _raises(net, x)
        except KeyError as error:
            raise ValueError("no depth in the config") from error

    error = failure(Calls(forward), X(2, 2))
    assert isinstance(error, ModelError)
    assert "KeyError: 'depth'" in error.trace_text and "direct cause" in error.trace_text
    assert "torch/nn" not in error.trace_text
