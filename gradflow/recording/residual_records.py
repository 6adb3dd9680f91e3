"""Sites of one step -> frozen residual records, once backward has run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradflow.recording.dataflow import Node
from gradflow.recording.drafts import drafting
from gradflow.recording.gradient_split import split_numbers
from gradflow.recording.recorder import Recorder
from gradflow.recording.residual_ops import ADD_OPS, SCALE_OPS, VALUE_OPS
from gradflow.recording.residual_recorder import Site
from gradflow.recording.residual_sites import Graph, factors_of, parallel_branches
from gradflow.recording.site_facts import FactFinder
from gradflow.recording.site_measures import site_numbers
from gradflow.recording.site_surroundings import Readers, previous_sites
from gradflow.recording.weight_ops import is_weight_op, weights_of
from gradflow.trace_model import ParameterRecord, ResidualRecord, TensorStatistics

SHOWN_OPS = 16
"""A branch is spelled out up to this many ops."""
_RESIDUAL = drafting(ResidualRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    recorder: Recorder
    graph: Graph
    statistics: Sequence[TensorStatistics]
    names: Mapping[int, str]
    """Fully qualified name of each parameter, by ``id``."""
    gradients: Mapping[str, float | None]
    """Gradient norm of each parameter, by name."""
    types: Mapping[str, str]
    """Class of each module, by name."""
    facts: FactFinder


def residual_records(
    recorder: Recorder,
    statistics: Sequence[TensorStatistics],
    parameters: Sequence[ParameterRecord],
    end: Node | None,
) -> tuple[ResidualRecord, ...]:
    """Freeze the sites of a step, in execution order.

    Args:
        recorder: Of the step.
        statistics: By probe.
        parameters: With their gradients.
        end: The node of the loss.
    """
    sites = [recorder.sites.sites[node] for node in sorted(recorder.sites.sites)]
    if not sites:
        return ()
    context = _Context(
        recorder=recorder,
        graph=recorder.sites.graph,
        statistics=statistics,
        names={id(item.parameter): item.names[0] for item in recorder.layout.parameters},
        gradients={row.name: row.gradient_norm for row in parameters},
        types={name: type(module).__name__ for module, name in recorder.layout.names.items()},
        facts=FactFinder(recorder.sites.graph, [(site.node, site.found) for site in sites]),
    )
    parents = _parents(sites)
    previous = previous_sites(sites, parents, context.graph.nodes)
    readers = Readers.of(context.graph.nodes, end)
    measured = site_numbers([site.products for site in sites])
    counts: Counter[tuple[str, int]] = Counter()
    records = []
    for order, site in enumerate(sites):
        where = (context.graph.nodes[site.node].module, site.call)
        gradients = _gradients(site, context, closed=readers.only_inside(site))
        numbers = {**_values(measured[order]), **gradients, "previous": previous[order]}
        records.append(_record(site, order, counts[where], parents[order], numbers, context))
        counts[where] += 1
    return tuple(records)


def _record(
    site: Site, order: int, index: int, parent: int | None, numbers: dict[str, Any], context: _Context
) -> ResidualRecord:
    node = context.graph.nodes[site.node]
    branch_ops = tuple(_op_names(site.found.inside, context.graph))
    kind = _kind(site, parent, context)
    names = _branch_parameters(site, context)
    return _RESIDUAL(
        order=order,
        name=node.module,
        index=index,
        call=site.call,
        kind=kind,
        source=node.source,
        shape=tuple(node.shape),
        branches=max(site.branches, _branches(site, context.graph)),
        parent=parent,
        span=sum(is_weight_op(context.graph.nodes[i], context.graph.nodes) for i in site.found.inside),
        in_place=site.in_place,
        branch_ops=branch_ops,
        shortcut_ops=tuple(_op_names(site.found.shortcut[::-1], context.graph)),
        branch_parameters=names,
        opened_by=tuple(name for name in names if _multiplies(name) and context.gradients.get(name)),
        broadcast=site.broadcast,
        like=f"{context.types.get(node.module, '')} #{index} {kind}: {' '.join(branch_ops)}",
        overwritten=site.overwritten,
        added_by=site.joined_by or _added_by(node.op),
        branch_scale=_scale(site.found.branch, context) if site.branches == 1 else None,
        skip_scale=_scale(site.found.skip, context) if kind == "scaled" else None,
        **_spread(site, context),
        **_values(context.facts.facts(site.node, site.found, nested=parent is not None)),
        **numbers,
    )


def _values(record: Any) -> dict[str, Any]:
    """The fields of a dataclass with slots as they are."""
    return {name: getattr(record, name) for name in record.__slots__}


def _added_by(op: str) -> str:
    """An op without its underscores and the prefix of an operator: "__iadd__" is an add."""
    name = op.strip("_")
    return name[1:] if name in ("iadd", "radd", "isub") else name


def _gradients(site: Site, context: _Context, *, closed: bool) -> dict[str, Any]:
    """At the sum, at its source and how the add shares it out."""
    nodes, recorder = context.graph.nodes, context.recorder
    ends = nodes[site.node], nodes[site.found.source]
    gradient, source_gradient = (recorder.whole_gradient_norm(node.probe) for node in ends)
    return {
        "gradient_norm": gradient,
        "source_gradient_norm": source_gradient,
        "gradient_ratio": source_gradient / gradient if gradient and source_gradient is not None else None,
        **_values(split_numbers(site.split, gradient, closed=closed)),
    }


def _spread(site: Site, context: _Context) -> dict[str, Any]:
    """Standard deviations and variances of the sum and of its source."""
    std, source_std = (_std(context.graph.nodes[i], context) for i in (site.node, site.found.source))
    return {
        "std": std,
        "source_std": source_std,
        "variance": None if std is None else std * std,
        "source_variance": None if source_std is None else source_std * source_std,
    }


def _std(node: Node, context: _Context) -> float | None:
    return None if node.probe is None else context.statistics[node.probe].std


def _scale(index: int, context: _Context) -> float | None:
    """The factor on one side: the number times the RMS of each parameter that multiplies; None without."""
    graph = context.graph
    number: float | None = None
    for i in factors_of(index, graph.nodes)[0]:
        number = (1.0 if number is None else number) * graph.factors.get(i, 1.0)
        if i in graph.complements:
            number *= _rms(1 - graph.complements[i].detach())
            continue
        for identity in weights_of(graph.nodes[i], graph.nodes):
            if identity in graph.parameters:
                number *= _rms(graph.parameters[identity].detach())
    return number


def _rms(values: Tensor) -> float:
    return math.sqrt(float(values.double().square().mean().item()))


def _kind(site: Site, parent: int | None, context: _Context) -> str:
    """A factor a channel on a skip inside a branch is a gate (an SSM's D-skip), not a scaled stream."""
    if site.found.kind != "scaled" or parent is None:
        return site.found.kind
    nodes, known = context.graph.nodes, context.graph.parameters
    factors, _ = factors_of(site.found.skip, nodes)
    sizes = [known[p].numel() for i in factors for p in weights_of(nodes[i], nodes) if p in known]
    return "gated" if any(size > 1 for size in sizes) else "scaled"


def _branches(site: Site, graph: Graph) -> int:
    return parallel_branches(site.found.branch, site.found.source, graph.nodes)


def _parents(sites: Sequence[Site]) -> list[int | None]:
    """For each site the innermost other site whose branch holds its sum."""
    homes: dict[int, list[int]] = {}
    sums = {site.node for site in sites}
    for order, site in enumerate(sites):
        if site.found.kind in ("concat", "gated"):
            continue
        for i in site.found.inside:
            if i in sums:
                homes.setdefault(i, []).append(order)
    return [
        min(homes.get(site.node, []), key=lambda order: len(sites[order].found.inside), default=None)
        for site in sites
    ]


def _op_names(indices: Sequence[int], graph: Graph) -> list[str]:
    """What is worth naming of a branch; moves, casts and factors are not."""
    dull = VALUE_OPS | ADD_OPS | SCALE_OPS
    names = [graph.nodes[i].op.strip("_") for i in indices if graph.nodes[i].op not in dull]
    if len(names) > SHOWN_OPS:
        return [*names[:SHOWN_OPS], f"{len(names) - SHOWN_OPS} more"]
    return names


def _branch_parameters(site: Site, context: _Context) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for i in site.found.inside:
        node = context.graph.nodes[i]
        computed = any(
            context.graph.nodes[j].from_parameter and not context.graph.nodes[j].from_data
            for j in node.inputs
        )
        consumed = node.parameters or (weights_of(node, context.graph.nodes) if computed else ())
        found.update({context.names[p]: None for p in consumed if p in context.names})
    return tuple(found)


def _multiplies(name: str) -> bool:
    """Weights, scales and gates; a bias adds, and opens nothing."""
    return not name.rsplit(".", 1)[-1].startswith(("bias", "b_ih", "b_hh", "in_proj_bias", "beta"))
