"""Which token is which: the statistic against its definition, and the models that lose it or keep it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from traces import make_trace, make_trunk

import gradflow
from gradflow.analyzer import analyze
from gradflow.config import Config
from gradflow.recording.token_geometry import TokenGeometry, similarity

WIDTH, HEADS, TOKENS = 32, 4, 16


def slow_similarity(here: Tensor, there: Tensor) -> float:
    """From the full kernels: Song et al. 2007, equation 4, element by element."""
    kernels = []
    for values in (here.double(), there.double()):
        rows = (values - values.mean(0)).flatten(0, 1)
        kernels.append((rows @ rows.T).fill_diagonal_(0))

    def hsic(k: Tensor, m: Tensor) -> float:
        n = len(k)
        one = torch.ones(n, dtype=torch.float64)
        trace = (k @ m).trace()
        return float(
            trace
            + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (one @ k @ m @ one)
        )

    k, m = kernels
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_similarity_is_its_definition(share: float, scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 20, 6).double()
    y = share * x @ torch.randn(6, 9).double() + torch.randn(8, 20, 9).double()
    assert similarity(scale * x, y) == pytest.approx(slow_similarity(x, y), rel=1e-9, abs=1e-12)


def test_similarity_knows_rotations_and_strangers() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 32, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    assert similarity(x, 3 * x @ rotation + 1) == pytest.approx(1.0, abs=1e-6)
    strangers = [similarity(x, torch.randn(16, 32, 8)) for _ in range(20)]
    assert sum(strangers) / 20 == pytest.approx(0.0, abs=2e-3)
    assert max(map(abs, strangers)) < 0.02


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_a_constant_has_no_geometry(value: float) -> None:
    assert similarity(torch.randn(8, 20, 6), torch.full((8, 20, 6), value)) is None


def test_where_a_token_stands_does_not_count() -> None:
    torch.manual_seed(0)
    x, places = torch.randn(8, 20, 6), 10 * torch.randn(20, 6)
    assert similarity(x + places, x) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 100, 8), (40, 7, 8), (8, 15, 8), (8, 20, 0), (160, 8)])
def test_too_few_tokens_are_not_measured(shape: tuple[int, ...]) -> None:
    geometry = TokenGeometry(batch_size=shape[0])
    geometry.add(0, torch.randn(shape))
    geometry.add(1, torch.randn(shape))
    assert geometry.kept(1) is None


@pytest.mark.parametrize("sequence_first", [False, True])
def test_a_sample_of_a_large_tensor_says_about_the_same(sequence_first: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 128, 96)
    y = x @ torch.randn(96, 96) / 96**0.5 + torch.randn(64, 128, 96)
    geometry = TokenGeometry(batch_size=64)
    for probe, values in enumerate((x, y)):
        geometry.add(probe, values.transpose(0, 1) if sequence_first else values)
    kept = geometry.kept(1)
    assert kept is not None
    # 1023 of 8192 tokens, 32 of 96 features: of a dense mixture that shares shows less, but nothing like zero.
    assert 0.05 < kept < slow_similarity(x[::8, ::8], y[::8, ::8])
    geometry.add(2, (x if not sequence_first else x.transpose(0, 1)) * 2)
    assert geometry.kept(2) == pytest.approx(1.0, abs=1e-6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.project = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        parts = [
            part(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        ]
        return self.project(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))


class Language(nn.Module):
    """A causal language model with skips, or without; ``pooled`` has one answer for the whole text."""

    def __init__(self, *, skips: bool, pooled: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.attentions = nn.ModuleList(Attention() for _ in range(6))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
            )
            for _ in range(6)
        )
        self.head = nn.Linear(WIDTH, 64)
        self.skips, self.pooled = skips, pooled

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x) if self.skips else attention(x)
            x = x + mlp(x) if self.skips else mlp(x)
        return self.head(x.mean(1) if self.pooled else x)


def report_of(*, trained: bool = False, steps: int = 1, **kinds: bool) -> gradflow.Report:
    torch.manual_seed(0)
    model, tokens = Language(**kinds), torch.randint(0, 64, (32, TOKENS))
    return gradflow.inspect(model, (tokens,), lambda y, _: y.square().mean(), trained=trained, steps=steps)


def mixed(report: gradflow.Report) -> list[gradflow.Finding]:
    return [f for f in report.findings if f.rule == "GF304" and "Which token" in f.message]


def test_attention_without_skips_loses_which_token_is_which() -> None:
    report = report_of(skips=False)
    (finding,) = mixed(report)
    assert finding.severity is gradflow.Severity.ERROR
    assert finding.value is not None
    assert finding.value == report.trace.trunk.token_geometry < 0.01
    assert "skips" in (finding.hint or "")


def test_skips_keep_it() -> None:
    report = report_of(skips=True)
    assert not mixed(report)
    assert (report.trace.trunk.token_geometry or 0) > 0.3


def test_one_answer_for_the_text_needs_no_tokens() -> None:
    assert not mixed(report_of(skips=False, pooled=True))


def test_after_training_it_is_info() -> None:
    (finding,) = mixed(report_of(skips=False, trained=True))
    assert finding.severity is gradflow.Severity.INFO


def test_several_steps_have_the_median() -> None:
    several = report_of(skips=True, steps=3).trace.trunk.token_geometry
    assert several is not None
    assert 0.3 < several < 1


@pytest.mark.parametrize(("kept", "said"), [(0.0099, True), (0.01, False), (None, False), (-0.003, True)])
def test_the_limit(kept: float | None, said: bool) -> None:
    trace = report_of(skips=False).trace
    trace = replace(trace, trunk=replace(trace.trunk, token_geometry=kept))
    assert bool(mixed(analyze(trace, Config()))) is said


def test_two_token_streams_are_not_compared() -> None:
    trace = report_of(skips=False).trace
    assert not mixed(analyze(replace(trace, side_trunks=(make_trace().trunk,)), Config()))


def test_a_squeezed_sequence_is_not_judged() -> None:
    trace = report_of(skips=False).trace
    first, *rest = trace.trunk.points
    squeezed = replace(rest[2], shape=(32, WIDTH))
    points = (first, *rest[:2], squeezed, *rest[3:])
    assert not mixed(analyze(replace(trace, trunk=replace(trace.trunk, points=points)), Config()))


def test_a_gradient_that_is_lost_too_does_not_explain_it() -> None:
    """GF101 explains a collapse; which token is which is lost whatever becomes of the gradient."""
    trace = report_of(skips=False).trace
    vanishing = make_trunk([1e-9] * 2 + [1.0] * (len(trace.trunk.points) - 2)).points
    points = [
        replace(point, gradient_norm=lost.gradient_norm)
        for point, lost in zip(trace.trunk.points, vanishing, strict=True)
    ]
    report = analyze(replace(trace, trunk=replace(trace.trunk, points=tuple(points))), Config())
    assert any(f.rule == "GF101" and f.severity is not gradflow.Severity.INFO for f in report.findings)
    (finding,) = mixed(report)
    assert (finding.severity, finding.consequence_of) == (gradflow.Severity.ERROR, None)
