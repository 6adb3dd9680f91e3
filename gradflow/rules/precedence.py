"""One root cause per region: which finding explains which, as data.

The rows stand in the order of precedence, and the first that applies names the cause. A new rule adds rows;
nothing else changes. Following the rows from cause to effect never leads back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gradflow.findings import Finding, Severity
from gradflow.rules.gf205_norm_placement import NO_NORM
from gradflow.rules.gf304_collapsed_representation import COLLAPSE
from gradflow.rules.gf403_batch_norm_batch import TOO_FEW_VALUES
from gradflow.rules.places import Span, span_of
from gradflow.rules.units import LOSS_OF_GRADIENT

BESIDE = 2
"""An activation stands at most so many rows behind the layer it belongs to: a normalisation between."""

Region = Callable[[Span, Span], bool]
"""``region(cause, effect)``: whether the effect is where the cause would put it."""


def anywhere(cause: Span, effect: Span) -> bool:
    """A loss that is not finite spoils every gradient."""
    return True


def upstream(cause: Span, effect: Span) -> bool:
    """The effect lies at the cause or before it: what the backward carries on."""
    return effect[1] <= cause[1]


def reaches_upstream(cause: Span, effect: Span) -> bool:
    """Some of the effect lies at the cause or before it."""
    return effect[0] <= cause[1]


def downstream(cause: Span, effect: Span) -> bool:
    """Some of the effect lies at the cause or after it: what the forward carries on."""
    return effect[1] >= cause[0]


def inside(cause: Span, effect: Span) -> bool:
    """All of the effect lies inside the cause."""
    return cause[0] <= effect[0] and effect[1] <= cause[1]


def within(cause: Span, effect: Span) -> bool:
    """The effect lies where the cause does."""
    return cause[0] <= effect[0] and effect[1] <= cause[1] + BESIDE


def covers(cause: Span, effect: Span) -> bool:
    """The cause stands all along the effect, but for a layer and its normalisation at either end."""
    return cause[0] - BESIDE <= effect[0] and effect[1] <= cause[1] + BESIDE


@dataclass(frozen=True, slots=True, kw_only=True)
class Consequence:
    """Findings of ``effects`` are consequences of an error (see ``least``) of ``cause`` in the region it reaches."""

    cause: str
    effects: tuple[str, ...]
    region: Region
    only: str = ""
    """Only findings whose evidence holds this ``cause``; "" for all."""
    least: Severity = Severity.ERROR
    """How bad the cause must be."""
    in_module: bool = False
    """Only a cause in a module: the model's own forward holds everything, and explains none of it."""
    of_kind: str = ""
    """Only effects whose evidence holds this ``kind``; "" for all."""


CONSEQUENCES: tuple[Consequence, ...] = (
    Consequence(cause="GF303", effects=("GF104", "GF101", "GF102", "GF204"), region=anywhere),
    Consequence(cause="GF303", effects=("GF201", "GF202", "GF301", "GF302", "GF304"), region=downstream),
    Consequence(cause="GF104", effects=("GF101", "GF102"), region=reaches_upstream),
    Consequence(cause="GF103", effects=("GF101", "GF102"), region=upstream, only="graph cut"),
    Consequence(cause="GF204", effects=("GF301", "GF302"), region=inside, in_module=True),
    Consequence(cause="GF204", effects=("GF304",), region=downstream),
    # Two values a channel lose the gradient, whatever stands before; a batch too small for one is too small for all.
    Consequence(cause="GF403", effects=("GF101", "GF102"), region=reaches_upstream, only=TOO_FEW_VALUES),
    Consequence(cause="GF403", effects=("GF301", "GF302"), region=within, only=TOO_FEW_VALUES),
    # A loss that other layers share is GF101's own, with saturation as one of its causes.
    Consequence(cause="GF301", effects=("GF101",), region=anywhere, only=LOSS_OF_GRADIENT),
    Consequence(cause="GF302", effects=("GF101",), region=anywhere, only=LOSS_OF_GRADIENT),
    Consequence(cause="GF301", effects=("GF304",), region=covers),
    Consequence(cause="GF302", effects=("GF304",), region=covers),
    # Weights so large that the gradient explodes saturate what they feed.
    Consequence(cause="GF102", effects=("GF302",), region=within),
    # Logits that are far too large multiply the gradient that does come through.
    Consequence(cause="GF305", effects=("GF102",), region=within),
    # A signal that is lost and a gradient that is lost are one fault; the gradient's name comes first.
    Consequence(cause="GF101", effects=("GF304",), region=anywhere, least=Severity.WARNING, of_kind=COLLAPSE),
    # A stream without norms grows: the variances say it with a number.
    Consequence(cause="GF202", effects=("GF205",), region=anywhere, least=Severity.INFO, of_kind=NO_NORM),
    # Branches that add nothing, or are dead, are what makes the paths of the gradient short.
    Consequence(cause="GF201", effects=("GF206",), region=anywhere, least=Severity.INFO),
    Consequence(cause="GF204", effects=("GF206",), region=anywhere),
    # What is too small for float16 may be small because the gradient vanishes.
    Consequence(cause="GF104", effects=("GF105",), region=anywhere),
    Consequence(cause="GF303", effects=("GF105",), region=anywhere),
    Consequence(cause="GF101", effects=("GF105",), region=anywhere, least=Severity.WARNING),
    Consequence(cause="GF105", effects=("GF401",), region=anywhere, least=Severity.WARNING),
    # The optimizer does what the gradient and the precision leave it to do.
    Consequence(cause="GF303", effects=("GF401", "GF402"), region=anywhere),
    Consequence(cause="GF104", effects=("GF401", "GF402"), region=anywhere),
    Consequence(cause="GF403", effects=("GF401",), region=reaches_upstream, only=TOO_FEW_VALUES),
    Consequence(cause="GF101", effects=("GF401", "GF402"), region=anywhere, least=Severity.WARNING),
    Consequence(cause="GF102", effects=("GF401",), region=anywhere, least=Severity.WARNING),
    Consequence(cause="GF402", effects=("GF401",), region=anywhere, least=Severity.WARNING),
    # A growing stream (GF202) and the gradient that grows with it (GF102) are both reported.
)


def attribute(
    findings: Sequence[Finding], known: Mapping[str, Span], rows: Sequence[Consequence] = CONSEQUENCES
) -> tuple[Finding, ...]:
    """Turn each finding that another explains into info with ``consequence_of``.

    Args:
        findings: What the rules said.
        known: The span of every module, from ``places.spans``.
        rows: Which rule's findings explain which.

    Returns:
        The same findings in the same order. ``consequence_of`` names a root cause, never a consequence.
    """
    causes = [_cause(findings, finding, known, rows) for finding in findings]
    return tuple(
        finding if cause is None else _demoted(finding, findings[_root(causes, cause)])
        for finding, cause in zip(findings, causes, strict=True)
    )


def _cause(
    findings: Sequence[Finding], effect: Finding, known: Mapping[str, Span], rows: Sequence[Consequence]
) -> int | None:
    where = span_of(effect.location, known)
    for row in rows:
        if effect.rule not in row.effects or not _is_of_kind(row, effect):
            continue
        for i, cause in enumerate(findings):
            if (
                cause.rule == row.cause
                and _explains(row, cause)
                and row.region(span_of(cause.location, known), where)
            ):
                return i
    return None


def _explains(row: Consequence, cause: Finding) -> bool:
    if row.in_module and not cause.location.first:
        return False
    return cause.severity.rank >= row.least.rank and (not row.only or ("cause", row.only) in cause.evidence)


def _is_of_kind(row: Consequence, effect: Finding) -> bool:
    return not row.of_kind or ("kind", row.of_kind) in effect.evidence


def _root(causes: Sequence[int | None], position: int) -> int:
    before = causes[position]
    while before is not None:
        position, before = before, causes[before]
    return position


def _demoted(finding: Finding, cause: Finding) -> Finding:
    return replace(finding, severity=Severity.INFO, consequence_of=f"{cause.rule} {cause.location}")
