"""``--try-fixes``: what a repair does is what a person would write, and the model is left as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_residual
import zoo_units
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import gradflow
from gradflow.cli import app
from gradflow.recording import repairs
from gradflow.recording.layout import layout_of
from gradflow.recording.reinitialisation import (
    fan_in_initialise,
    orthogonal_gain,
    orthogonal_initialise,
    unit_variance,
)
from gradflow.recording.repair_runs import repaired
from gradflow.recording.rewiring import Rewiring, Wiring
from gradflow.recording.target import target_from_objects
from gradflow.repair_outcomes import Measure, RepairOutcome
from gradflow.repair_trials import try_repairs
from gradflow.reporters.screen import Screen
from gradflow.reporters.terminal_repairs import repair_cells, repair_lines
from tests.fingerprint import fingerprint

WIDTH = 12
Written = Callable[[Tensor, Any, Any], Tensor]


class Plain(nn.Module):
    """Two layers of one width and a wider one, written in the three ways people write them."""

    def __init__(self, style: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.activation = nn.ReLU(inplace=style == "in place")
        self.style = style
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.wide):
            if self.style == "functional":
                x = torch.relu(F.linear(x, layer.weight, layer.bias))
            elif self.style == "method":
                x = layer(x)
                x.relu_()
            else:
                x = self.activation(layer(x))
        return x


def by_hand(model: Plain, block: Written, x: Tensor) -> Tensor:
    for layer in (model.first, model.second, model.wide):
        x = block(x, layer, torch.relu)
    return x


def skip(x: Tensor, layer: Any, activation: Any) -> Tensor:
    y = activation(layer(x))
    return x + 0.5 * y if y.shape == x.shape else y


def norm_before(x: Tensor, layer: Any, activation: Any) -> Tensor:
    return activation(layer(F.layer_norm(x, x.shape[-1:])))


def norm_after(x: Tensor, layer: Any, activation: Any) -> Tensor:
    y = layer(x)
    return activation(F.layer_norm(y, y.shape[-1:]))


def gelu(x: Tensor, layer: Any, activation: Any) -> Tensor:
    return F.gelu(layer(x))


@pytest.mark.parametrize("style", ["module", "in place", "functional", "method"])
@pytest.mark.parametrize(
    ("wiring", "block", "changes"),
    [
        (Wiring(skip=0.5), skip, 2),
        (Wiring(norm_before=True), norm_before, 3),
        (Wiring(norm_after=True), norm_after, 3),
        (Wiring(activation=F.gelu), gelu, 3),
    ],
)
def test_a_wiring_is_the_model_written_so(style: str, wiring: Wiring, block: Written, changes: int) -> None:
    model = Plain(style)
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    rewired = Rewiring(wiring, model.parameters())
    with rewired:
        outputs = model(x)
    assert rewired.changes == changes
    expected = by_hand(model, block, x)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    cotangent = torch.randn_like(expected)
    of = [x, *model.parameters()]
    for found, wanted in zip(
        torch.autograd.grad(outputs, of, cotangent),
        torch.autograd.grad(expected, of, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-15)


def test_a_layer_outside_the_scope_runs_as_written() -> None:
    model = Plain("module")
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    rewired = Rewiring(Wiring(skip=1.0), [model.wide.weight])
    with rewired:
        torch.testing.assert_close(rewired and model(x), by_hand(model, lambda x, f, a: a(f(x)), x))
    assert rewired.changes == 0


def test_convolutions_are_normalised_over_batch_and_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with Rewiring(Wiring(norm_after=True), model.parameters()):
        found = model(x)
    y = model[0](x)
    mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(found, torch.relu((y - mean) / (variance + 1e-5).sqrt()))


def test_query_key_and_value_read_one_normalisation() -> None:
    torch.manual_seed(0)
    q, k = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.randn(2, 3, 4)
    read: list[Tensor] = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "linear":
                read.append(args[0])
            return func(*args, **(kwargs or {}))

    with Spy(), Rewiring(Wiring(norm_before=True), [q.weight, k.weight]):
        q(x), k(x)
    assert read[0] is read[1]
    assert read[0] is not x


def scope(*layers: nn.Module) -> Any:
    return layout_of(nn.Sequential(*layers)).parameters


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("activation", "weight", "bias"),
    [("relu", 2.0, 0.0), ("tanh", 1.76, 0.05), ("gelu", 1 / 0.4252, 0.0), ("", 2.0, 0.0)],
)
def test_fan_in_initialisation_has_its_variances(activation: str, weight: float, bias: float) -> None:
    layer = nn.Linear(512, 512)
    fan_in_initialise(scope(layer), activation, seeded())
    assert layer.weight.var().item() == pytest.approx(weight / 512, rel=0.02)
    assert layer.bias.var().item() == pytest.approx(bias, rel=0.2, abs=1e-12)


@pytest.mark.parametrize(
    ("activation", "function"), [("relu", torch.relu), ("gelu", F.gelu), ("silu", F.silu)]
)
def test_the_gain_keeps_the_second_moment(activation: str, function: Callable[[Tensor], Tensor]) -> None:
    """E phi(z)^2 of a unit normal, by quadrature."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    moment = torch.trapezoid(function(z).square() * density, z).item()
    assert orthogonal_gain(activation) ** 2 * moment == pytest.approx(1, rel=1e-3)


def test_orthogonal_weights_are_orthogonal() -> None:
    layer = nn.Linear(32, 32)
    orthogonal_initialise(scope(layer), 1.5, seeded())
    torch.testing.assert_close(layer.weight @ layer.weight.T, 2.25 * torch.eye(32), rtol=1e-4, atol=1e-5)
    assert not layer.bias.any()


def test_lsuv_gives_every_layer_unit_variance() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(6)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())])
    x = torch.randn(128, 64)
    unit_variance(layout_of(model).parameters, lambda: model(x))
    for layer, activation in zip(layers, model[1::2], strict=True):
        y = layer(x)
        assert y.var().item() == pytest.approx(1, abs=0.1)
        x = activation(y)


CASES = {case.name: case for case in (*zoo.FAULTY, *zoo_residual.FAULTY, *zoo_units.FAULTY)}
MENDED = ("V1b", "X2a", "G1a", "I1a", "D1a", "S1b", "Z1a")


@pytest.mark.parametrize("name", MENDED)
def test_the_first_repair_of_a_faulty_model_leaves_no_finding(name: str) -> None:
    case = CASES[name]
    model, inputs, loss = case.build(0)
    before = fingerprint(model)
    report = gradflow.inspect(model, inputs, loss, trained=case.trained, try_fixes=True)
    first = report.repairs[0]
    assert first.helped
    assert first.remaining == ()
    assert case.rule in first.solved
    assert fingerprint(model) == before


def test_the_numbers_of_a_repair_are_those_of_the_model_written_so() -> None:
    """V2b with a scaled skip, by hand: the same J, in the same seeded step."""
    model, inputs, loss = CASES["V2b"].build(0)
    report = gradflow.inspect(model, inputs, loss, try_fixes=True)
    found = next(outcome for outcome in report.repairs if outcome.name == "scaled-skip")

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = model.layers, model.head

        def forward(self, x: Tensor) -> Tensor:
            for layer, activation in zip(self.layers[::2], self.layers[1::2], strict=True):
                x = x + activation(layer(x)) / math.sqrt(40)
            return self.head(x)

    by_hand = gradflow.inspect(Written(), inputs, loss)
    assert found.after is not None
    assert found.after.gain == pytest.approx(by_hand.profile.gain, rel=1e-5)


@pytest.mark.parametrize("case", zoo.HEALTHY[:2], ids=lambda case: case.name)
def test_a_healthy_model_has_nothing_to_repair(case: zoo.Case) -> None:
    assert gradflow.inspect(*case.build(0), try_fixes=True).repairs == ()


def test_a_cut_graph_has_no_repair_of_this_kind() -> None:
    assert gradflow.inspect(*zoo.cut_trunk(0), try_fixes=True).repairs == ()


def test_a_multiplied_zero_is_not_mended_by_new_weights() -> None:
    report = gradflow.inspect(*CASES["Z1b"].build(0), try_fixes=True)
    assert report.repairs
    assert not any(outcome.helped for outcome in report.repairs)
    assert "none of them leaves fewer findings" in str(report)


def test_a_repair_that_raises_is_said_and_the_model_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, loss = CASES["V1b"].build(0)
    report = gradflow.inspect(model, inputs, loss)

    def wreck(piece: repairs.Workpiece) -> None:
        with torch.no_grad():
            piece.scope[0].parameter.zero_()
        raise gradflow.errors.UsageError("too narrow for it")

    broken = repairs.Repair(name="wreck", words="a wreck", code="", answers=("GF101",), apply=wreck)
    monkeypatch.setattr(repairs, "REPAIRS", (broken,))
    before = fingerprint(model)
    tried = try_repairs(target_from_objects(model, inputs, loss), report)
    assert [(outcome.after, outcome.note) for outcome in tried.repairs] == [(None, "too narrow for it")]
    assert fingerprint(model) == before
    assert "could not be run: too narrow for it" in str(tried)


def test_a_model_is_put_back_from_inside_a_repair() -> None:
    model, inputs, loss = CASES["V1b"].build(0)
    before = fingerprint(model)
    ground = repairs.Ground(
        parameters=frozenset(name for name, _ in model.named_parameters()), activation="sigmoid", branches=()
    )
    with (
        pytest.raises(ZeroDivisionError),
        repaired(target_from_objects(model, inputs, loss), repairs.REPAIRS[-1], ground, seed=0) as target,
    ):
        assert fingerprint(target.module) != before
        raise ZeroDivisionError
    assert fingerprint(model) == before


def test_a_transformer_of_a_library_gets_its_repairs() -> None:
    """GPT-2 of unit-variance weights: the stream grows and the gradient explodes through its addmm layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=8, n_embd=64, n_head=4, vocab_size=128, n_positions=64, initializer_range=1.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    ids = torch.randint(0, 128, (4, 32))
    before = fingerprint(model)
    report = gradflow.inspect(model, {"input_ids": ids, "labels": ids}, try_fixes=True)
    helped = {outcome.name: outcome for outcome in report.repairs if outcome.helped}
    assert {"he-init", "orthogonal-init", "lsuv-init"} <= helped.keys()
    assert all(outcome.after is not None for outcome in report.repairs)
    assert fingerprint(model) == before


def outcome(name: str, **changes: Any) -> RepairOutcome:
    before = Measure(gain=4.1e-9, signal_gain=1e-8, errors=1, warnings=0)
    values: dict[str, Any] = {
        "name": name,
        "words": f"a {name}",
        "where": "layers.2–layers.19",
        "code": "x = x + layer(x)",
        "answers": ("GF101",),
        "before": before,
        "after": Measure(gain=0.61, signal_gain=1.0, errors=0, warnings=0),
        "solved": ("GF101",),
    }
    return RepairOutcome(**(values | changes))


def test_cells_say_what_a_repair_did() -> None:
    assert repair_cells(outcome("skip")) == ("skip", "4.1e-09 → 0.61", "none")
    left = outcome("scale", remaining=("GF101", "GF304"))
    assert repair_cells(left)[2] == "GF101, GF304"
    assert repair_cells(outcome("wreck", after=None))[1] == "4.1e-09 → –"


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_section_fits_its_screen(width: int) -> None:
    worse = Measure(gain=1e-12, signal_gain=0.0, errors=2, warnings=0)
    tried = [outcome("skip around each layer"), *(outcome(f"no use {i}", after=worse) for i in range(5))]
    lines = [line.plain for line in repair_lines(tried, Screen(width=width))]
    assert all(len(line) <= width for line in lines)
    assert [line for line in lines if line.startswith("✓")] == [
        "✓ skip around each layer  4.1e-09 → 0.61  none"
    ]
    assert sum("no use" in line for line in lines) >= 1
    assert repair_lines([], Screen(width=width)) == []


def test_the_command_line_tries_and_tells(tmp_path: Path) -> None:
    target = "sample_models/deep_sigmoid_mlp.py"
    done = CliRunner().invoke(app, ["inspect", target, "--try-fixes", "--format", "json"])
    assert done.exit_code == 0, done.output
    tried = json.loads(done.stdout)["repairs"]
    assert tried[0]["helped"] is True
    assert tried[0]["before"]["gain"] < 1e-10 < 0.01 < tried[0]["after"]["gain"]
    shown = CliRunner().invoke(app, ["inspect", target, "--try-fixes", "--format", "markdown"])
    assert "### Fixes tried" in shown.stdout
    sound = CliRunner().invoke(app, ["inspect", "sample_models/small_gpt.py", "--try-fixes"])
    assert "Fixes tried" not in sound.stdout
    assert "no finding here has a repair to try" in sound.stderr
