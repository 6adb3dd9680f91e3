"""Streams of literal sites: their growth, ranking, effective depth and path lengths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from traces import make_residual, make_trace

from gradflow.stream_profile import growth_laws, path_lengths, rank_blocks, stream_profiles, streams
from gradflow.trace_model import PathOrders, ResidualRecord


def chain(variances: Sequence[float], **changes: Any) -> tuple[ResidualRecord, ...]:
    """A stream whose first entry has the first variance."""
    return tuple(
        make_residual(
            f"blocks.{k}",
            k,
            source_variance=before,
            variance=after,
            previous=k - 1 if k else None,
            **changes,
        )
        for k, (before, after) in enumerate(itertools.pairwise(variances))
    )


@pytest.mark.parametrize("count", [5, 12, 40])
@pytest.mark.parametrize(
    ("law", "start", "rate"),
    [
        ("constant", 3.0, 0.0),
        ("linear", 1.0, 1.0),
        ("linear", 0.0004, 0.1),
        ("linear", 10.0, -0.1),
        ("exponential", 1.0, 2.0),
        ("exponential", 5.0, 0.7),
    ],
)
def test_a_stream_that_follows_a_law_is_given_it(law: str, start: float, rate: float, count: int) -> None:
    value = {
        "constant": lambda k: start,
        "linear": lambda k: start + rate * k,
        "exponential": lambda k: start * rate**k,
    }[law]
    (growth,) = growth_laws(chain([value(k) for k in range(count)]))
    assert (growth.law, growth.sums, growth.first, growth.last) == (law, count, 0, count - 2)
    assert growth.start == pytest.approx(start, rel=1e-3)
    assert growth.rate == pytest.approx(rate, rel=1e-3)
    assert growth.deviation < 1e-3
    assert growth.r_squared is None if law == "constant" else growth.r_squared > 0.999


def test_scatter_that_batches_make_is_no_growth() -> None:
    (growth,) = growth_laws(chain([1.0 + 0.01 * (-1) ** k for k in range(12)]))
    assert growth.law == "constant" and growth.deviation == pytest.approx(0.01, rel=0.01)


def test_scatter_without_a_trend_is_no_law_however_large() -> None:
    """A post-norm stream: every sum is about 2, and a slope through its scatter explains a third of it."""
    (growth,) = growth_laws(chain([2.0 * math.exp(-0.009 * k + 0.09 * (-1) ** k) for k in range(24)]))
    assert growth.law == "constant"
    assert growth.rate == 0.0


def test_what_enters_counts_only_where_blocks_read_the_sums_as_they_are() -> None:
    normed = [make_residual("b", k, source_variance=1.0, variance=2.0) for k in range(6)]
    (growth,) = growth_laws(normed)
    assert (growth.law, growth.sums, growth.start) == ("constant", 6, pytest.approx(2.0))


def test_a_projection_and_a_change_of_shape_begin_a_stretch() -> None:
    first = chain([1.0, 2.0, 3.0, 4.0, 5.0], shape=(8, 16))
    second = [
        make_residual(
            f"b.{k}",
            4 + k,
            kind="projection" if not k else "identity",
            variance=2.0**k,
            source_variance=9.0,
            shape=(8, 16),
            previous=3 + k,
        )
        for k in range(4)
    ]
    third = [
        make_residual(f"c.{k}", 8 + k, variance=1.0, source_variance=1.0, shape=(8, 4), previous=7 + k)
        for k in range(4)
    ]
    laws = growth_laws([*first, *second, *third])
    assert [(law.law, law.first, law.sums) for law in laws] == [
        ("linear", 0, 5),
        ("exponential", 4, 4),  # what enters a projection is of the stretch before
        ("constant", 8, 5),
    ]


@pytest.mark.parametrize("variances", [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, math.inf, 5.0, 6.0]])
def test_too_few_sums_or_one_that_is_not_finite_have_no_law(variances: list[float]) -> None:
    assert growth_laws(chain(variances)) == ()


@pytest.mark.parametrize("shares", [[0.5], [0.1, 0.9], [0.3, 0.2, 0.5, 0.01], [0.0, 1.0, 0.25]])
def test_path_lengths_are_those_of_every_path(shares: list[float]) -> None:
    expected = [0.0] * (len(shares) + 1)
    for path in itertools.product((0, 1), repeat=len(shares)):
        expected[sum(path)] += math.prod(s if taken else 1 - s for s, taken in zip(shares, path, strict=True))
    measured = path_lengths(shares)
    assert list(measured) == pytest.approx(expected[: len(measured)])
    assert sum(expected[len(measured) :]) == 0.0
    assert sum(k * share for k, share in enumerate(measured)) == pytest.approx(sum(shares))


def test_path_lengths_of_a_thousand_blocks_are_a_bell_about_the_effective_depth() -> None:
    lengths = path_lengths([0.05] * 1_000)
    mean = sum(k * share for k, share in enumerate(lengths))
    spread = sum((k - mean) ** 2 * share for k, share in enumerate(lengths))
    assert sum(lengths) == pytest.approx(1.0) and len(lengths) < 150
    assert (mean, spread) == (pytest.approx(50.0), pytest.approx(1_000 * 0.05 * 0.95))
    assert path_lengths([0.5, math.nan]) == () == path_lengths([])


def test_streams_follow_the_site_before() -> None:
    encoder = [make_residual("enc", k, previous=k - 1 if k else None) for k in range(2)]
    decoder = [make_residual("dec", k, previous=k - 1 if k > 2 else None) for k in range(2, 6)]
    inside = make_residual("dec", 6, parent=4)
    fork = make_residual("aux", 7, previous=3)
    others = [make_residual("cell", 8, kind="gated", previous=5), make_residual("wide", 9, broadcast=True)]
    found = streams([*others, fork, inside, *decoder, *encoder])
    assert [[site.order for site in stream] for stream in found] == [[2, 3, 4, 5], [0, 1], [6], [7]]


def test_blocks_are_ranked_from_the_least_useful() -> None:
    sites = [
        make_residual("a", 0, block_influence=0.3, rho=0.1, angular_distance=0.2, path_share=0.5),
        make_residual("b", 1, block_influence=0.1, rho=0.2, angular_distance=None, path_share=None),
        make_residual("c", 2, block_influence=None, rho=0.0, angular_distance=0.1, path_share=0.1),
        make_residual("d", 3, block_influence=0.2, rho=math.nan, angular_distance=0.3, path_share=0.2),
    ]
    assert [
        (r.name, r.influence_rank, r.rho_rank, r.angular_rank, r.path_rank) for r in rank_blocks(sites)
    ] == [("b", 1, 3, None, None), ("d", 2, None, 3, 2), ("a", 3, 2, 2, 3)]


def test_the_profile_of_a_stream() -> None:
    shares = [0.5, None, 0.25, 0.25]
    sites = [
        make_residual(
            f"b.{k}", k, previous=k - 1 if k else None, path_share=share, gradient_cosine=-0.1 * (k % 3)
        )
        for k, share in enumerate(shares)
    ]
    exact = PathOrders(
        sites=(0, 1, 2, 3), total_norm=1.0, norms=(1.0,), inner_products=(1.0,), remainder_norm=0.0
    )
    (profile,) = stream_profiles(replace(make_trace(residuals=sites), paths=(exact,)))
    assert (profile.measured, profile.effective_depth) == (3, 1.0)
    assert profile.depth_share == pytest.approx(1 / 3)
    assert profile.normalised_depth == pytest.approx(1 / 2 + 1 / 3 + 1 / 4)
    assert profile.unnormalised_depth == 1.5
    assert profile.largest_cosine == pytest.approx(0.2)
    assert profile.exact is exact
    assert stream_profiles(make_trace()) == ()


def test_a_stream_whose_gradient_was_not_split_has_no_depth() -> None:
    (profile,) = stream_profiles(make_trace(residuals=[make_residual("b", 0, path_share=None)]))
    assert (profile.measured, profile.effective_depth, profile.depth_share) == (0, None, None)
    assert profile.path_lengths == () and profile.largest_cosine is None
