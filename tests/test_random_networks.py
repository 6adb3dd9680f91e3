"""Random networks: every residual site found, none invented, every number that of float64 autograd."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import gradflow
from tests.random_networks import Network, Seen, Spec, Witness, specs
from tests.witness import close, missing, norm

NETWORKS = 200
TOLERANCE = 1e-9


def loss(outputs: Tensor, _inputs: Any) -> Tensor:
    return (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum()


def influence(skip: Tensor, total: Tensor) -> float | None:
    """1 - mean cos(x, x + F) over tokens of a 3-D stream, else over samples, where x is not zero."""
    x, y = (t.detach().flatten(0, 1) if t.dim() == 3 else t.detach().flatten(1) for t in (skip, total))
    kept = x.norm(dim=1) > 0
    return (1 - torch.cosine_similarity(x[kept], y[kept], dim=1)).mean().item() if kept.any() else None


def numbers(site: Seen) -> dict[str, float | None]:
    """Every number of a site by its definition."""
    skip, branch = norm(site.skip), norm(site.branch)
    inner = (site.skip.detach() * site.branch.detach()).sum().item()
    gradient = None if site.total.grad is None else norm(site.total.grad)
    source = None if site.source.grad is None else norm(site.source.grad)
    return {
        "skip_norm": skip,
        "branch_norm": branch,
        "rho": branch / skip if skip else (math.inf if branch else None),
        "cosine": inner / (skip * branch) if skip and branch else None,
        "block_influence": influence(site.skip, site.total),
        "gradient_norm": gradient,
        "source_gradient_norm": source,
        "gradient_ratio": source / gradient if source is not None and gradient else None,
        "std": site.total.detach().std(correction=0).item(),
        "branch_scale": site.branch_scale,
        "skip_scale": site.skip_scale,
    }


def check_site(row: Any, site: Seen, order: int) -> None:
    for column in ("name", "index", "call", "kind", "branches", "in_place"):
        assert getattr(row, column) == getattr(site, column), (order, column, getattr(row, column), site)
    assert row.order == order
    assert (None if pd.isna(row.parent) else row.parent) == site.parent, (order, row.parent, site.parent)
    for column, expected in numbers(site).items():
        measured = getattr(row, column)
        if expected is None:
            assert missing(measured), (order, column, measured)
        elif column == "block_influence":
            # 1 - cos loses half the digits where the branch is nearly nothing.
            assert abs(measured - expected) < 1e-12 + TOLERANCE * abs(expected), (order, measured, expected)
        else:
            assert close(measured, expected, TOLERANCE), (order, column, measured, expected)


def check(spec: Spec) -> None:
    network = Network(spec)
    inputs = network.inputs()
    sites = gradflow.inspect(network, inputs, loss).residuals
    witness = Witness()
    torch.manual_seed(0)
    loss(network.explicit(inputs, witness), inputs).backward()
    listing = sites[["name", "index", "call", "kind", "branches", "source", "branch_ops"]].to_string()
    assert len(sites) == len(witness.sites), f"{len(witness.sites)} sites, found\n{listing}"
    for order, (row, site) in enumerate(zip(sites.itertuples(), witness.sites, strict=True)):
        check_site(row, site, order)


@settings(max_examples=NETWORKS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(specs())
def test_every_site_of_a_random_network_is_found_and_measured(spec: Spec) -> None:
    check(spec)
