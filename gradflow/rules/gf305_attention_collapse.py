"""GF305: attention whose heads look at one key each, or whose logits have run away."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import Evidence, number
from gradflow.rules.places import place_of, runs
from gradflow.rules.rule import Limits, Rule, Threshold, in_force
from gradflow.rules.units import percent
from gradflow.trace_model import AttentionRecord, Trace

SHARP = 0.1
"""A head below this normalised entropy looks at about one key."""

SHARP_HEADS = Threshold(
    key="sharp-heads",
    name="share of heads with a normalised entropy below 0.1, above",
    value=0.5,
    severity=Severity.WARNING,
    source="engineering choice: single sharp heads and attention sinks are normal, a layer of them is not; "
    "Zhai et al. 2023 tie collapsing entropy to diverging training",
)
LARGE_LOGIT = Threshold(
    key="logit",
    name="largest logit above",
    value=100.0,
    severity=Severity.WARNING,
    source="the limit of QK-clip (Kimi Team 2025)",
)
ONE_HOT = Threshold(
    key="entropy",
    name="median normalised entropy of the heads below",
    value=0.02,
    severity=Severity.ERROR,
    source="engineering choice: logits of standard deviation 6 under 1,024 keys still have 0.19",
)
HUGE_LOGIT = Threshold(
    key="logit",
    name="largest logit above",
    value=1000.0,
    severity=Severity.ERROR,
    source="runs diverge beyond it (Kimi Team 2025); 50,000 in the unstable ViT-22B (Dehghani et al. 2023)",
)

WHY = (
    "A softmax with all its weight on one key passes no gradient back to queries and keys, so attention stays "
    "as it is; in half precision logits as large as these lose the differences between them"
)
HINT = (
    "Scale the logits by 1/sqrt(head dimension), normalise queries and keys (QK-norm), and lower the "
    "initialisation or the learning rate of the layers that make them"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    record: AttentionRecord
    limit: Threshold
    value: float
    words: str
    sharp: float
    """Share of heads below SHARP."""


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for each run of attention layers of one severity."""
    limits = in_force(RULE, config)
    judged = [item for record in trace.attentions if (item := _judge(record, limits)) is not None]
    everything = list(dict.fromkeys(record.name for record in trace.attentions))
    for severity in (Severity.ERROR, Severity.WARNING):
        mine = [item for item in judged if item.limit.severity is severity]
        for run in runs({item.record.name for item in mine}, everything):
            members = [item for item in mine if item.record.name in run]
            worst = min(members, key=lambda item: _median(item.record))
            yield Finding(
                rule=RULE.code,
                slug=RULE.slug,
                severity=severity,
                location=place_of(run, everything),
                message=_beginning(members, worst) + worst.words,
                why=WHY,
                hint=HINT,
                value=worst.value,
                threshold=worst.limit.value,
                evidence=_evidence(worst, members),
            )


def _beginning(members: Sequence[_Judged], worst: _Judged) -> str:
    if len(members) == 1:
        return ""
    return f"{len(members)} attention layers, the sharpest {worst.record.name or 'the model'}: "


def _judge(record: AttentionRecord, limits: Limits) -> _Judged | None:
    measured = [entropy for entropy in record.entropies if entropy == entropy]
    if not measured:
        return None
    sharp = sum(entropy < SHARP for entropy in measured) / len(measured)
    median, largest = statistics.median(measured), record.largest_logit
    one_hot, sharp_heads = limits.only("entropy"), limits.only("sharp-heads")
    large, huge = sorted(limits["logit"], key=lambda limit: limit.severity.rank)
    for limit, value, beyond, words in (
        (one_hot, median, median < one_hot.value, _entropy_words(record, median, one_hot)),
        (huge, largest, largest > huge.value, _logit_words(largest, huge)),
        (sharp_heads, sharp, sharp > sharp_heads.value, _sharp_words(record, sharp, sharp_heads)),
        (large, largest, largest > large.value, _logit_words(largest, large)),
    ):
        if beyond:
            return _Judged(record=record, limit=limit, value=value, words=words, sharp=sharp)
    return None


def _entropy_words(record: AttentionRecord, median: float, limit: Threshold) -> str:
    return (
        f"attention is one-hot: the median head has {number(median)} of the entropy of looking at all keys alike "
        f"(error below {limit.value:g}; {record.heads} heads, largest logit {number(record.largest_logit)})"
    )


def _sharp_words(record: AttentionRecord, sharp: float, limit: Threshold) -> str:
    return (
        f"{percent(sharp)} of the {record.heads} heads have below {SHARP:g} of the entropy of looking at all keys "
        f"alike (warning above {percent(limit.value)}; largest logit {number(record.largest_logit)})"
    )


def _logit_words(largest: float, limit: Threshold) -> str:
    return f"the largest attention logit is {number(largest)} ({limit.severity} above {limit.value:g})"


def _median(record: AttentionRecord) -> float:
    return statistics.median(entropy for entropy in record.entropies if entropy == entropy)


def _evidence(worst: _Judged, members: Sequence[_Judged]) -> Evidence:
    record = worst.record
    return (
        ("op", record.op),
        ("attentions", len(members)),
        ("heads", record.heads),
        ("keys", record.keys),
        ("queries", record.queries),
        ("median_entropy", _median(record)),
        ("sharp_heads", worst.sharp),
        ("largest_logit", max(item.record.largest_logit for item in members)),
    )


RULE = Rule(
    code="GF305",
    slug="attention-collapse",
    summary="Attention heads look at one key each, or their logits have run away.",
    meaning=(
        "Looks at the weights of every attention: F.scaled_dot_product_attention, nn.MultiheadAttention, and "
        "every softmax over the last dimension of a product of two tensors of data. The entropy of a row of "
        "weights, over the logarithm of how many keys the query sees, is 1 for looking at all alike and 0 for "
        "looking at one. Up to 64 queries of two samples are looked at, the weights of fused attention being "
        "computed again for them.\n\n"
        "For logits N(0, s²) over T keys it is 1 - s²/(2 ln T) as long as s is well below sqrt(2 ln T) (a random "
        "energy model). A fresh GPT-2 has 0.998: attention that looks at everything is no fault.\n\n"
        "Logits are looked at before masks; those of an explicit softmax as they are, the largest only, for "
        "the mask has lowered others."
    ),
    formula=(
        "Hn = mean over queries that see n >= 2 keys of -sum_j a_j ln a_j / ln n, for each head;\n"
        "largest logit: max |q·k·scale| over the keys that are seen"
    ),
    why=WHY + ".",
    hint=HINT + ".",
    thresholds=(SHARP_HEADS, LARGE_LOGIT, ONE_HOT, HUGE_LOGIT),
    exemptions=(
        "Half of the heads of a layer or fewer: induction heads and attention sinks are sharp.",
        "Queries that see a single key, as the first of a causal model.",
        "nn.MultiheadAttention with add_bias_kv or add_zero_attn, which adds keys of its own, and flex_attention, "
        "which changes the logits by a function: not measured, and the run's notes say where.",
        "Kernels of other packages (flash_attn, xformers) and softmax over another than the last dimension are "
        "not seen; nor is what runs while a model is compiled or exported.",
    ),
    sources=(
        "Zhai et al., Stabilizing transformer training by preventing attention entropy collapse, ICML 2023",
        "Giorlandino and Goldt, arXiv 2505.24333, 2025: the entropy of random logits",
        "Dehghani et al., Scaling vision transformers to 22 billion parameters, 2023: QK-norm",
        "Kimi Team, Kimi K2, 2025: QK-clip",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


model = nn.Sequential(Block(), Block(), nn.Linear(64, 10))
with torch.no_grad():
    model[1].attention.in_proj_weight[:128] *= 50
example_inputs = torch.randn(8, 32, 64)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


model = nn.Sequential(Block(), Block(), nn.Linear(64, 10))
example_inputs = torch.randn(8, 32, 64)
""",
    check=check,
)
