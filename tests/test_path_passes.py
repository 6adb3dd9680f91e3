"""The gradient by the number of branches it came through: equal to the sum over every path, one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_residual_numbers import Branch, square
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.recording.execution import record
from gradflow.recording.path_passes import PathRequest
from gradflow.recording.target import target_from_objects
from gradflow.reporters.json_file import contents
from gradflow.stream_profile import stream_profiles
from gradflow.trace_file import dumps, loads
from gradflow.trace_model import PathOrders, Trace
from tests.fingerprint import fingerprint
from tests.transformers_zoo import gpt2, llama, t5

WIDTH = 6


class Block(nn.Module):
    """skip + branch, of which a path takes one: the other is there in value, and brings no gradient back."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.short = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.taken: bool | None = None

    def branch(self, x: Tensor) -> Tensor:
        inner = self.norm(x)
        if self.kind == "nested":
            inner = inner + torch.tanh(self.short(inner))
        return self.two(torch.tanh(self.one(inner)))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.short(x) if self.kind == "projection" else 0.8 * x if self.kind == "scaled" else x
        parts = [self.branch(x)]
        if self.kind == "parallel":
            parts.append(torch.relu(self.short(x)))
        if self.taken is not None:
            skip = skip.detach() if self.taken else skip
            parts = parts if self.taken else [part.detach() for part in parts]
        if self.kind == "in place" and self.taken is None:
            parts[0] += skip
            return parts[0]
        total = skip + parts[0]
        for part in parts[1:]:
            total = total + part
        return torch.relu(total) if self.kind == "relu" else total


def net(*kinds: str) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), *(Block(kind) for kind in kinds), nn.Linear(WIDTH, 3)
    ).double()


def recorded(model: nn.Module, inputs: Any, loss: Any = None, **options: Any) -> Trace:
    target = target_from_objects(model, inputs, loss, optimizer=None, seed=0)
    return record(target, paths=PathRequest(**options))


def by_order(model: nn.Sequential, inputs: Tensor) -> list[Tensor]:
    """Every one of the 2^L paths, summed by how many branches it takes."""
    blocks = [block for block in model if isinstance(block, Block)]
    orders = [torch.zeros(len(inputs), WIDTH, dtype=torch.float64) for _ in range(len(blocks) + 1)]
    for path in itertools.product((False, True), repeat=len(blocks)):
        for block, taken in zip(blocks, path, strict=True):
            block.taken = taken
        start = model[0](inputs).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(square(model[1:](start), None), start)
        orders[sum(path)] += gradient
    for block in blocks:
        block.taken = None
    return orders


NETS = {
    "chain": ("plain",) * 6,
    "relu after the add": ("relu",) * 5,
    "a projection in between": ("plain", "plain", "projection", "plain", "plain"),
    "parallel": ("parallel",) * 4,
    "nested": ("plain", "nested", "nested", "plain"),
    "scaled": ("scaled", "plain", "scaled"),
    "in place": ("in place",) * 4,
    "mixed": ("in place", "projection", "parallel", "nested", "scaled", "relu"),
}


@pytest.mark.parametrize("name", NETS)
def test_every_order_is_the_sum_of_its_paths(name: str) -> None:
    model, inputs = net(*NETS[name]), torch.randn(4, WIDTH, dtype=torch.float64)
    trace = recorded(model, (inputs,), square)
    (paths,) = [p for p in trace.paths if len(p.sites) == len(NETS[name])]
    expected = by_order(model, inputs)
    start = model[0](inputs).detach().requires_grad_()
    (whole,) = torch.autograd.grad(square(model[1:](start), None), start)
    assert torch.allclose(sum(expected, torch.zeros_like(whole)), whole, rtol=1e-12, atol=0.0)
    assert paths.total_norm == pytest.approx(whole.norm().item(), rel=1e-10)
    assert paths.remainder_norm < 1e-12 * paths.total_norm
    assert list(paths.norms) == pytest.approx([p.norm().item() for p in expected], rel=1e-10)
    inner = [(p * whole).sum().item() / whole.square().sum().item() for p in expected]
    assert list(paths.inner_products) == pytest.approx(inner, rel=1e-10, abs=1e-12)
    assert sum(paths.inner_products) == pytest.approx(1.0, rel=1e-10)
    assert stream_profiles(trace)[0].exact is paths


def test_orders_left_out_are_the_remainder() -> None:
    model, inputs = net(*["plain"] * 5), torch.randn(4, WIDTH, dtype=torch.float64)
    (paths,) = recorded(model, (inputs,), square, orders=1).paths
    rest = sum(by_order(model, inputs)[2:], torch.zeros(4, WIDTH, dtype=torch.float64))
    assert len(paths.norms) == 2
    assert paths.remainder_norm == pytest.approx(rest.norm().item(), rel=1e-10)


def of_tokens() -> tuple[nn.Module, Tensor]:
    """A linear layer over tokens returns a view, and the stream is written into it."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(WIDTH, WIDTH)
            self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x += torch.tanh(block(x * 1.0))
            return x

    torch.manual_seed(0)
    return Stream().double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)


def test_a_stream_written_into_a_view_adds_up() -> None:
    model, inputs = of_tokens()
    (paths,) = recorded(model, (inputs,), square).paths
    assert len(paths.norms) == 4 and min(paths.norms) > 0
    assert paths.remainder_norm < 1e-12 * paths.total_norm
    # The path of skips alone is the loss's own gradient at the last sum.
    assert paths.norms[0] == pytest.approx(2 * model(inputs).norm().item(), rel=1e-10)


def randomly() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    he = math.sqrt(2.0)
    yield "pre-norm", lambda: nn.Sequential(*(Branch(64, (he, 1.0), before="norm") for _ in range(12)))
    yield "un-normalised", lambda: nn.Sequential(*(Branch(64, (he, he), before="relu") for _ in range(8)))
    yield "post-norm", lambda: nn.Sequential(*(Branch(64, (he, 1.0), after="norm") for _ in range(8)))


@pytest.mark.parametrize(("name", "build"), [*randomly()], ids=[name for name, _ in randomly()])
@pytest.mark.parametrize("seed", range(3))
def test_the_generating_function_is_near_the_passes_on_random_nets(
    name: str, build: Callable[[], nn.Module], seed: int
) -> None:
    """Half the sum of the differences of the shares of the energy: at most a twentieth of it is misplaced."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), build())
    direction = torch.randn(128, 64)
    trace = recorded(model, (torch.randn(128, 64),), lambda out, _: (out * direction).sum())
    profile = stream_profiles(trace)[0]
    assert profile.exact is not None
    squares = [norm**2 for norm in profile.exact.norms]
    exact = [square / sum(squares) for square in squares]
    apart = sum(abs(a - b) for a, b in itertools.zip_longest(exact, profile.path_lengths, fillvalue=0.0)) / 2
    assert apart < 0.05
    mean = sum(k * share for k, share in enumerate(exact))
    assert mean == pytest.approx(profile.effective_depth, rel=0.05)


def test_the_model_is_left_as_it_was() -> None:
    model = net("plain", "in place").train()
    model.insert(1, nn.Dropout(0.5))
    inputs = torch.randn(4, WIDTH, dtype=torch.float64)
    before, state = fingerprint(model), torch.get_rng_state()
    first = recorded(model, (inputs,), square)
    assert fingerprint(model) == before and torch.equal(torch.get_rng_state(), state)
    assert recorded(model, (inputs,), square).paths == first.paths
    assert first.paths[0].remainder_norm < 1e-12 * first.paths[0].total_norm


def test_from_python_they_are_asked_for_and_survive_the_file() -> None:
    model, inputs = net("plain", "plain"), torch.randn(4, WIDTH, dtype=torch.float64)
    plain = gradflow.inspect(model, (inputs,), square)
    assert plain.stream is not None and plain.stream.exact is None and plain.trace.paths == ()
    report = gradflow.inspect(model, (inputs,), square, paths=True)
    assert report.stream is not None and report.stream.exact == report.trace.paths[0]
    assert loads(dumps(report.trace)).paths == report.trace.paths
    (written,) = contents(report)["streams"]
    assert written["exact"]["norms"] == list(report.stream.exact.norms)


def test_a_checkpoint_that_runs_again_in_every_pass_changes_nothing() -> None:
    class Checkpointed(Block):
        def branch(self, x: Tensor) -> Tensor:
            return checkpoint(super().branch, x, use_reentrant=False)  # type: ignore[no-any-return]

    inputs, found = torch.randn(4, WIDTH, dtype=torch.float64), []
    for kind in (Block, Checkpointed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), kind("plain"), kind("plain"), kind("plain")).double()
        found.append(recorded(model, (inputs,), square).paths[0])
    assert found[0].norms == pytest.approx(found[1].norms, rel=1e-12)


def test_why_there_are_no_paths_is_said() -> None:
    inputs = torch.randn(4, WIDTH, dtype=torch.float64)
    assert recorded(net("plain"), (inputs,), square).paths_note == "no stream has two sites to tell apart"
    frozen = net("plain", "plain").requires_grad_(False)
    assert recorded(frozen, (inputs,), square).paths_note == "nothing asks for a gradient"

    class Reentrant(Block):
        def branch(self, x: Tensor) -> Tensor:
            return checkpoint(super().branch, x, use_reentrant=True)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Reentrant("plain"), Reentrant("plain")).double()
    trace = recorded(model, (inputs,), square)
    assert trace.paths == () and trace.paths_note.startswith("backward could not be run again: ")
    assert recorded(model[:1], (inputs,), square).residuals == ()


def test_a_stream_of_convolutions() -> None:
    class Conv(nn.Module):
        def __init__(self, width_in: int, width: int, stride: int) -> None:
            super().__init__()
            self.one = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
            self.two = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.short = nn.Conv2d(width_in, width, 1, stride) if stride > 1 else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            branch = self.bn2(self.two(F.relu(self.bn1(self.one(x)), inplace=True)))
            branch += self.short(x)
            return F.relu(branch, inplace=True)

    torch.manual_seed(0)
    blocks = [Conv(8, 8, 1), Conv(8, 8, 1), Conv(8, 16, 2), Conv(16, 16, 1)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    (paths,) = recorded(model, (torch.randn(4, 3, 8, 8),)).paths
    assert len(paths.sites) == 4 and len(paths.norms) == 5
    assert paths.remainder_norm < 1e-5 * paths.total_norm


@pytest.mark.parametrize(("build", "streams"), [(gpt2, [4]), (llama, [4]), (t5, [6, 4])])
def test_transformers_add_up(build: Callable[[], tuple[nn.Module, Any]], streams: list[int]) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    trace = recorded(model, inputs)
    assert [len(paths.sites) for paths in trace.paths] == streams
    for paths in trace.paths:
        check_sums(paths)


def check_sums(paths: PathOrders) -> None:
    assert sum(paths.inner_products) == pytest.approx(1.0, rel=1e-4)
    assert paths.remainder_norm < 1e-4 * paths.total_norm
    assert all(math.isfinite(norm) for norm in paths.norms)
