"""GF203: an in-place op in a branch writes over the skip."""

from __future__ import annotations

from collections.abc import Iterator

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import Evidence, number
from gradflow.rules.rule import Rule, Threshold
from gradflow.rules.sites import Sites, by, in_order, place, subject
from gradflow.trace_model import OverwrittenSkip, ResidualRecord, Trace

LIMITS = (
    Threshold(
        name="in-place results that another name than the skip's receives, above",
        value=0,
        severity=Severity.WARNING,
        source="reading the source of the forward that adds",
    ),
    Threshold(
        name="in-place results where that source cannot be read, above",
        value=0,
        severity=Severity.INFO,
        source="engineering choice: both a bug and a meant change run these ops",
    ),
)
WHY = (
    "The skip carries the result of the in-place op and not the block's input: half of it may be zeros, and "
    "what the reader of the code takes for an identity is none"
)
HINT = (
    "Take inplace=True (or the trailing underscore) off the op that the branch starts with; where the change "
    "is meant, say so by binding the result: x = act(x) before the add"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for each statement that writes over a skip, with all the sites that it does it to."""
    found = [site for site in in_order(trace) if _accused(site)]
    for group in by(lambda site: _statement(site), found):
        overwritten = group[0].overwritten
        if overwritten is not None:
            yield _finding(trace, group, overwritten)


def _accused(site: ResidualRecord) -> bool:
    return site.overwritten is not None and site.overwritten.rebound is not True


def _statement(site: ResidualRecord) -> tuple[object, ...]:
    written = site.overwritten
    return () if written is None else (written.rebound, written.op, written.source, site.source or site.like)


def _finding(trace: Trace, group: Sites, written: OverwrittenSkip) -> Finding:
    limit = LIMITS[0] if written.rebound is False else LIMITS[1]
    by_module = f" in {written.name}" if written.name and len(group) == 1 else ""
    line = f" at {written.source}" if written.source else ""
    unread = "" if written.rebound is False else "; there is no source to tell whether it was meant"
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=limit.severity,
        location=place(group),
        message=(
            f"{subject('skip', group, in_order(trace))} {'is' if len(group) == 1 else 'are'} overwritten "
            f"by the in-place {written.op}{by_module}{line} ({limit.severity} above 0){_proof(group)}{unread}"
        ),
        why=WHY,
        hint=HINT,
        value=float(len(group)),
        threshold=limit.value,
        evidence=(*_evidence(written), *_distances(group)),
    )


def _proof(group: Sites) -> str:
    """How far the op went, and the sum with it; of several sites the farthest."""
    far = dict(_distances(group))
    most = "" if len(group) == 1 else "up to "
    said = [
        f"{words} {most}{number(100 * far[name])}%{ending}"
        for name, words, ending in (
            ("change", "it moves x by", ""),
            ("distance", "the sum is", " away from x + F(x)"),
        )
        if name in far
    ]
    return f": {' and '.join(said)}" if said else ""


def _distances(group: Sites) -> tuple[tuple[str, float], ...]:
    written = [site.overwritten for site in group if site.overwritten is not None]
    found = (
        ("change", [w.change for w in written if w.change is not None]),
        ("distance", [w.distance for w in written if w.distance is not None]),
    )
    return tuple((name, max(values)) for name, values in found if values)


def _evidence(written: OverwrittenSkip) -> Evidence:
    facts = (("op", written.op), ("module", written.name), ("source", written.source))
    return tuple((name, fact) for name, fact in facts if fact)


RULE = Rule(
    code="GF203",
    slug="overwritten-skip",
    summary="An in-place op in the branch writes over the skip.",
    meaning=(
        "Looks at every residual site for an in-place op that changed the tensor which the skip carries, "
        "before the add was run. nn.ReLU(inplace=True) as the first layer of a branch does this: x + "
        "body(x) then adds relu(x), not x, and autograd does not complain.\n\n"
        "The ops alone cannot tell this from x = relu_(x); x + f(x), where the change is meant. The source "
        "of the adding forward can: where the statement that ran the op binds its result to the name that "
        "the skip has in the add, nothing is said; where it does not, this is a warning. Where there is no "
        "source (code typed in, or built by exec) it is info.\n\n"
        "The finding proves itself: the step is run once more, the accused op's operand is kept from just "
        "before it, and two distances are measured at the add."
    ),
    formula=(
        "in-place op between the stream and both operands of x + F(x), its result bound to another name\n\n"
        "x before the op, x' when the add runs, y = x' + F(x) the sum as it is:\n"
        "it moves x by      ||x' - x|| / ||x||\n"
        "the sum is away    ||y - (x + F(x))|| / ||x + F(x)||"
    ),
    why=WHY + ".",
    hint=HINT + ".",
    thresholds=LIMITS,
    exemptions=(
        "An op whose result is bound to the skip's own name (x = act_(x), x *= 2, (x := act_(x))), also "
        "through an alias made after it (identity = x).",
        "An in-place method called as a statement of its own (x.relu_()): a result thrown away says that the "
        "change was the purpose.",
        "In-place ops on the sum, after the add.",
    ),
    sources=("He et al., Identity mappings in deep residual networks, ECCV 2016 (what a skip must carry)",),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(64, 64), nn.LayerNorm(64))

    def forward(self, x):
        out = self.body(x)
        return x + out


model = nn.Sequential(nn.Linear(64, 64), *[Block() for _ in range(4)], nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64))

    def forward(self, x):
        out = self.body(x)
        return x + out


model = nn.Sequential(nn.Linear(64, 64), *[Block() for _ in range(4)], nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
""",
    check=check,
)
