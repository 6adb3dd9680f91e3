"""The residual streams of a model, each as a handful of numbers (docs/residual.md).

A stream is a chain of sites: each one's source was made from the last one's sum. Pure functions of a trace.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gradflow.trace_model import PathOrders, ResidualRecord, Trace

STREAM_KINDS = ("identity", "projection", "scaled")
"""Kinds whose sum carries a stream on."""

FEWEST_SUMS = 4
"""A stretch of fewer sums than this has no law."""

NOISE = 0.01
"""Standard deviation of ln var that is no departure from a law: estimates from a batch scatter by as much."""

EXPLAINED = 0.5
"""A trend that explains less than this share of the scatter of ln var is none: the stream is constant, and scatters."""

SAME_STREAM = 0.1
"""What enters the next block has the variance of the last sum, up to this logarithm, where nothing stands between."""

NEGLIGIBLE = 1e-15
"""Shares of the energy below this are left out of the path profile."""

Sites = tuple[ResidualRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How the variance of a stream goes from sum to sum, between two resets."""

    first: int
    """``order`` of the first site of the stretch."""
    last: int
    sums: int
    """Variances fitted: that of each sum, led by what enters the first block where blocks read sums as they are."""
    law: str
    """"constant", "linear" or "exponential"."""
    start: float
    """The law's variance at the first of them."""
    rate: float
    """linear: the variance that a site adds; exponential: the factor of a site; constant: 0."""
    deviation: float
    """Root mean square of ln var about the law: 0.1 is 10%."""
    r_squared: float | None
    """Share of the scatter of ln var that the law explains; None for a constant, which explains none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRank:
    """One site among those of its stream; rank 1 is the least useful by that measure alone."""

    order: int
    name: str
    index: int
    block_influence: float
    influence_rank: int
    rho: float | None
    rho_rank: int | None
    angular_distance: float | None
    angular_rank: int | None
    path_share: float | None
    path_rank: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamProfile:
    """One stream."""

    sites: tuple[int, ...]
    """``order`` of each, first to last."""
    parent: int | None
    """``order`` of the site in whose branch the stream runs."""
    growth: tuple[Growth, ...]
    """A law for each stretch of at least four sums between resets: a projection, a change of shape, a new start."""
    ranking: tuple[BlockRank, ...]
    """Least useful first, by block influence."""
    measured: int
    """Sites whose gradient was split; what follows is over them."""
    effective_depth: float | None
    """D_eff: the sum of the branches' shares of the energy; the mean number of branches a path takes."""
    depth_share: float | None
    """D_eff / measured."""
    normalised_depth: float
    """H_{L+1} - 1, L being ``measured``: what branches of unit variance behind a norm give."""
    unnormalised_depth: float
    """L / 2: what branches as large as their skip give."""
    path_lengths: tuple[float, ...]
    """Share of the gradient's energy that comes through exactly 0, 1, 2 ... branches, as if parts of different
    paths were at right angles; ends where the rest is below 1e-15."""
    largest_cosine: float | None
    """The largest magnitude of ``gradient_cosine``: how far from right angles skip and branch are."""
    exact: PathOrders | None
    """The same from the passes themselves, where they were asked for."""


def stream_profiles(trace: Trace) -> tuple[StreamProfile, ...]:
    """Profile every stream, the longest first."""
    exact = {paths.sites: paths for paths in trace.paths}
    return tuple(_profile(sites, exact.get(_orders(sites))) for sites in streams(trace.residuals))


def streams(residuals: Iterable[ResidualRecord]) -> tuple[Sites, ...]:
    """Split sites into streams, the longest first; of equally long ones the earliest.

    Where a stream forks, each further site that goes on from the same sum begins a stream of its own.
    """
    ends: dict[int, list[ResidualRecord]] = {}
    found: list[list[ResidualRecord]] = []
    for site in sorted(residuals, key=lambda site: site.order):
        if site.kind not in STREAM_KINDS or site.broadcast:
            continue
        stream = None if site.previous is None else ends.pop(site.previous, None)
        if stream is None:
            stream = []
            found.append(stream)
        stream.append(site)
        ends[site.order] = stream
    return tuple(tuple(stream) for stream in sorted(found, key=len, reverse=True))


def _orders(sites: Sequence[ResidualRecord]) -> tuple[int, ...]:
    return tuple(site.order for site in sites)


def _profile(sites: Sites, exact: PathOrders | None) -> StreamProfile:
    shares = [site.path_share for site in sites if site.path_share is not None]
    depth = math.fsum(shares) if shares else None
    cosines = [abs(site.gradient_cosine) for site in sites if site.gradient_cosine is not None]
    return StreamProfile(
        sites=_orders(sites),
        parent=sites[0].parent,
        growth=growth_laws(sites),
        ranking=rank_blocks(sites),
        measured=len(shares),
        effective_depth=depth,
        depth_share=None if depth is None else depth / len(shares),
        normalised_depth=math.fsum(1 / k for k in range(2, len(shares) + 2)),
        unnormalised_depth=len(shares) / 2,
        path_lengths=path_lengths(shares),
        largest_cosine=max(cosines, default=None),
        exact=exact,
    )


def path_lengths(shares: Sequence[float]) -> tuple[float, ...]:
    """The distribution of the number of branches on a path: coefficients of prod_b (1 - s_b + s_b z).

    With s_b = r_b^2 / (1 + r_b^2) this is prod_b (1 + z r_b^2) / (1 + r_b^2): expanding the product of the
    blocks' Jacobians, the energy of a path is the product of the r_b^2 of the branches it takes (Veit et al.
    2016, arXiv 1605.06431), if parts of different paths are at right angles and each block treats all parts alike.
    Its mean is D_eff. The cost is L times the number of orders that matter; shares below 1e-15 count as 0.

    Args:
        shares: s_b of each branch, in 0..1; not finite ones make it empty.

    Returns:
        The share of each order 0, 1, 2 ...; they add up to 1. Empty without branches.
    """
    if not shares or not all(math.isfinite(share) for share in shares):
        return ()
    weights, lowest = deque([1.0]), 0
    for share in shares:
        kept = [*(weight * (1.0 - share) for weight in weights), 0.0]
        taken = [0.0, *(weight * share for weight in weights)]
        weights = deque(a + b for a, b in zip(kept, taken, strict=True))
        while len(weights) > 1 and weights[-1] < NEGLIGIBLE:
            weights.pop()
        while len(weights) > 1 and weights[0] < NEGLIGIBLE:
            weights.popleft()
            lowest += 1
    return (*(0.0 for _ in range(lowest)), *weights)


def rank_blocks(sites: Sequence[ResidualRecord]) -> tuple[BlockRank, ...]:
    """Rank the sites whose influence is known, the least useful first; ties in order of execution."""
    known = [(site.block_influence, site) for site in sites if _is_finite(site.block_influence)]
    influence, rho, angle, path = (
        _ranks(sites, measure)
        for measure in (
            lambda site: site.block_influence,
            lambda site: site.rho,
            lambda site: site.angular_distance,
            lambda site: site.path_share,
        )
    )
    ranked = sorted(known, key=lambda pair: influence[pair[1].order])
    return tuple(
        BlockRank(
            order=site.order,
            name=site.name,
            index=site.index,
            block_influence=value or 0.0,
            influence_rank=influence[site.order],
            rho=site.rho,
            rho_rank=rho.get(site.order),
            angular_distance=site.angular_distance,
            angular_rank=angle.get(site.order),
            path_share=site.path_share,
            path_rank=path.get(site.order),
        )
        for value, site in ranked
    )


def _ranks(
    sites: Iterable[ResidualRecord], measure: Callable[[ResidualRecord], float | None]
) -> dict[int, int]:
    values = [
        (value, site.order) for site in sites if (value := measure(site)) is not None and value == value
    ]
    return {order: rank for rank, (_, order) in enumerate(sorted(values), start=1)}


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def growth_laws(sites: Sequence[ResidualRecord]) -> tuple[Growth, ...]:
    """Fit a law to each stretch between resets that has at least four sums.

    Constant, linear (a + b l) and exponential (a f^l) laws are fitted to ln var, l counting sites; of those that are
    as good within the noise the one with the fewest parameters is kept (Schwarz's criterion). A trend that explains
    less than half of the scatter is no law.
    """
    laws = [_law(stretch) for stretch in _stretches(sites)]
    return tuple(law for law in laws if law is not None)


def _stretches(sites: Sequence[ResidualRecord]) -> list[list[ResidualRecord]]:
    found: list[list[ResidualRecord]] = []
    for site in sites:
        resets = site.kind == "projection" or site.resets_stream
        if not found or resets or site.shape != found[-1][-1].shape:
            found.append([])
        found[-1].append(site)
    return found


def _law(stretch: Sequence[ResidualRecord]) -> Growth | None:
    entering = [stretch[0].source_variance] if _is_entered(stretch) else []
    variances = [*entering, *(site.variance for site in stretch)]
    logs = [math.log(v) for v in variances if v is not None and 0.0 < v < math.inf]
    if len(logs) < len(variances) or len(stretch) < FEWEST_SUMS:
        return None
    constant = _constant(logs)
    scatter = constant[4]
    trends = [fit for fit in (_linear(logs), _exponential(logs)) if fit[4] <= (1 - EXPLAINED) * scatter]
    name, parameters, start, rate, square = min(
        (constant, *trends), key=lambda fit: _criterion(fit[1], fit[4], len(logs))
    )
    return Growth(
        first=stretch[0].order,
        last=stretch[-1].order,
        sums=len(logs),
        law=name,
        start=start,
        rate=rate,
        deviation=math.sqrt(square / len(logs)),
        r_squared=None if parameters == 1 or not scatter else 1.0 - square / scatter,
    )


def _is_entered(stretch: Sequence[ResidualRecord]) -> bool:
    """What enters the first block is the stream itself, as what enters the second is the sum of the first.

    Behind a projection, or with a normalisation or activation after each sum, it is not.
    """
    first, second = stretch[0], stretch[1] if len(stretch) > 1 else stretch[0]
    if first.kind == "projection" or not first.source_variance or not first.variance:
        return False
    following = second.source_variance
    return bool(following) and abs(math.log((following or 1.0) / first.variance)) < SAME_STREAM


Fit = tuple[str, int, float, float, float]
"""Law, parameters, start, rate, sum of squares about it in ln var."""


def _criterion(parameters: int, square: float, count: int) -> float:
    """Schwarz's criterion (BIC, 1978), with a floor of noise: what is within it is no better fit."""
    return count * math.log(square / count + NOISE**2) + parameters * math.log(count)


def _constant(logs: Sequence[float]) -> Fit:
    mean = math.fsum(logs) / len(logs)
    return "constant", 1, math.exp(mean), 0.0, math.fsum((y - mean) ** 2 for y in logs)


def _exponential(logs: Sequence[float]) -> Fit:
    centre, mean = (len(logs) - 1) / 2, math.fsum(logs) / len(logs)
    spread = math.fsum((k - centre) ** 2 for k in range(len(logs)))
    slope = math.fsum((k - centre) * (y - mean) for k, y in enumerate(logs)) / spread
    square = math.fsum((y - mean - slope * (k - centre)) ** 2 for k, y in enumerate(logs))
    return "exponential", 2, _power(mean - slope * centre), _power(slope), square


def _power(exponent: float) -> float:
    return math.exp(min(exponent, 700.0))


def _linear(logs: Sequence[float]) -> Fit:
    """Least squares of ln var about ln(a (1 + c l)): for each c the best a is known, and c is searched for."""

    def square(c: float) -> tuple[float, float]:
        rests = [y - math.log1p(c * k) for k, y in enumerate(logs)]
        mean = math.fsum(rests) / len(rests)
        return math.fsum((rest - mean) ** 2 for rest in rests), mean

    # From a stream that nearly vanishes over the stretch to one that grows a million times at the first site.
    falling = [-(1.0 - 2.0**-k) / (len(logs) - 1) for k in range(20)]
    grid = sorted([*falling, *(10.0 ** (k / 4) for k in range(-24, 25))])
    best = min(range(len(grid)), key=lambda i: square(grid[i])[0])
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    for _ in range(60):
        third = (high - low) / 3
        if square(low + third)[0] < square(high - third)[0]:
            high -= third
        else:
            low += third
    c = (low + high) / 2
    least, mean = square(c)
    return "linear", 2, math.exp(mean), c * math.exp(mean), least
