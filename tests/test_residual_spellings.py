"""A residual connection is one however it is written, and what only looks like one is none."""

from __future__ import annotations

import pytest
import torch

import gradflow
from tests.residual_spellings import AFTER_A_BLOCK, DECOYS, SPELLINGS, WIDTH, Forward, Parts
from tests.witness import missing


def inspected(write: Forward) -> gradflow.Report:
    torch.manual_seed(0)
    return gradflow.inspect(Parts(write), torch.randn(4, WIDTH), lambda outputs, _: outputs.square().sum())


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_residual_connection_is_found(name: str) -> None:
    expected = SPELLINGS[name]
    sites = inspected(expected.write).residuals
    assert tuple(sites.kind) == expected.kinds, sites[["kind", "source", "branch_ops"]].to_string()
    assert set(sites.name) == {""}
    assert sites.source.str.match(r"(residual_spellings|container)\.py:\d+").all()
    last = sites.iloc[-1]
    for column, value in expected.of.items():
        expected_value = value if isinstance(value, str) else pytest.approx(value, rel=1e-6)
        assert last[column] == expected_value, column
    counted = sites[sites.kind.isin(("identity", "projection", "scaled", "opaque"))]
    assert (counted.gradient_norm > 0).all()
    assert (counted.source_gradient_norm > 0).all()


def test_an_opaque_site_has_only_the_numbers_that_were_measured() -> None:
    (seen,) = inspected(SPELLINGS["custom function"].write).residuals.itertuples()
    assert seen.rho > 0 and seen.gradient_norm > 0 and seen.source_gradient_norm > 0
    assert (
        missing(seen.skip_gradient_norm)
        and seen.split_note == "joined inside Joined, which is not looked into"
    )
    (unseen,) = inspected(SPELLINGS["custom function without torch"].write).residuals.itertuples()
    assert unseen.gradient_norm > 0 and unseen.source_gradient_norm > 0
    assert all(missing(getattr(unseen, c)) for c in ("rho", "cosine", "block_influence", "branch_norm"))


@pytest.mark.parametrize("name", DECOYS)
def test_what_only_looks_like_one_is_none(name: str) -> None:
    sites = inspected(DECOYS[name]).residuals
    assert sites.empty, sites[["kind", "source", "branch_ops"]].to_string()


@pytest.mark.parametrize("name", AFTER_A_BLOCK)
def test_what_follows_a_block_is_no_second_branch(name: str) -> None:
    sites = inspected(AFTER_A_BLOCK[name]).residuals
    assert list(sites.kind) == ["identity"]
    assert list(sites.branches) == [1]


def test_a_nested_site_names_the_one_around_it() -> None:
    sites = inspected(SPELLINGS["nested"].write).residuals
    assert sites.parent.tolist()[0] == 1
    assert sites.parent.isna().tolist() == [False, True]


def test_a_broadcast_stream_is_told_apart() -> None:
    """(N, 1) + (N, N): the stream itself grows, which is hardly ever meant."""
    sites = inspected(lambda m, x: x[:, :1] + m.f(x[:, :1].expand(-1, WIDTH))).residuals
    assert list(sites.broadcast) == [True]
    assert not inspected(SPELLINGS["x + f(x)"].write).residuals.broadcast.any()


def test_what_opens_a_gate_at_zero_is_named() -> None:
    (site,) = inspected(SPELLINGS["ReZero"].write).residuals.itertuples()
    assert site.opened_by == "zero"
    assert "f.0.weight" in site.branch_parameters.split(";")
