"""Where things are: execution order, spans of it, and runs of neighbours."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from gradflow.findings import Location
from gradflow.trace_model import ParameterRecord, Trace

Span = tuple[int, int]
"""First and last position in execution order, both included."""

SEPARATE_RUNS = 3
"""More separate runs than this, of something that is only informative, become one finding."""


def spans(trace: Trace) -> dict[str, Span]:
    """Return the span of each module that has a row or holds one; the root's, ``""``, is everything."""
    found: dict[str, Span] = {}
    for layer in trace.layers:
        for name in ancestry(layer.name):
            first, last = found.get(name, (layer.order, layer.order))
            found[name] = (min(first, layer.order), max(last, layer.order))
    return found


def ancestry(name: str) -> Iterator[str]:
    """Yield a fully qualified name and those of all modules around it, the root last."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def span_of(location: Location, known: Mapping[str, Span]) -> Span:
    """Return the span of a finding; a parameter has its module's, an unknown name its nearest ancestor's."""
    ends = [_nearest(name, known) for name in (location.first, location.last or location.first)]
    return min(first for first, _ in ends), max(last for _, last in ends)


def _nearest(name: str, known: Mapping[str, Span]) -> Span:
    return next((known[near] for near in ancestry(name) if near in known), (0, 0))


def runs(wanted: Collection[str], everything: Sequence[str]) -> list[tuple[str, ...]]:
    """Split the wanted names into runs of neighbours in ``everything``, in its order."""
    found: list[list[str]] = []
    previous = -2
    for position, name in enumerate(everything):
        if name not in wanted:
            continue
        if position != previous + 1:
            found.append([])
        found[-1].append(name)
        previous = position
    return [tuple(run) for run in found]


def fold(found: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Join all runs into one where there are too many to say one by one."""
    return [tuple(name for run in found for name in run)] if len(found) > SEPARATE_RUNS else found


def place_of(names: Sequence[str], everything: Collection[str]) -> Location:
    """Return the shortest location that covers a run of names.

    It is the one name, or the module that holds exactly these names and no others, or their range.
    """
    if len(names) == 1:
        return Location(first=names[0])
    for holder in ancestry(common_holder(names)):
        inside = {name for name in everything if holder and name.startswith(holder + ".")}
        if inside | {holder} >= set(names) >= inside and inside:
            return Location(first=holder)
    return Location(first=names[0], last=names[-1])


def common_holder(names: Sequence[str]) -> str:
    """Return the innermost module that holds all of these, or ``""``."""
    shared = list(ancestry(names[0]))
    for name in names[1:]:
        around = set(ancestry(name))
        shared = [holder for holder in shared if holder in around]
    return shared[0]


def parameter_runs(
    trace: Trace, wanted: Collection[str], *, few: bool = False
) -> list[tuple[Location, tuple[ParameterRecord, ...]]]:
    """Group parameters by neighbouring modules, in definition order.

    Args:
        trace: The recording.
        wanted: Names of the parameters to group.
        few: Join all groups into one where there are more than ``SEPARATE_RUNS``.

    Returns:
        Each group with its location: a module where all its parameters are in it, else the parameter's name.
    """
    unit = _units(trace.parameters, wanted)
    everything = list(dict.fromkeys(unit[p.name] for p in trace.parameters))
    found = runs({unit[name] for name in wanted}, everything)
    return [
        (
            place_of(run, everything),
            tuple(p for p in trace.parameters if p.name in wanted and unit[p.name] in run),
        )
        for run in (fold(found) if few else found)
    ]


def _units(parameters: Sequence[ParameterRecord], wanted: Collection[str]) -> dict[str, str]:
    """Name what each parameter is reported as: its module, or itself where the module's others differ."""
    partly = {p.module for p in parameters if p.name not in wanted}
    return {p.name: p.name if p.module in partly or not p.module else p.module for p in parameters}
