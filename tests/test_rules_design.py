"""GF205 and GF206 on literal traces: one row on each side of every limit, and every exemption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import find
from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gf205_norm_placement import check as check_placement
from gradflow.rules.gf206_diminishing_depth import check as check_depth
from gradflow.trace_model import ResidualRecord
from tests.traces import make_residual, make_trace, make_trunk

PLACEMENTS = ("before", "after", "end", "both", "inside", "none")


def stream(placements: Sequence[str], **changes: Any) -> list[ResidualRecord]:
    """One site a block, ``blocks.0``, ``blocks.1`` ..., each going on from the last."""
    return [
        make_residual(
            f"blocks.{k}",
            k,
            **({"norm_placement": placement, "previous": k - 1 if k else None, "std": 1.0} | changes),
        )
        for k, placement in enumerate(placements)
    ]


def placed(sites: Sequence[ResidualRecord], **trace: Any) -> list[Finding]:
    return list(check_placement(make_trace(residuals=sites, **trace), Config()))


def at(findings: Sequence[Finding]) -> list[tuple[str, Severity, str]]:
    return [(str(dict(f.evidence)["kind"]), f.severity, str(f.location)) for f in findings]


@pytest.mark.parametrize(("adds", "said"), [(11, False), (12, True), (24, True)])
def test_a_long_post_norm_stream(adds: int, said: bool) -> None:
    expected = [("post-norm", Severity.INFO, f"blocks.0–blocks.{adds - 1}")] if said else []
    assert at(placed(stream(["after"] * adds))) == expected


def test_what_an_add_keeps_is_said_where_it_was_measured() -> None:
    trunk = make_trunk([0.9**k for k in range(12, 0, -1)], kind="residual")
    (finding,) = placed(stream(["after"] * 12), trunk=trunk)
    assert "an add keeps 0.9 of the gradient here" in finding.message
    (finding,) = placed(stream(["after"] * 12), trunk=make_trunk([1.0, 1.0], kind="weights"))
    assert "keeps" not in finding.message


@pytest.mark.parametrize("placement", ["before", "end", "both", "inside", ""])
def test_the_other_placements_are_no_news(placement: str) -> None:
    assert placed(stream([placement] * 24)) == []


def test_a_stream_that_is_mostly_another() -> None:
    assert at(placed(stream(["after"] * 12 + ["before"] * 5))) == []
    assert at(placed(stream(["after"] * 15 + ["before"] * 5)))[0][0] == "post-norm"


@pytest.mark.parametrize(
    ("adds", "rho", "said"), [(7, 1.0, False), (8, 1.0, True), (8, 0.38, False), (8, 0.39, True)]
)
def test_a_stream_without_norms(adds: int, rho: float, said: bool) -> None:
    expected = [("without norm", Severity.INFO, f"blocks.0–blocks.{adds - 1}")] if said else []
    assert at(placed(stream(["none"] * adds, rho=rho))) == expected


@pytest.mark.parametrize("rho", [None, 0.0, math.nan, math.inf])
def test_a_stream_without_norms_whose_growth_is_not_known(rho: float | None) -> None:
    assert placed(stream(["none"] * 12, rho=rho)) == []


def test_factors_hold_a_stream_without_norms() -> None:
    assert placed(stream(["none"] * 12, branch_factors=("scalar",))) == []


@pytest.mark.parametrize(
    ("placements", "places"),
    [
        (["before"] * 3 + ["after"], ["blocks.3"]),  # 1 of 4
        (["before"] * 2 + ["after"], []),  # three alike are too few to call one odd
        (["before", "before", "after", "before", "after", "before", "before", "before"], ["blocks.2–blocks.4"]),
        (["before"] * 5 + ["after"] * 2, []),  # 2 of 7: above a quarter
        (["none"] + ["end"] * 8, ["blocks.0"]),
        (["before"] * 12, []),
        ([""] * 2 + ["before"] * 8, []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("trained", [False, True])
def test_one_block_that_normalises_elsewhere(placements: list[str], places: list[str], trained: bool) -> None:
    found = placed(stream(placements), trained=trained)
    assert at(found) == [("odd one out", Severity.INFO, where) for where in places]


def test_only_like_adds_are_compared() -> None:
    sites = stream(["before"] * 7 + ["after"])
    sites[-1] = make_residual("head", 7, norm_placement="after", like="Head #0 identity: linear")
    assert placed(sites) == []
    two = [
        make_residual(
            f"blocks.{k // 2}", k, index=k % 2, norm_placement="after" if k == 9 else "before",
            like=f"Block #{k % 2} identity: {'layer_norm ' * (k != 9)}linear",
        )
        for k in range(16)
    ]  # fmt: skip
    (finding,) = placed(two)
    assert str(finding.location) == "blocks.4"
    assert "blocks.4 (add 1) on the sum: 7 of 8 like adds normalise before the branch" in finding.message


@pytest.mark.parametrize("placements", [["after"] * 24, ["none"] * 24])
def test_trained_streams_have_their_start_behind_them(placements: list[str]) -> None:
    assert placed(stream(placements, rho=1.0), trained=True) == []


def test_growth_that_is_measured_explains_a_stream_without_norms() -> None:
    sites = [
        make_residual(
            f"blocks.{k}", k, rho=1.0, std=2 ** ((k + 1) / 2), source_std=2 ** (k / 2), norm_placement="none"
        )
        for k in range(12)
    ]
    found = find(make_trace(residuals=sites), Config())
    assert [(f.rule, f.severity, f.consequence_of) for f in found] == [
        ("GF202", Severity.WARNING, None),
        ("GF205", Severity.INFO, "GF202 blocks.6–blocks.11"),
    ]


# GF206


def deep(shares: Sequence[float | None], *, trained: bool = True, **changes: Any) -> list[Finding]:
    sites = [
        make_residual(f"blocks.{k}", k, **({"path_share": s, "previous": k - 1 if k else None} | changes))
        for k, s in enumerate(shares)
    ]
    return list(check_depth(make_trace(residuals=sites, trained=trained), Config()))


BASELINE = sum(1 / k for k in range(2, 14))
"""H_13 - 1: of twelve branches."""


@pytest.mark.parametrize(("factor", "said"), [(0.49, True), (0.51, False), (1.0, False), (3.0, False)])
def test_the_effective_depth_beside_that_of_normed_branches(factor: float, said: bool) -> None:
    found = deep([factor * BASELINE / 12] * 12)
    assert [(f.severity, str(f.location)) for f in found] == [(Severity.INFO, "blocks.0–blocks.11")] * said
    if said:
        assert found[0].value == pytest.approx(factor)
        assert dict(found[0].evidence)["effective_depth"] == pytest.approx(factor * BASELINE)


@pytest.mark.parametrize(("sites", "said"), [(7, False), (8, True)])
def test_a_short_stream_has_no_depth_to_lose(sites: int, said: bool) -> None:
    assert bool(deep([0.001] * sites)) is said


def test_sites_whose_gradient_was_not_split_do_not_count() -> None:
    assert deep([None] * 12) == []
    assert deep([0.001] * 7 + [None] * 5) == []
    (finding,) = deep([0.001] * 8 + [None] * 4)
    assert "of 8 branches" in finding.message


def test_the_weakest_are_named() -> None:
    (finding,) = deep([0.01, 0.02, 0.0001, 0.03, 0.02, 0.02, 0.02, 0.02])
    assert "weakest: blocks.2 0.0001, blocks.0 0.01" in finding.message


def test_initialisation_and_streams_inside_a_branch_are_left_alone() -> None:
    assert deep([0.001] * 12, trained=False) == []
    assert deep([0.001] * 12, parent=99) == []


def test_small_branches_explain_short_paths() -> None:
    sites = [
        make_residual(
            f"blocks.{k}",
            k,
            rho=1e-3,
            path_share=1e-6,
            previous=k - 1 if k else None,
            norm_placement="before",
        )
        for k in range(12)
    ]
    found = find(make_trace(residuals=sites, trained=True), Config())
    assert [(f.rule, f.consequence_of) for f in found] == [
        ("GF201", None),
        ("GF206", "GF201 blocks.0–blocks.11"),
    ]


class Block(nn.Module):
    def __init__(self, *, post: bool) -> None:
        super().__init__()
        self.norm, self.post = nn.LayerNorm(32), post
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.body(x)) if self.post else x + self.body(self.norm(x))


def net(post: Sequence[bool]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), *(Block(post=p) for p in post), nn.LayerNorm(32), nn.Linear(32, 4))


@pytest.mark.parametrize(
    ("post", "places"),
    [([True] * 12, ["1–12"]), ([False] * 12, []), ([False] * 5 + [True] + [False] * 6, ["6"])],
)
def test_real_models(post: list[bool], places: list[str]) -> None:
    report = gradflow.inspect(net(post), torch.randn(16, 8))
    assert [str(f.location) for f in report.findings if f.rule == "GF205"] == places
