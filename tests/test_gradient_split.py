"""What skip and branch bring back to the source: equal to explicit autograd through either side alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_residual_numbers import WRITTEN, Branch, Plain, Sites, Two, square, stream, total
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.recording.gradient_split import (
    NO_GRADIENT_ASKED,
    NO_SUM,
    NOT_REACHED,
    READ_ELSEWHERE,
    pair_products,
)
from tests import transformers_zoo
from tests.witness import close, missing, norm

Write = Callable[[Two, Tensor], Tensor]
SPLIT = ("skip_gradient_norm", "branch_gradient_norm", "gradient_cosine", "branch_gain", "path_share")


def cubes(outputs: Tensor, _inputs: Any) -> Tensor:
    """A loss that a normalisation at the end does not make constant."""
    return outputs.pow(3).sum()


def into_a_view(m: Two, x: Tensor) -> Tensor:
    x = x.view(2, 2, 6) * 1.0
    out = m.f(x)  # a linear layer over tokens returns a view of a matrix
    out += x
    return out


def stream_is_a_view(m: Two, x: Tensor) -> Tensor:
    x = m.stem(x.view(2, 2, 6))
    x += m.f(x * 1.0)  # a copy: what autograd saves must not be written over
    x += torch.tanh(m.f(x * 1.0))
    return x


def stream_is_a_view_plainly(m: Two, x: Tensor, sites: Sites) -> Tensor:
    x = m.stem(x.view(2, 2, 6))
    x = total(x, x, m.f(x), sites)
    return total(x, x, torch.tanh(m.f(x)), sites)


def projected(m: Two, x: Tensor) -> Tensor:
    return F.linear(x, m.stem.weight) + m.f(x)


def source_read_elsewhere(m: Two, x: Tensor) -> Tensor:
    return x + m.f(x) + 3.0 * torch.sin(x)


def read_elsewhere_plainly(m: Two, x: Tensor, sites: Sites) -> Tensor:
    return total(x, x, m.f(x), sites) + 3.0 * torch.sin(x)


def several_readers(m: Two, x: Tensor) -> Tensor:
    return x + m.two(torch.sigmoid(m.one(x)) * m.one(torch.relu(x)) * x.sum(-1, keepdim=True))


def three_branches(m: Two, x: Tensor) -> Tensor:
    return ((m.f(x) + x) + m.norm(x)) + m.two(m.one(x).relu())


def moved_skip(m: Two, x: Tensor) -> Tensor:
    y = x.view(2, 2, 6)
    branch = m.f(y.transpose(0, 1) * 1.0)
    return y.transpose(0, 1).contiguous() + branch


def moved_plainly(m: Two, x: Tensor, sites: Sites) -> Tensor:
    y = x.view(2, 2, 6) * 1.0
    return total(y, y.transpose(0, 1), m.f(y.transpose(0, 1)), sites)


def detached_branch(m: Two, x: Tensor) -> Tensor:
    return x + m.f(x.detach())


def chunked(m: Two, x: Tensor) -> Tensor:
    a, b = m.one(x).chunk(2, -1)
    return x + F.linear(a * torch.tanh(b), m.one.weight[:4].t())


MORE: dict[str, tuple[Write, Plain]] = {
    "into a view": (
        into_a_view,
        lambda m, x, s: (lambda y: total(y, y, m.f(y), s))(x.view(2, 2, 6) * 1.0),
    ),
    "stream is a view": (stream_is_a_view, stream_is_a_view_plainly),
    "projection": (
        projected,
        lambda m, x, s: total(x, x @ m.stem.weight.t(), m.f(x), s),
    ),
    "source read elsewhere": (source_read_elsewhere, read_elsewhere_plainly),
    "several readers": (
        several_readers,
        lambda m, x, s: total(x, x, several_readers(m, x) - x, s),
    ),
    "three branches": (
        three_branches,
        lambda m, x, s: total(x, x, m.f(x) + m.norm(x) + m.two(m.one(x).relu()), s),
    ),
    "moved skip": (moved_skip, moved_plainly),
    "chunked": (chunked, lambda m, x, s: total(x, x, chunked(m, x) - x, s)),
}


def expected_split(source: Tensor, skip: Tensor, branch: Tensor, out: Tensor) -> dict[str, float]:
    """Pull the gradient at the sum back through either side alone."""
    options = {"grad_outputs": out.grad, "retain_graph": True}
    through_skip = out.grad if skip is source else torch.autograd.grad(skip, source, **options)[0]
    (through_branch,) = torch.autograd.grad(branch, source, **options)
    a, b = norm(through_skip), norm(through_branch)
    return {
        "skip_gradient_norm": a,
        "branch_gradient_norm": b,
        "gradient_cosine": (through_skip * through_branch).sum().item() / (a * b),
        "branch_gain": b / norm(out.grad),
        "path_share": b * b / (a * a + b * b),
    }


@pytest.mark.parametrize("name", [*WRITTEN, *MORE])
def test_the_split_is_that_of_explicit_autograd(name: str) -> None:
    write, plain = {**WRITTEN, **MORE}[name]
    torch.manual_seed(3)
    model, inputs = Two(write), torch.randn(4, 6, dtype=torch.float64)
    measured = gradflow.inspect(model, (inputs,), square).residuals
    seen: Sites = []
    square(plain(model, model.stem(inputs), seen), None).backward(retain_graph=True)
    assert len(measured) == len(seen) > 0
    for row, operands in zip(measured.itertuples(), seen, strict=True):
        assert row.split_note == ""
        for column, value in expected_split(*operands).items():
            assert close(getattr(row, column), value, 1e-12), (column, getattr(row, column), value)


def test_a_bare_skip_brings_back_the_gradient_at_the_sum() -> None:
    sites = stream(3, (1.0, 1.0), before="norm", width=32)
    assert (sites.skip_gradient_norm / sites.gradient_norm - 1).abs().max() < 1e-6
    assert (sites.path_share - sites.branch_gain**2 / (1 + sites.branch_gain**2)).abs().max() < 1e-6
    # The source's gradient is the sum of both: the cosine rule closes the triangle.
    a, b = sites.skip_gradient_norm, sites.branch_gradient_norm
    whole = (a**2 + b**2 + 2 * a * b * sites.gradient_cosine) ** 0.5
    assert (whole / sites.source_gradient_norm - 1).abs().max() < 1e-5


class Leaky(Two):
    """Something besides the sum reads the inside of the branch."""

    def __init__(self, how: str) -> None:
        super().__init__(lambda m, x: x)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.one(x)
        if self.how == "inside":
            return (x + self.two(torch.tanh(inner))) * inner.square().sum()
        if self.how == "branch":
            branch = self.two(torch.tanh(inner))
            return (x + branch) * branch.square().sum()
        left, right = torch.split(x, 3, dim=-1)  # two outputs of one op, of which the branch takes one
        return x + F.linear(left, self.one.weight[:6, :3]) + right.sum() * 0.0 + self._unread(left, right)

    def _unread(self, left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum()


@pytest.mark.parametrize("how", ["inside", "branch", "sibling"])
def test_no_split_where_something_else_reads_the_inside_of_the_branch(how: str) -> None:
    torch.manual_seed(0)
    (site,) = gradflow.inspect(
        Leaky(how), (torch.randn(4, 6, dtype=torch.float64),), square
    ).residuals.itertuples()
    assert site.split_note == READ_ELSEWHERE
    assert all(missing(getattr(site, column)) for column in SPLIT)


def test_no_split_where_the_model_takes_a_gradient_through_the_block() -> None:
    """A gradient penalty comes back inside of the branch, which no op is seen to read there."""

    class Penalised(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = x + self.f(x)
            (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return y * slope.square().sum()

    model, inputs = Penalised(lambda m, x: x), torch.randn(4, 6, dtype=torch.float64)
    (site,) = gradflow.inspect(model, (inputs,), square).residuals.itertuples()
    assert site.split_note == READ_ELSEWHERE


def test_what_is_read_on_no_way_to_the_loss_does_not_count() -> None:
    kept = []

    def write(m: Two, x: Tensor) -> Tensor:
        inner = m.one(x)
        kept.append(inner * 2.0)  # a cache
        return x + m.two(torch.tanh(inner))

    (site,) = gradflow.inspect(
        Two(write), (torch.randn(4, 6, dtype=torch.float64),), square
    ).residuals.itertuples()
    assert site.split_note == "" and site.branch_gradient_norm > 0


def test_why_there_is_no_split_is_said() -> None:
    inputs = torch.randn(4, 6, dtype=torch.float64)

    def note(model: nn.Module) -> str:
        (site,) = gradflow.inspect(model, (inputs,), square).residuals.itertuples()
        assert all(missing(getattr(site, column)) for column in SPLIT)
        return str(site.split_note)

    first = Two(lambda m, x: x)
    first.forward = lambda x: x + first.f(x)  # type: ignore[method-assign]
    assert note(first) == NO_GRADIENT_ASKED
    frozen = Two(lambda m, x: x + m.f(x)).requires_grad_(False)
    assert note(frozen) == NO_GRADIENT_ASKED
    assert note(Two(lambda m, x: m.two((x + m.f(x)).detach() @ m.one.weight.t()))) == NOT_REACHED
    assert note(Two(lambda m, x: torch.cat((x, m.f(x)), 1))) == NO_SUM


def test_a_branch_without_a_way_back_brings_nothing() -> None:
    model = Two(lambda m, x: x + m.f(x) * 0.0)
    (site,) = gradflow.inspect(
        model, (torch.randn(4, 6, dtype=torch.float64),), square
    ).residuals.itertuples()
    assert (site.branch_gradient_norm, site.branch_gain, site.path_share) == (0.0, 0.0, 0.0)
    assert missing(site.gradient_cosine) and site.skip_gradient_norm > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_branch_is_split_alike(reentrant: bool) -> None:
    class Checkpointed(Two):
        def f(self, x: Tensor) -> Tensor:
            return checkpoint(super().f, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    numbers = []
    for kind in (Two, Checkpointed):
        torch.manual_seed(0)
        model = kind(lambda m, x: x + m.f(x))
        rows = gradflow.inspect(model, (torch.randn(4, 6, dtype=torch.float64),), square).residuals
        numbers.append([rows[column][0] for column in SPLIT])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-12)


# Rotary and learned positions, a cache that is returned, shared position biases, cross-attention, post-norm blocks that
# read the stream three times, projections, shifted windows, experts.
MODELS = ("gpt2", "llama", "t5", "bert", "whisper", "mixtral", "resnet", "swin", "albert", "gptj")


@pytest.mark.parametrize("name", MODELS)
def test_every_site_of_a_transformers_model_is_split(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = getattr(transformers_zoo, name)()
    sites = gradflow.inspect(model, inputs).residuals
    assert set(sites.split_note) == {""}
    bare = sites[(sites.kind == "identity") & (sites.shortcut_ops == "")]
    assert (bare.skip_gradient_norm / bare.gradient_norm - 1).abs().max() < 1e-5
    # One stream an encoder or decoder, each block after the one before it.
    assert sites.previous.isna().sum() == (2 if name in ("t5", "whisper") else 1)


@pytest.mark.parametrize("options", [{"norm_first": True}, {"norm_first": False}])
def test_a_stock_transformer_in_half(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
    inputs = torch.randn(2, 5, 16).bfloat16()
    half = gradflow.inspect(model.bfloat16(), (inputs,), cubes).residuals
    exact = gradflow.inspect(model.double(), (inputs.double(),), cubes).residuals
    assert set(exact.split_note) == {""} == set(half.split_note) and len(exact) == 6
    assert (half.branch_gain / exact.branch_gain - 1).abs().max() < 0.1


def test_channels_last_changes_nothing() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + torch.relu(self.conv(x))

    torch.manual_seed(0)
    model, inputs = Block(), torch.randn(2, 3, 5, 5)
    rows = [
        gradflow.inspect(model.to(memory_format=layout), inputs.contiguous(memory_format=layout)).residuals
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    for column in SPLIT:
        assert rows[0][column][0] == pytest.approx(rows[1][column][0], rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_products_of_very_small_and_very_large_gradients(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(70_000, generator=generator, dtype=torch.float64) for _ in range(2))
    measured = pair_products((a * scale).float(), (b * scale).float()).tolist()
    for got, (left, right) in zip(measured, ((a, a), (b, b), (a, b)), strict=True):
        wanted = (left * right).sum().item() * scale**2
        assert abs(got - wanted) < 1e-6 * (a.square().sum().item() * scale**2)


def test_products_pair_elements_and_not_memory() -> None:
    a, b = torch.randn(4, 6), torch.randn(6, 4).t()
    squares = pair_products(a, b).tolist()
    assert squares == pytest.approx([v.sum().item() for v in (a * a, b * b, a * b)], rel=1e-5)
    assert pair_products(a, None).tolist() == pytest.approx([a.square().sum().item(), 0.0, 0.0])
    assert pair_products(None, a.half()).tolist() == pytest.approx(
        [0.0, a.square().sum().item(), 0.0], rel=1e-2
    )


# Row 22: the angle of a branch at right angles to its skip is atan(rho) / pi.
@pytest.mark.parametrize("rho", [0.1, 1.0, 2.0])
def test_angular_distance_of_an_orthogonal_branch(rho: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Branch(2048, (math.sqrt(2.0), rho)))
    (site,) = gradflow.inspect(model, (torch.randn(64, 2048),), square).residuals.itertuples()
    assert site.angular_distance == pytest.approx(math.atan(rho) / math.pi, rel=0.05)


def test_the_angle_and_the_variances_are_those_of_their_definition() -> None:
    torch.manual_seed(1)
    model, inputs = Two(lambda m, x: x + m.f(x)), torch.randn(8, 6, dtype=torch.float64)
    (site,) = gradflow.inspect(model, (inputs,), square).residuals.itertuples()
    source = model.stem(inputs).detach()
    out = source + model.f(source).detach()
    angles = torch.cosine_similarity(source, out, dim=1).arccos() / math.pi
    assert site.angular_distance == pytest.approx(angles.mean().item(), rel=1e-9)
    assert site.source_variance == pytest.approx(source.var(correction=0).item(), rel=1e-12)
    assert site.variance == pytest.approx(out.var(correction=0).item(), rel=1e-12)


# Row 13 going back: D_eff of a stream of normalised branches is the same harmonic sum as of the forward shares.
@pytest.mark.parametrize("blocks", [8, 32])
def test_the_effective_depth_going_back_is_harmonic(blocks: int) -> None:
    sites = stream(blocks, (math.sqrt(2.0), 1.0), before="norm")
    assert sites.path_share.sum() == pytest.approx(sum(1 / k for k in range(2, blocks + 2)), rel=0.05)


def test_the_effective_depth_of_an_unnormalised_stream_is_half_its_length() -> None:
    sites = stream(16, (math.sqrt(2.0), math.sqrt(2.0)), before="relu")
    assert sites.path_share.sum() == pytest.approx(16 / 2, rel=0.05)
    assert sites.gradient_cosine.abs().max() < 0.1


# Rows 10 and 11 as laws of the whole stream: 1 + l behind a norm, 2^l without, and 2 where each sum is normalised.
@pytest.mark.parametrize(
    ("gains", "where", "law", "rate"),
    [
        ((math.sqrt(2.0), 1.0), {"before": "norm"}, "linear", 1.0),
        ((math.sqrt(2.0), math.sqrt(2.0)), {"before": "relu"}, "exponential", 2.0),
        ((math.sqrt(2.0), 1.0), {"after": "norm"}, "constant", 0.0),
    ],
)
def test_the_law_of_a_random_stream_is_that_of_theory(
    gains: tuple[float, float], where: dict[str, str], law: str, rate: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Branch(256, gains, **where) for _ in range(16)))
    report = gradflow.inspect(model, (torch.randn(128, 256).requires_grad_(),))
    assert report.stream is not None
    (growth,) = report.stream.growth
    assert growth.law == law and growth.deviation < 0.1
    assert growth.rate == pytest.approx(rate, rel=0.1)
    depth = {"linear": report.stream.normalised_depth, "exponential": report.stream.unnormalised_depth}
    if law in depth:
        assert report.stream.effective_depth == pytest.approx(depth[law], rel=0.1)
