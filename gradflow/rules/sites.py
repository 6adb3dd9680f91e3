"""What the rules about residual sites share: which sites are alike, how to name them, where they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import groupby, takewhile
from statistics import quantiles

from gradflow.findings import Location
from gradflow.rules.gain import number
from gradflow.rules.places import SEPARATE_RUNS, runs
from gradflow.trace_model import ResidualRecord, Trace

ADDING_KINDS = ("identity", "projection", "scaled")
"""Kinds whose sum is a stream plus a branch: what rho and growth are defined for."""

ALIKE = 3
"""Fewer sites of the same make than this have no usual value."""

SAME_STREAM = 0.05
"""What enters a stream's next block has the last sum's standard deviation, up to this logarithm."""

RANKED = 10
"""Sites in a ranking; the others are its tail."""

Sites = tuple[ResidualRecord, ...]


def in_order(trace: Trace) -> Sites:
    """All sites in execution order."""
    return tuple(sorted(trace.residuals, key=lambda site: site.order))


def adding_sites(trace: Trace) -> Sites:
    """The sites whose rho is defined: a skip and a branch, added."""
    return tuple(site for site in in_order(trace) if site.kind in ADDING_KINDS)


def main_stream(trace: Trace) -> Sites:
    """The sites of the stream with the most of them: not those inside another site's branch."""
    by_parent: dict[int | None, list[ResidualRecord]] = {None: []}
    for site in adding_sites(trace):
        by_parent.setdefault(site.parent, []).append(site)
    streams = [stream for sites in by_parent.values() for stream in stretches(sites, starts=_new_stream)]
    return max(streams, key=len, default=())


def _new_stream(before: ResidualRecord, site: ResidualRecord) -> bool:
    """The decoder after the encoder: another list of blocks, and it does not go on from the last sum."""
    if stack_of(before.name) == stack_of(site.name) or site.kind == "projection":
        return False
    if not before.std or not site.source_std:
        return True
    return abs(math.log(site.source_std / before.std)) > SAME_STREAM


def stack_of(name: str) -> str:
    """The module that holds the numbered blocks: "text_model.encoder.layers"."""
    parts = name.split(".")
    return ".".join(takewhile(lambda part: not part.isdigit(), parts))


def alike(sites: Iterable[ResidualRecord]) -> dict[str, list[ResidualRecord]]:
    """Group sites by their make; one of unknown make is alone."""
    groups: dict[str, list[ResidualRecord]] = {}
    for site in sites:
        groups.setdefault(site.like or f"{site.name}#{site.index}@{site.call}", []).append(site)
    return groups


def upper_quartile(values: Sequence[float]) -> float | None:
    """What three quarters of the values do not exceed; None for fewer than ``ALIKE``.

    A fault in up to two thirds of the blocks pulls the median down to itself and hides; the upper quartile
    still belongs to the sound ones.
    """
    return quantiles(values, n=4, method="inclusive")[2] if len(values) >= ALIKE else None


def neighbours(wanted: Sequence[ResidualRecord], everything: Sequence[ResidualRecord]) -> list[Sites]:
    """Split sites into runs whose adding modules follow one another in ``everything``.

    Several sites of one module belong to one run, though only some of them are wanted.
    """
    names = list(dict.fromkeys(site.name for site in everything))
    found = [set(run) for run in runs({site.name for site in wanted}, names)]
    return [tuple(site for site in wanted if site.name in run) for run in found]


def joined(found: Sequence[Sites]) -> list[Sites]:
    """Join runs of something that is only informative where there are too many to say one by one."""
    return [tuple(site for run in found for site in run)] if len(found) > SEPARATE_RUNS else list(found)


def by(key: Callable[[ResidualRecord], tuple[object, ...]], sites: Iterable[ResidualRecord]) -> list[Sites]:
    """Group sites that have the same to say, in the order of their first."""
    groups: dict[tuple[object, ...], list[ResidualRecord]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return [tuple(group) for group in groups.values()]


def place(sites: Sequence[ResidualRecord]) -> Location:
    """From the module that makes the first add to the one that makes the last."""
    first, last = sites[0].name, sites[-1].name
    return Location(first=first, last=last if last != first else "")


def label(site: ResidualRecord, everything: Collection[ResidualRecord] = ()) -> str:
    """Name a site in a sentence: the adding module, and which of its adds where it makes several."""
    several = any(other.name == site.name and other.index != site.index for other in everything)
    return f"{site.name or 'the model'}{f' (add {site.index})' if several else ''}"


def subject(what: str, sites: Sequence[ResidualRecord], everything: Collection[ResidualRecord]) -> str:
    """ "The branch of blocks.3" or "The branches of 6 sites in blocks.6–blocks.11"."""
    if len(sites) == 1:
        source = f" ({sites[0].source})" if sites[0].source else ""
        return f"The {what} of {label(sites[0], everything)}{source}"
    plural = "branches" if what == "branch" else f"{what}s"
    return f"The {plural} of {len(sites)} sites in {str(place(sites)) or 'the model'}"


def ranking(sites: Iterable[ResidualRecord], everything: Collection[ResidualRecord]) -> str:
    """The sites by rho, the weakest first: "blocks.3 0.0001, blocks.7 0.12"."""
    known = sorted((s.rho, s.order, s) for s in sites if s.rho is not None and not math.isnan(s.rho))
    shown = ", ".join(f"{label(site, everything)} {number(rho)}" for rho, _, site in known[:RANKED])
    return f"{shown}, and {len(known) - RANKED} more" if len(known) > RANKED else shown


def inside(site: ResidualRecord, parameter: str) -> str:
    """A parameter's name as seen from the adding module: "norm2.weight"."""
    return parameter.removeprefix(f"{site.name}.") if site.name else parameter


def stretches(
    sites: Sequence[ResidualRecord], *, starts: Callable[[ResidualRecord, ResidualRecord], bool]
) -> list[Sites]:
    """Split a stream where ``starts(before, site)`` says that a new stretch begins."""
    mark = 0
    marked = []
    for position, site in enumerate(sites):
        mark += position > 0 and starts(sites[position - 1], site)
        marked.append((mark, site))
    return [tuple(site for _, site in group) for _, group in groupby(marked, key=lambda pair: pair[0])]
