"""Awkward models: the numbers of plain autograd, and the model left bit for bit as it was found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import awkward_calls
import awkward_dtypes
import awkward_modules
import awkward_outputs
import pytest
import torch
from awkward import Case, energy
from fingerprint import differences, fingerprint, process_state
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from witness import check_gradients, check_parameters, layer_row, parameter_row

import gradflow
from gradflow.errors import ModelError

CASES = (*awkward_outputs.CASES, *awkward_calls.CASES, *awkward_modules.CASES, *awkward_dtypes.CASES)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
COVERAGES = {
    "measured",
    "never called",
    "no grad",
    "frozen",
    "bypassed",
    "non-tensor output",
    "unused",
}


def widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value.to(torch.complex128) if isinstance(value, Tensor) and value.is_complex() else value


def run_twin(case: Case) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, tensors and parameters of the forward by hand, in float64."""
    module, inputs = case.build()
    if any(is_lazy(parameter) for parameter in module.parameters()):
        module(*inputs)
    module = case.widen(module)
    if isinstance(inputs, dict):
        outputs, tensors = case.twin(module, **{key: widened(value) for key, value in inputs.items()})
    else:
        outputs, tensors = case.twin(module, *map(widened, inputs))
    return case.loss(outputs, inputs), tensors, dict(module.named_parameters())


@every_case
def test_numbers_are_those_of_plain_autograd(case: Case) -> None:
    module, inputs = case.build()
    report = gradflow.inspect(module, inputs, case.loss)
    loss, tensors, parameters = run_twin(case)
    check_gradients(report, loss, tensors, batch=case.batch, tolerance=case.tolerance)
    check_parameters(report, loss, parameters, tolerance=case.tolerance)
    for key, coverage in case.coverage.items():
        assert layer_row(report, key).coverage == coverage, key
    for key in tensors:
        assert layer_row(report, key).coverage == "measured", key
    if case.check is not None:
        case.check(report)


@every_case
def test_every_row_says_how_it_was_covered(case: Case) -> None:
    module, inputs = case.build()
    report = gradflow.inspect(module, inputs, case.loss)
    assert set(report.layers.coverage) <= COVERAGES
    assert set(report.parameters.coverage) <= COVERAGES
    measured = report.layers.coverage == "measured"
    assert report.layers.gradient_norm.notna().equals(measured)
    assert (report.layers.coverage != "").all()


@every_case
def test_model_is_left_as_found(case: Case) -> None:
    module, inputs = case.build()
    before = fingerprint(module)
    gradflow.inspect(module, inputs, case.loss, steps=2)
    assert differences(before, fingerprint(module)) == []


@every_case
def test_model_is_left_as_found_when_its_forward_raises(case: Case) -> None:
    module, inputs = case.build()
    raise_in(last_called(case), module)
    before = fingerprint(module)
    with pytest.raises(ModelError, match="half-way"):
        gradflow.inspect(module, inputs, case.loss)
    assert differences(before, fingerprint(module)) == []


def last_called(case: Case) -> str:
    """The name of the module that a plain forward enters last."""
    module, inputs = case.build()
    entered: list[str] = []
    for name, child in module.named_modules():
        child.register_forward_pre_hook(lambda module, args, name=name: entered.append(name))
    with torch.compiler.set_stance("force_eager"):
        module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    return entered[-1]


def raise_in(name: str, module: nn.Module) -> None:
    def raises(module: nn.Module, args: Any) -> None:
        raise RuntimeError("stopped half-way")

    module.get_submodule(name).register_forward_pre_hook(raises)


class RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("stopped half-way back")


def interrupted(outputs: Any, inputs: Any) -> Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (lambda outputs, inputs: energy(RaisesInBackward.apply(outputs)), ModelError),
        (interrupted, KeyboardInterrupt),
    ],
    ids=["backward raises", "Ctrl-C in the loss"],
)
def test_model_is_left_as_found_when_a_later_stage_stops(
    loss: Callable[[Any, Any], Tensor], error: type[BaseException]
) -> None:
    module, inputs = awkward_modules.stateful()
    before = fingerprint(module)
    with pytest.raises(error):
        gradflow.inspect(module, inputs, loss)
    assert differences(before, fingerprint(module)) == []


def test_fingerprint_sees_what_a_forward_and_backward_change() -> None:
    """The witness can fail: a plain step changes gradients, buffers, attributes and generators."""
    module, inputs = awkward_modules.stateful()
    module.norm.train()
    before = fingerprint(module)
    energy(module(*inputs)).backward()
    module.norm.eval()
    changed = differences(before, fingerprint(module))
    expected = {
        "attribute .latest",
        "attribute .steps",
        "attribute .cache",
        "grad layer.weight",
        "module norm",
        "numpy rng",
        "python rng",
        "tensor norm.running_mean",
        "tensor seen",
        "torch rng",
    }
    assert expected <= set(changed)


class Witnessed(nn.Module):
    """Two layers with every kind of hook a user can have; ``note`` is told which fired."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)
        self.first.register_forward_pre_hook(lambda m, a: note("pre"))
        self.first.register_forward_hook(lambda m, a, out: (note("double"), 2 * out)[1])
        self.first.register_forward_hook(lambda m, a, out: note("forward"), prepend=True)
        self.second.register_full_backward_hook(lambda m, i, o: note("backward"))
        self.second.register_full_backward_pre_hook(lambda m, o: note("backward pre"))
        self.first.weight.register_hook(lambda gradient: note("gradient"))
        self.second.bias.register_post_accumulate_grad_hook(lambda p: note("accumulated"))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_hooks_of_the_user_fire_as_before_and_stay() -> None:
    events: list[str] = []
    module, x = Witnessed(events.append), torch.randn(6, 8)
    energy(module(x)).backward()
    plain = list(events)
    module.zero_grad()
    before = fingerprint(module)
    events.clear()
    report = gradflow.inspect(module, (x,), energy)
    assert events == plain
    assert len(set(plain)) == 7
    assert differences(before, fingerprint(module)) == []
    first = 2 * nn.functional.linear(x, module.first.weight, module.first.bias)
    out = nn.functional.linear(torch.tanh(first), module.second.weight, module.second.bias)
    check_gradients(report, energy(out), {"first": first}, batch=6, tolerance=1e-5)


def test_inputs_are_left_as_found() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    x = torch.randn(6, 8, requires_grad=True)
    before = x.detach().clone()
    gradflow.inspect(module, (x,))
    assert x.grad is None
    assert x.requires_grad
    assert not x._backward_hooks
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_callers_switches_neither_matter_nor_change(switch: Callable[[], Any]) -> None:
    module, x = nn.Linear(8, 2), torch.randn(6, 8)
    with switch():
        before = process_state()
        report = gradflow.inspect(module, (x,), energy)
        assert differences(before, process_state()) == []
    assert parameter_row(report, "weight").gradient_norm > 0


def test_gradients_and_outputs_are_bit_for_bit_those_of_a_plain_step() -> None:
    """What the loss sees, and what arrives on the parameters, is not changed by being watched."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5))
    x, seen = torch.randn(6, 3, 9, 9), []

    def loss(outputs: Tensor, inputs: Any) -> Tensor:
        seen.append(outputs.detach().clone())
        return outputs.square().sum()

    def keep(gradient: Tensor) -> None:
        seen.append(gradient.clone())

    module[0].weight.register_hook(keep)
    plain = copy.deepcopy(module)
    plain[0].weight.register_hook(keep)
    gradflow.inspect(module, (x,), loss, seed=3)
    torch.manual_seed(3)
    loss(plain(x), (x,)).backward()
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_modes_of_single_modules_are_kept() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    module[1].eval()
    modes = [child.training for child in module.modules()]
    gradflow.inspect(module, (torch.randn(6, 8),))
    assert [child.training for child in module.modules()] == modes


@pytest.fixture(autouse=True)
def _process_is_left_as_found() -> Iterator[None]:
    """No test may leave a global hook, a function mode or a switch behind."""
    watched = ("grad enabled", "autocast", "default dtype", "global hooks", "function modes")
    before = process_state()
    yield
    after = process_state()
    assert [key for key in watched if before[key] != after[key]] == []
