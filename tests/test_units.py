"""What units do, against float64 by the definitions: dead, sunk, dormant, saturated, stuck, gates, tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow
from gradflow.recording.activations import ActivationCollector as Collector
from gradflow.recording.activations import Family, UnitPool, family_of
from gradflow.trace_model import ActivationRecord


class Functional(nn.Module):
    """A layer, then a nonlinearity that is only a function call, then a head."""

    def __init__(self, layer: nn.Module, act: Callable[[Tensor], Tensor], head: nn.Module) -> None:
        super().__init__()
        self.layer, self.act, self.head = layer, act, head

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.layer(x))
        return self.head(hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden)


def energy(outputs: Tensor, _inputs: Any) -> Tensor:
    return outputs.square().mean()


def records(model: nn.Module, x: Tensor) -> tuple[ActivationRecord, ...]:
    return gradflow.inspect(model, (x,), energy).trace.activations


def by_unit(z: Tensor, axis: int) -> Tensor:
    """[observations, units], float64."""
    return z.detach().double().movedim(axis, -1).flatten(0, -2)


def inactive(z: Tensor) -> float:
    return ((z > 0).double().mean(0) < 0.01).double().mean().item()


def always(z: Tensor) -> float:
    return ((z > 0).double().mean(0) > 0.99).double().mean().item()


def sunk(z: Tensor) -> float:
    low = z.mean(0) < -4 * z.std(0, correction=0)
    return (low & (z <= 0).all(0)).double().mean().item()


def dormant(h: Tensor) -> float:
    size = h.abs().mean(0)
    return (size <= 0.1 * size.mean()).double().mean().item()


def saturated(z: Tensor, limit: float) -> float:
    return (z.abs() > limit).double().mean().item()


def stuck(z: Tensor, limit: float) -> float:
    sides = torch.stack(((z > limit).double().mean(0), (z < -limit).double().mean(0)))
    return (sides.max(0).values >= 0.99).double().mean().item()


def shifted(layer: nn.Module) -> nn.Module:
    """A quarter of the units far below 0, a quarter near 0, a quarter far above."""
    units = layer.bias.shape[0]
    with torch.no_grad():
        layer.bias.copy_(torch.linspace(-8.0, 8.0, units)[torch.randperm(units)])
    return layer


RELU_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "function": F.relu,
    "function in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "clamp in place": lambda x: x.clamp_(0.0),
    "clamp_min": lambda x: x.clamp_min(0),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 9.0),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
}


@pytest.mark.parametrize("form", RELU_FORMS)
def test_a_rectifier_is_seen_however_it_is_written(form: str) -> None:
    torch.manual_seed(0)
    layer, x = shifted(nn.Linear(32, 40)), torch.randn(400, 32)
    (record,) = records(Functional(layer, RELU_FORMS[form], nn.Linear(40, 3)), x)
    z = layer(x).detach().double()
    assert (record.units, record.observations, record.sunk) == (40, 400, None)
    assert record.inactive == pytest.approx(inactive(z), abs=1e-6)
    assert record.always_active == pytest.approx(always(z), abs=1e-6)
    assert 0.2 < inactive(z) < 0.8
    assert record.name == ("act" if form.startswith("module") else "")


@pytest.mark.parametrize("rows", [15, 16, 18, 64, 297, 298, 300])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("features", [(), (3,)])
def test_with_few_observations_a_unit_must_be_sunk(
    rows: int, inplace: bool, features: tuple[int, ...]
) -> None:
    """Two roads: what was measured of a (samples, features) tensor anyway, and a copy of any other."""
    torch.manual_seed(0)
    layer, x = shifted(nn.Linear(16, 64)), torch.randn(rows // math.prod(features), *features, 16)
    rows = x.shape[:-1].numel()
    (record,) = records(Functional(layer, nn.ReLU(inplace), nn.Linear(64, 3)), x)
    z = by_unit(layer(x), -1)
    assert record.observations == rows
    assert record.inactive == pytest.approx(inactive(z), abs=1e-6)
    if 16 <= rows < 298:
        assert record.sunk == pytest.approx(sunk(z), abs=1e-6)
        assert 0 < sunk(z) < inactive(z)
    else:
        assert record.sunk is None


@pytest.mark.parametrize("size", [6, 40])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inplace", [False, True])
def test_units_of_a_convolution_are_channels(size: int, layout: Any, inplace: bool) -> None:
    """Small tensors exactly; of large ones a sample that meets every channel."""
    torch.manual_seed(0)
    layer = shifted(nn.Conv2d(3, 48, 3, padding=1)).to(memory_format=layout)
    x = torch.randn(9, 3, size, size).to(memory_format=layout)
    (record,) = records(Functional(layer, lambda h: F.relu(h, inplace), nn.Linear(48, 3)), x)
    z = by_unit(layer(x), 1)
    whole = 9 * 48 * size * size <= 16_384
    assert record.units == 48
    assert record.observations == len(z) if whole else 298 <= record.observations < len(z)
    # A channel within a whisker of 1% may fall on either side in a sample.
    assert record.inactive == pytest.approx(inactive(z), abs=1e-6 if whole else 2.1 / 48)
    assert inactive(z) > 0.2


@pytest.mark.parametrize(
    ("layer", "shape", "units"),
    [
        (nn.Linear(6, 20), (4, 5, 5, 6), 20),  # channels last, as in ConvNeXt
        (nn.Linear(6, 20), (4, 7, 6), 20),
        (nn.Conv1d(6, 20, 3), (4, 6, 9), 20),
        (nn.Sequential(nn.Conv1d(6, 20, 3), nn.BatchNorm1d(20)), (4, 6, 9), 20),
        (nn.Sequential(nn.Conv3d(6, 20, 3), nn.Dropout(0.1)), (2, 6, 4, 4, 4), 20),
        (nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20)), (4, 5, 5, 6), 20),
    ],
)
def test_the_producer_says_which_dimension_is_the_units(
    layer: nn.Module, shape: tuple[int, ...], units: int
) -> None:
    model = nn.Sequential(layer, nn.GELU(), nn.Flatten(), nn.LazyLinear(2))
    (record,) = records(model, torch.randn(shape))
    assert record.units == units


@pytest.mark.parametrize(
    ("act", "limit"), [(torch.tanh, 2.5), (torch.tanh_, 2.5), (torch.sigmoid, 5.0), (torch.sigmoid_, 5.0)]
)
@pytest.mark.parametrize("width", [24, 2048])
def test_saturation_is_read_off_the_pre_activation(
    act: Callable[[Tensor], Tensor], limit: float, width: int
) -> None:
    torch.manual_seed(0)
    layer, x = shifted(nn.Linear(32, width)), 1.5 * torch.randn(350, 32)
    (record,) = records(Functional(layer, act, nn.Linear(width, 3)), x)
    z = by_unit(layer(x), -1)
    assert record.observations == 350
    assert record.saturated == pytest.approx(saturated(z, limit), abs=1e-5)
    assert record.stuck == pytest.approx(stuck(z, limit), abs=1e-6)
    assert 0 < stuck(z, limit) < saturated(z, limit) < 1
    assert (record.dormant is None) == (limit == 5.0)
    if limit == 2.5:
        assert record.dormant == pytest.approx(dormant(torch.tanh(z)), abs=1e-6)


@pytest.mark.parametrize(
    "act", [F.gelu, F.silu, F.elu, F.selu, F.softplus, F.mish, F.leaky_relu, F.hardswish]
)
def test_dormant_units_are_read_off_the_output(act: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 50), torch.randn(100, 32)
    with torch.no_grad():
        layer.weight[:10] *= 0.01
        layer.bias[:10] = -12.0 if act is F.softplus else 0.0
    (record,) = records(Functional(layer, act, nn.Linear(50, 3)), x)
    assert record.dormant == pytest.approx(dormant(by_unit(act(layer(x)), -1)), abs=1e-6)
    assert record.dormant == pytest.approx(0.2)
    assert (record.inactive, record.saturated) == (None, None)


def test_a_layer_of_zeros_has_no_dormant_units() -> None:
    layer = nn.Linear(8, 8)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    (record,) = records(Functional(layer, F.gelu, nn.Linear(8, 2)), torch.randn(20, 8))
    assert record.dormant is None


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "family"),
    [
        ("relu", (), None, Family.RECTIFIER),
        ("clamp", (), {"min": 0}, Family.RECTIFIER),
        ("clamp", (), {"min": 0.0, "max": 6.0}, Family.RECTIFIER),
        ("clamp", (0,), None, Family.RECTIFIER),
        ("clamp", (), {"min": 1e-6}, None),
        ("clamp", (-1, 1), None, None),
        ("clamp", (), {"max": 0}, None),
        ("clamp_min", (0,), None, Family.RECTIFIER),
        ("clamp_min_", (1e-9,), None, None),
        ("hardtanh", (), None, Family.OTHER),
        ("hardtanh", (), {"min_val": 0.0, "max_val": 6.0}, Family.RECTIFIER),
        ("threshold", (0.0, 0.0), None, Family.RECTIFIER),
        ("threshold", (0.1, 20.0), None, None),
        ("leaky_relu", (), None, Family.OTHER),
        ("softmax", (), None, None),
    ],
)
def test_what_counts_as_a_rectifier(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None, family: Family | None
) -> None:
    assert family_of(op, (torch.zeros(2, 2), *args), kwargs) is family


class Gated(nn.Module):
    """``how`` says what becomes of sigmoid(a(x)) and of relu(b(x))."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head, self.how = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2), how

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.how(torch.sigmoid(self.a(x)), F.relu(self.b(x))))


@pytest.mark.parametrize(
    ("how", "gate"),
    [
        (lambda s, r: s * r, True),
        (lambda s, r: r * s.unsqueeze(1).squeeze(1), True),
        (lambda s, r: (1 - s) * r, True),
        (lambda s, r: torch.mul(0.5 * (1 + s), r), True),
        (lambda s, r: s + r, False),
        (lambda s, r: 2 * s + r, False),
        (lambda s, r: s + 0 * r, False),
    ],
)
def test_a_gate_multiplies_another_stream(how: Callable[[Tensor, Tensor], Tensor], gate: bool) -> None:
    sigmoid = records(Gated(how), torch.randn(16, 8))[0]
    assert (sigmoid.op, sigmoid.is_gate) == ("sigmoid", gate)


def test_the_models_output_counts_as_a_gate_and_a_hidden_layer_does_not() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 1), nn.Sigmoid(), nn.Flatten())
    assert [record.is_gate for record in records(model, torch.randn(16, 8))] == [False, True]


def test_calls_of_one_module_are_told_apart() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.layers = nn.ReLU(), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.act(layer(x))
            return x + F.gelu(self.layers[0](x)) + F.gelu(self.layers[1](x))

    found = records(Shared(), torch.randn(16, 8))
    keys = [(record.name, record.op, record.call, record.index) for record in found]
    assert keys == [
        ("act", "relu", 0, 0),
        ("act", "relu", 1, 0),
        ("act", "relu", 2, 0),
        ("", "gelu", 0, 0),
        ("", "gelu", 0, 1),
    ]
    assert [record.layer is None for record in found] == [False] * 3 + [True] * 2


def test_the_loss_and_raw_inputs_have_no_units() -> None:
    class Squashed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(100 * x))

    def loss(outputs: Tensor, _inputs: Any) -> Tensor:
        return torch.sigmoid(outputs).mean()

    assert gradflow.inspect(Squashed(), (torch.randn(16, 8),), loss).trace.activations == ()


def test_empty_slots_of_an_expert_do_not_count() -> None:
    """Rows of zeros before the rectifier are padding; with them a living unit would look dead."""
    torch.manual_seed(0)
    z = torch.randn(1, 1000, 8)
    z[:, 32:] = 0
    collector = Collector(UnitPool())
    slot = collector.add(z, Family.RECTIFIER, 2)
    found = collector.results()[slot or 0]
    assert found is not None
    assert (found.inactive, found.observations) == (0.0, 32)


def test_buffers_serve_step_after_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(shifted(nn.Linear(16, 32)), nn.Tanh(), shifted(nn.Linear(32, 32)), nn.ReLU())
    x = torch.randn(40, 16)
    once = gradflow.inspect(model, (x,), energy).trace.activations
    assert gradflow.inspect(model, (x,), energy, steps=3).trace.activations == once


def test_tokens_of_the_trunk() -> None:
    """CMF and signal over tokens, exact for a tensor that is small enough to be taken whole."""
    torch.manual_seed(0)
    x = torch.randn(3, 10, 24) + 2 * torch.randn(3, 1, 24)
    layers = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))
    report = gradflow.inspect(layers, (x,), energy)
    h = x.double()
    expected = {}
    for name, layer in layers.double().named_children():
        h = layer(h)
        expected[name] = h.detach()
    layers.float()
    for point in report.trace.trunk.points:
        values = expected[point.name]
        mean = values.mean(1)
        signal = values.var(1, correction=0).mean().sqrt().item()
        common = (mean.square().sum() / values.square().sum(2).mean(1).sum()).item()
        assert point.token_signal == pytest.approx(signal, rel=1e-5)
        assert point.token_common_mode == pytest.approx(common, rel=1e-5)


# Closed forms
@pytest.mark.parametrize(("deviation", "share"), [(3.0, 0.405), (8.0, 0.755)])
def test_saturation_of_gaussian_pre_activations(deviation: float, share: float) -> None:
    """2(1 - Phi(2.5/s))."""
    exact = math.erfc(2.5 / deviation / math.sqrt(2))
    assert exact == pytest.approx(share, abs=1e-3)
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=False)
    nn.init.orthogonal_(layer.weight)
    (record,) = records(Functional(layer, torch.tanh, nn.Linear(256, 3)), deviation * torch.randn(256, 256))
    # 65 536 draws: three standard errors are 0.006.
    assert record.saturated == pytest.approx(exact, abs=0.006)


def he_stack(width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.kaiming_normal_(linear.weight)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def test_one_rectified_layer_has_a_common_mode_of_one_over_pi() -> None:
    """Independent samples, E relu(z)^2 = 1/2 and (E relu z)^2 = 1/(2 pi)."""
    torch.manual_seed(0)
    report = gradflow.inspect(he_stack(512, 1), (torch.randn(512, 512),), energy)
    assert report.layers.set_index("name").loc["1", "common_mode"] == pytest.approx(1 / math.pi, rel=0.02)


def test_samples_align_as_the_correlation_map_says() -> None:
    """c' = (sqrt(1 - c^2) + c (pi - acos c)) / pi, from 0: 0.318 at 1, 0.872 at 10."""
    torch.manual_seed(0)
    c, path = 0.0, []
    for _ in range(10):
        c = (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / math.pi
        path.append(c)
    assert (path[0], path[9]) == pytest.approx((0.318, 0.872), abs=1e-3)
    report = gradflow.inspect(he_stack(2048, 10), (torch.randn(8, 2048),), energy)
    rows = report.layers.set_index("name")
    for name, c in (("1", path[0]), ("19", path[9])):
        # The mean of N samples holds 1/N of what tells them apart.
        assert rows.loc[name, "common_mode"] == pytest.approx(c + (1 - c) / 8, rel=0.03)
