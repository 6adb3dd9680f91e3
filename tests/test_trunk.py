"""The trunk: which tensors it runs through, whatever a forward is written like."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.findings import Severity
from tests.residual_free_zoo import HyperConnected


class Forward(nn.Module):
    """Eight square linears and whatever else a case needs, run by a function."""

    def __init__(self, run: Callable[[Forward, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))
        self.head = nn.Linear(8, 3)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Doubled(torch.autograd.Function):
    """An op that no torch function mode sees into."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 2


def _rectified(x: Tensor) -> Tensor:
    return torch.relu(x) * 2.0


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script is; models still use it
    scripted = torch.jit.script(_rectified)


def functional(net: Forward, x: Tensor) -> Tensor:
    for layer in net.layers[:5]:
        x = torch.tanh(F.linear(x, layer.weight, layer.bias))
    return net.head(x)


def through_custom_function(net: Forward, x: Tensor) -> Tensor:
    for layer in net.layers[:4]:
        x = Doubled.apply(layer(x))
    return net.head(x)


def through_script(net: Forward, x: Tensor) -> Tensor:
    for layer in net.layers[:4]:
        x = scripted(layer(x))
    return net.head(x)


def in_slices(net: Forward, x: Tensor) -> Tensor:
    buffer = torch.zeros(x.shape[0], 3, 8)
    for i, layer in enumerate(net.layers[:3]):
        buffer[:, i] = x = layer(x)
    return net.head(net.layers[3](buffer.view(-1, 8)))


def checkpointed(reentrant: bool) -> Callable[[Forward, Tensor], Tensor]:
    def run(net: Forward, x: Tensor) -> Tensor:
        x = net.layers[0](x)
        for layer in net.layers[1:4]:
            x = checkpoint(layer, torch.tanh(x), use_reentrant=reentrant)
        return net.head(x)

    return run


def looped(net: Forward, x: Tensor) -> Tensor:
    for _ in range(6):
        x = torch.tanh(net.layers[0](x))
    return net.head(net.layers[1](x))


def longest_of_two(net: Forward, x: Tensor) -> Tensor:
    long = x
    for layer in net.layers[:4]:
        long = layer(long)
    return net.head(torch.cat([long[:, :4], net.layers[4](x)[:, :4]], 1))


def auxiliary_last(net: Forward, x: Tensor) -> Tensor:
    for layer in net.layers[:3]:
        x = layer(x)
    return net.head(x) + 0 * net.layers[3](x).sum()


CHAINS = {
    "modules": (lambda net, x: net.head(nn.Sequential(*net.layers[:4])(x)), range(4)),
    "functional": (functional, range(5)),
    "custom function": (through_custom_function, range(4)),
    "scripted function": (through_script, range(4)),
    "slices of a buffer": (in_slices, range(4)),
    "checkpoint": (checkpointed(False), range(4)),
    "re-entrant checkpoint": (checkpointed(True), range(4)),
    "a layer used again": (looped, (0, 1)),
    "the longer way": (longest_of_two, range(4)),
    "beside an auxiliary": (auxiliary_last, range(3)),
}


@pytest.mark.parametrize("case", CHAINS)
def test_weight_layers_make_the_trunk(case: str) -> None:
    run, layers = CHAINS[case]
    net = Forward(run)
    report = gradflow.inspect(net, torch.randn(6, 8, requires_grad=case.startswith("re-")))
    trunk = report.trace.trunk
    assert trunk.kind == "weights"
    assert len(trunk.points) == len(tuple(layers))
    assert all(point.gradient_norm is not None and point.gradient_norm > 0 for point in trunk.points)
    if case not in ("functional",):
        assert [point.name for point in trunk.points] == [f"layers.{i}" for i in layers]


def conv_stack(net: Forward, x: Tensor) -> Tensor:
    for conv in net.convs:
        x = torch.relu(conv(x))
    return x


def pooled(net: Forward, x: Tensor) -> Tensor:
    x = F.adaptive_avg_pool2d(conv_stack(net, x), 1).flatten(1)
    return net.head(torch.relu(net.layers[1](torch.relu(net.layers[0](x)))))


def mean_pooled(net: Forward, x: Tensor) -> Tensor:
    return net.head(net.layers[0](conv_stack(net, x).mean((2, 3))))


def squeezed_and_excited(net: Forward, x: Tensor) -> Tensor:
    for i, conv in enumerate(net.convs):
        x = torch.relu(conv(x))
        gate = net.layers[2 * i + 1](torch.relu(net.layers[2 * i](x.mean((2, 3)))))
        x = x * torch.sigmoid(gate)[:, :, None, None]
    return net.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_the_trunk_stops_before_global_pooling() -> None:
    for run in (pooled, mean_pooled):
        points = gradflow.inspect(Forward(run), torch.randn(4, 8, 6, 6)).trace.trunk.points
        assert [point.name for point in points] == [f"convs.{i}" for i in range(4)] or [
            point.name for point in points
        ] == [f"convs.{i}" for i in range(3)]


def test_a_pool_that_a_path_goes_around_does_not_end_the_trunk() -> None:
    points = gradflow.inspect(Forward(squeezed_and_excited), torch.randn(4, 8, 6, 6)).trace.trunk.points
    assert "convs.3" in [point.name for point in points]


def class_token(net: Forward, x: Tensor) -> Tensor:
    for layer in net.layers[:4]:
        x = x + layer(net.norm(x))
    return net.head(net.layers[5](x[:, 0]))


def rms_normed(net: Forward, x: Tensor) -> Tensor:
    for layer in net.layers[:4]:
        x = x + layer(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    return net.head(x)


def encoder_decoder(net: Forward, x: Tensor) -> Tensor:
    memory, y = x, x.flip(1)
    for layer in net.layers[:2]:
        memory = memory + layer(memory)
    for layer in net.layers[2:5]:
        y = y + layer(y)
        y = y + net.layers[5](F.scaled_dot_product_attention(y, memory, memory))
    return net.head(y)


@pytest.mark.parametrize(("run", "adds"), [(class_token, 4), (rms_normed, 4), (encoder_decoder, 6)])
def test_residual_adds_make_the_trunk(run: Callable[[Forward, Tensor], Tensor], adds: int) -> None:
    trunk = gradflow.inspect(Forward(run), torch.randn(4, 5, 8)).trace.trunk
    assert (trunk.kind, len(trunk.points)) == ("residual", adds)
    assert {point.op for point in trunk.points} == {"add"}


def test_a_skip_over_the_whole_body_leaves_the_blocks_on_the_trunk() -> None:
    def body(net: Forward, x: Tensor) -> Tensor:
        y = net.layers[6](x)
        start = y
        for layer in net.layers[:5]:
            y = y + torch.tanh(layer(y))
        return net.head(start + net.layers[7](y))

    trunk = gradflow.inspect(Forward(body), torch.randn(6, 8)).trace.trunk
    assert (trunk.kind, len(trunk.points)) == ("residual", 5)


def test_two_adds_do_not_hide_a_deep_plain_stack() -> None:
    def mostly_plain(net: Forward, x: Tensor) -> Tensor:
        for layer in net.layers[:6]:
            x = torch.sigmoid(layer(x))
        for layer in net.layers[6:]:
            x = x + layer(x)
        return net.head(x)

    report = gradflow.inspect(Forward(mostly_plain), torch.randn(64, 8))
    names = [point.name for point in report.trace.trunk.points]
    assert [f"layers.{i}" for i in range(6)] == names[:6]
    assert any(finding.rule == "GF101" for finding in report.findings)


def test_batch_norm_between_points_is_seen() -> None:
    def normed(net: Forward, x: Tensor) -> Tensor:
        return net.head(net.layers[1](torch.relu(net.batch_norm(net.layers[0](x)))))

    plain = gradflow.inspect(Forward(functional), torch.randn(6, 8)).trace.trunk
    with_norm = gradflow.inspect(Forward(normed), torch.randn(6, 8)).trace.trunk
    assert (plain.batch_norm, with_norm.batch_norm) == (False, True)


def test_gradients_along_the_trunk_are_those_of_autograd() -> None:
    net = Forward(functional).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    weights = torch.randn(6, 3, dtype=torch.float64)
    report = gradflow.inspect(net, x, lambda out, _: (out * weights).sum())
    kept, y = [], x
    for layer in net.layers[:5]:
        kept.append(F.linear(y, layer.weight, layer.bias))
        y = torch.tanh(kept[-1])
    gradients = torch.autograd.grad((net.head(y) * weights).sum(), kept)
    expected = [(g.norm() / 6**0.5).item() for g in gradients]
    assert [point.gradient_norm for point in report.trace.trunk.points] == pytest.approx(expected, rel=1e-9)


def test_a_norm_behind_a_weight_layer_stands_for_it() -> None:
    """The scale of a weight that a normalisation undoes must not move the gain."""

    def gain(factor: float) -> float:
        torch.manual_seed(0)
        layers = [m for _ in range(6) for m in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())]
        net = nn.Sequential(*layers, nn.Linear(16, 4))
        with torch.no_grad():
            layers[0].weight.mul_(factor)
            layers[0].bias.zero_()
        return gradflow.inspect(net, torch.randn(64, 16)).profile.gain

    assert gain(100.0) == pytest.approx(gain(1.0), rel=1e-2)


class LowRank(nn.Module):
    """A frozen layer and its update, zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(16, 16), nn.Linear(16, 2, False), nn.Linear(2, 16, False)
        self.base.requires_grad_(False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_low_rank_updates_are_no_layers_of_their_own() -> None:
    net = nn.Sequential(*[m for _ in range(4) for m in (LowRank(), nn.GELU())], nn.Linear(16, 4))
    report = gradflow.inspect(net, torch.randn(32, 16))
    assert [row.kind for row in report.trace.residuals] == ["low_rank"] * 4
    assert [point.name for point in report.trace.trunk.points] == ["0", "2", "4", "6"]
    assert not any(finding.severity == "error" for finding in report.findings)


def test_a_cell_over_time_stands_where_it_is_used_last() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRUCell(8, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(x.shape[0], 8)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return self.head(torch.tanh(self.out(h)))

    report = gradflow.inspect(Loop(), torch.randn(16, 100, 8))
    assert report.profile.gain > 0.02
    assert not report.findings


def hyper_connected(carried: float = 1.0) -> HyperConnected:
    """Eight blocks, whose branches add little; ``carried`` scales what the skips carry."""
    torch.manual_seed(0)
    model = HyperConnected(8, carried=carried)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "body.3" in name:
                parameter.mul_(0.1)
    return model


def test_hyper_connections_make_the_trunk() -> None:
    """Not the layers that read the streams: what mixes them carries the gradient past every branch."""
    model, x = hyper_connected(), torch.randn(6, 5, 8)
    report = gradflow.inspect(model, x, loss=lambda output, _: output.sum())
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: outputs.append(args[2]))
    gradients = torch.autograd.grad(model(x).sum(), outputs)
    expected = [(g.double().norm() / 6**0.5).item() for g in gradients]
    points = report.trace.trunk.points
    assert [point.name for point in points] == [f"blocks.{k}" for k in range(8)]
    assert [point.gradient_norm for point in points] == pytest.approx(expected, rel=1e-5)
    assert not [f for f in report.findings if f.severity is not Severity.INFO]


def test_streams_that_lose_what_they_carry_are_found() -> None:
    model = hyper_connected(carried=0.1)
    for block in model.blocks:
        block.body[0] = nn.Identity()  # a norm would make up for it: its gradient grows as its input shrinks
    report = gradflow.inspect(model, torch.randn(6, 5, 8))
    assert any(f.rule == "GF101" and f.severity is Severity.ERROR for f in report.findings)
