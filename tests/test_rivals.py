"""The published rules that gradflow is compared with: each on its own paper's or page's example, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import rivals
import torch
from rivals import DEAD, EXPLODING, NO_GRADIENT, NON_FINITE, SATURATED, VANISHING, Gradient, Sight, Units
from torch import nn
from torch.nn import functional as F

HEALTHY = Sight(
    gradients=tuple(
        Gradient(name=name, kernel=True, size=100, norm=1.0, mean_magnitude=0.1, zeros=0, finite=True)
        for name in ("first.weight", "last.weight")
    ),
    without=(),
    units=(),
    ops=(1.0, 1.0),
    layers=(1.0, 1.0),
    near_zero=(0.0, 0.5),
    finite=True,
)


def first(sight: Sight, **changes: Any) -> Sight:
    """The same with the first parameter's gradient changed."""
    return replace(sight, gradients=(replace(sight.gradients[0], **changes), *sight.gradients[1:]))


def relu(active: float, magnitude95: float) -> Units:
    """Three of five units this active, the others healthy."""
    return Units(
        op="relu",
        active=(active,) * 3 + (0.5,) * 2,
        inside=(),
        magnitude95=(magnitude95,) * 3 + (1.0,) * 2,
    )


def saturated(inside: float) -> Units:
    return Units(op="tanh", active=(), inside=(inside,) * 3 + (1.0,) * 2, magnitude95=())


AT, SD, DC, TL, TM = (rule for _, rule in rivals.RIVALS)


@pytest.mark.parametrize(
    ("rule", "sight", "alarms"),
    [
        *((rule, HEALTHY, []) for rule in (AT, SD, DC, TL, TM)),
        # AutoTrainer needs both: the ratio below 1e-3 and the first kernel below 1e-4.
        (AT, first(HEALTHY, norm=9e-5), [VANISHING]),
        (AT, first(HEALTHY, norm=2e-4), []),
        (AT, first(HEALTHY, norm=71.0), [EXPLODING]),
        (AT, first(HEALTHY, norm=69.0), []),
        (AT, first(HEALTHY, finite=False), [EXPLODING]),
        (AT, replace(HEALTHY, gradients=tuple(replace(g, zeros=70) for g in HEALTHY.gradients)), [DEAD]),
        (AT, replace(HEALTHY, gradients=tuple(replace(g, zeros=69) for g in HEALTHY.gradients)), []),
        (SD, first(HEALTHY, mean_magnitude=0.9e-7), [VANISHING]),
        (SD, first(HEALTHY, mean_magnitude=1.1e-7), []),
        (SD, replace(HEALTHY, finite=False), [NON_FINITE]),
        (SD, replace(HEALTHY, units=(relu(0.009, 1.0),)), [DEAD]),
        (SD, replace(HEALTHY, units=(relu(0.011, 1.0),)), []),
        (SD, replace(HEALTHY, units=(saturated(0.009),)), [SATURATED]),
        (SD, replace(HEALTHY, units=(saturated(0.011),)), []),
        (DC, first(HEALTHY, mean_magnitude=0.9e-6), [VANISHING]),
        (DC, first(HEALTHY, mean_magnitude=1.1e-6), []),
        (DC, first(HEALTHY, mean_magnitude=1.1e6), [EXPLODING]),
        (DC, first(HEALTHY, mean_magnitude=0.9e6), []),
        (DC, replace(HEALTHY, units=(relu(0.5, 0.9e-5),)), [DEAD]),
        (DC, replace(HEALTHY, units=(relu(0.5, 1.1e-5),)), []),
        (TL, replace(HEALTHY, ops=(1.0, 0.9e-7)), [VANISHING]),
        (TL, replace(HEALTHY, ops=(1.0, 1.1e-7)), []),
        (TL, replace(HEALTHY, ops=(1.1e4, 1.0)), [EXPLODING]),
        (TL, replace(HEALTHY, ops=(0.9e4, 1.0)), []),
        (TL, replace(HEALTHY, ops=(1.0, 0.0)), [NO_GRADIENT]),
        (TM, replace(HEALTHY, layers=(1.0, 101.0)), [VANISHING]),
        (TM, replace(HEALTHY, layers=(1.0, 99.0)), []),
        (TM, replace(HEALTHY, layers=(1.1e3, 1e3)), [EXPLODING]),
        (TM, replace(HEALTHY, layers=(0.9e-8, 0.9e-8)), [NO_GRADIENT]),
        (TM, replace(HEALTHY, near_zero=(0.51,)), [DEAD]),
    ],
)
def test_a_rule_speaks_on_one_side_of_its_limit(
    rule: Callable[[Sight], Any], sight: Sight, alarms: list[str]
) -> None:
    assert list(rule(sight)) == alarms


def classes(outputs: torch.Tensor, _inputs: Any) -> torch.Tensor:
    return F.cross_entropy(outputs, torch.arange(len(outputs)) % outputs.shape[1])


def stack(depth: int, width: int, activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def test_auto_trainer_finds_the_vanishing_of_its_paper() -> None:
    """A deep stack of sigmoids: what its demo of a vanishing gradient holds."""
    torch.manual_seed(0)
    model = stack(12, 64, nn.Sigmoid)
    assert list(AT(rivals.look(model, (torch.randn(64, 64),), classes))) == [VANISHING]


def test_sagemaker_debugger_finds_the_saturation_of_its_page() -> None:
    """Tanh fed far beyond its limits of 9.5."""
    torch.manual_seed(0)
    model = stack(1, 64, nn.Tanh)
    sight = rivals.look(model, (1e4 * torch.randn(64, 64),), classes)
    assert SATURATED in list(SD(sight))


def test_the_deep_checker_finds_a_dead_layer() -> None:
    """Its dead-layer check: the 95th percentile of more than half of the units is zero."""
    torch.manual_seed(0)
    model = stack(2, 64, nn.ReLU)
    nn.init.constant_(model[0].bias, -50.0)
    assert DEAD in list(DC(rivals.look(model, (torch.randn(64, 64),), classes)))


def test_torch_lens_finds_nothing_in_the_example_of_its_page() -> None:
    """``nn.Linear(2, 1)`` on ones, summed: the norm at its output is 1."""
    sight = rivals.look(nn.Linear(2, 1), (torch.ones(1, 2),), lambda outputs, _: outputs.sum())
    assert 1.0 in sight.ops
    assert list(TL(sight)) == []


def test_torchmortem_finds_the_deep_sigmoids_of_its_example() -> None:
    """Its ``basic_mlp.py``: a deep MLP with sigmoids; a module that is never called counts as a gradient of 0."""
    torch.manual_seed(0)
    model = stack(6, 64, nn.Sigmoid)
    assert VANISHING in list(TM(rivals.look(model, (torch.randn(64, 64),), classes)))
    healthy = stack(1, 64, nn.Tanh)
    healthy.add_module("unused", nn.Linear(2, 2))
    healthy.forward = lambda x: healthy[2](healthy[1](healthy[0](x)))
    assert list(TM(rivals.look(healthy, (torch.randn(64, 64),), classes))) == [NO_GRADIENT]


def test_what_is_seen_is_what_autograd_says() -> None:
    """Norms, means and zeros of the gradients, and of the tensor in between, computed by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 10)).double()
    x = torch.randn(32, 8, dtype=torch.float64)
    sight = rivals.look(model, (x,), classes)
    before = model[0](x).detach().requires_grad_()
    loss = classes(model[2](before.relu()), None)
    middle, weight = torch.autograd.grad(loss, (before, model[2].weight))
    assert sight.layers[0] == pytest.approx(float(middle.norm()))
    assert sight.gradients[2].mean_magnitude == pytest.approx(float(weight.abs().mean()))
    assert sight.gradients[2].norm == pytest.approx(float(weight.norm()))
    assert sight.units[0].active == pytest.approx((before > 0).double().mean(0).tolist())
    assert sight.without == ()
