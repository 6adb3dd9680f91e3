"""How a model's blocks are built, as sentences: norms, activations, gates, resets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gradflow.report import Report
from gradflow.reporters.folding import Foldable, fold
from gradflow.reporters.number_text import count_text, range_text
from gradflow.reporters.text_lines import one_line
from gradflow.trace_model import ResidualRecord

Fact = tuple[str, str]
"""A label and a sentence."""

_MOST_NAMES = 4
_STREAM = ("identity", "projection", "scaled")
_PLACEMENTS = {
    "before": "before the branch (pre-norm)",
    "after": "after the add (post-norm)",
    "both": "before the branch and at its end or after the add",
    "end": "last in the branch",
    "inside": "inside the branch",
    "none": "none",
}
_ONE_SIDED = ("relu", "relu_", "relu6", "threshold")


def facts(report: Report) -> list[Fact]:
    """What there is to say, in reading order; nothing for a model without residual sites."""
    sites = [site for site in report.trace.residuals if site.kind in _STREAM]
    found = [
        ("norm", _norms(sites)),
        ("activation", _activations(sites)),
        ("branches", _parallel(sites)),
        ("gates", _gates(sites)),
        ("factors", _factors(sites)),
        ("resets", _resets(sites)),
        ("joined", _joined(report.trace.residuals)),
    ]
    return [(label, sentence) for label, sentence in found if sentence]


def _norms(sites: Sequence[ResidualRecord]) -> str:
    groups = [
        (words, [site for site in sites if site.norm_placement == placement])
        for placement, words in _PLACEMENTS.items()
    ]
    return "; ".join(f"{words}: {where(found, sites)}" for words, found in groups if found)


def _activations(sites: Sequence[ResidualRecord]) -> str:
    names = dict.fromkeys(site.activation_after for site in sites if site.activation_after)
    parts = []
    for name in names:
        found = [site for site in sites if site.activation_after == name]
        blocks = (
            ": the stream stays above zero, and no gradient passes where the sum is below it"
            if name in _ONE_SIDED
            else ""
        )
        parts.append(f"{name.strip('_')} after the add in {where(found, sites)}{blocks}")
    return "; ".join(parts)


def _parallel(sites: Sequence[ResidualRecord]) -> str:
    found = [site for site in sites if site.branches > 1]
    nested = [site for site in sites if site.parent is not None]
    parts = []
    if found:
        most = max(site.branches for site in found)
        parts.append(f"{most} side by side in {where(found, sites)}")
    if nested:
        parts.append(f"inside another branch: {where(nested, sites)}")
    return "; ".join(parts)


def _gates(sites: Sequence[ResidualRecord]) -> str:
    shut = [site for site in sites if site.rho == 0.0]
    if not shut:
        return ""
    opened = list(dict.fromkeys(name for site in shut for name in site.opened_by))
    by = f"opened by {folded(opened)}" if opened else "and nothing gets a gradient that would open them"
    return f"at zero in {where(shut, sites)}, {by}"


def _factors(sites: Sequence[ResidualRecord]) -> str:
    parts = []
    for words, scale in (("branch", "branch_scale"), ("skip", "skip_scale")):
        found = [site for site in sites if getattr(site, scale) is not None]
        if found:
            value = range_text(getattr(site, scale) for site in found)
            kinds = dict.fromkeys(factor for site in found for factor in site.branch_factors)
            what = f" ({', '.join(kinds)})" if kinds and words == "branch" else ""
            parts.append(f"{value} on the {words}{what} in {where(found, sites)}")
    return "; ".join(parts)


def _resets(sites: Sequence[ResidualRecord]) -> str:
    found = [site for site in sites if site.resets_stream]
    if not found:
        return ""
    shortcuts = dict.fromkeys(step for site in found for step in site.shortcut)
    through = f", the shortcut being {' and '.join(shortcuts)}" if shortcuts else ""
    return f"the stream starts anew at {folded([site.name for site in found])}{through}"


def _joined(sites: Sequence[ResidualRecord]) -> str:
    """Sites that are no residual block: what was seen of them."""
    words = {
        "concat": "by concatenation",
        "gated": "through a gate made from the data",
        "low_rank": "a low-rank update beside a layer",
        "opaque": "by an op that cannot be looked into",
    }
    groups = [(text, [site for site in sites if site.kind == kind]) for kind, text in words.items()]
    return "; ".join(f"{text}: {where(found, sites)}" for text, found in groups if found)


def where(found: Sequence[ResidualRecord], among: Sequence[ResidualRecord]) -> str:
    """ "all 24 sites", "3 of 24 sites (h.0–2)"."""
    if len(found) == len(among):
        return f"all {count_text(len(found), 'site')}" if len(found) > 1 else "the one site"
    return f"{len(found):,} of {count_text(len(among), 'site')} ({folded([site.name for site in found])})"


def folded(names: Iterable[str]) -> str:
    """Names with numbered siblings folded, a few of them."""
    rows = [Foldable(name=name, part="", call=0, alike="") for name in dict.fromkeys(names)]
    labels = list(dict.fromkeys(one_line(found.label) for found in fold(rows)))
    more = f" and {len(labels) - _MOST_NAMES} more" if len(labels) > _MOST_NAMES + 1 else ""
    shown = labels[:_MOST_NAMES] if more else labels
    return ", ".join(shown) + more
