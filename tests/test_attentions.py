"""GF305: entropies and logits against float64, however attention is written, and both sides of every limit."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import attention_models
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from traces import make_layers, make_trace

import gradflow
from gradflow import trace_file
from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules import find_rule
from gradflow.trace_model import AttentionRecord

WARNING, ERROR = Severity.WARNING, Severity.ERROR
SAMPLES, HEADS, LENGTH, WIDTH = 2, 4, 24, 8


class Written(nn.Module):
    """Attention of queries, keys and values that are all made of the input, by a function."""

    def __init__(self, attend: Any, *, key_heads: int = HEADS) -> None:
        super().__init__()
        self.attend, self.key_heads = attend, key_heads
        self.query = nn.Linear(WIDTH, HEADS * WIDTH)
        self.key = nn.Linear(WIDTH, key_heads * WIDTH)
        nn.init.normal_(self.query.weight)
        nn.init.normal_(self.key.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.made(x)).sum(dim=1)

    def made(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query = self.query(x).unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
        key = self.key(x).unflatten(2, (self.key_heads, WIDTH)).transpose(1, 2)
        return query, key


def energy(outputs: Tensor, _inputs: Any) -> Tensor:
    return outputs.square().mean()


def records(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[AttentionRecord, ...]:
    return gradflow.inspect(model, inputs, energy, **options).trace.attentions


def reference(logits: Tensor, visible: Tensor | None = None) -> list[float]:
    """Hn of each head of [samples, heads, queries, keys], row by row in float64."""
    seen = torch.ones_like(logits, dtype=torch.bool) if visible is None else visible.expand_as(logits)
    found = []
    for head in range(logits.shape[1]):
        rows = []
        for sample in range(logits.shape[0]):
            for query in range(logits.shape[2]):
                row = logits[sample, head, query][seen[sample, head, query]].double()
                if len(row) > 1:
                    weights = torch.exp(row - row.max())
                    weights = weights / weights.sum()
                    entropy = -sum(float(w) * math.log(w) for w in weights if w > 0)
                    rows.append(entropy / math.log(len(row)))
        found.append(sum(rows) / len(rows))
    return found


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
PADDED = (torch.arange(LENGTH) < torch.tensor([[17], [LENGTH]]))[:, None, None]
BIAS = torch.randn(HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))


def fused(**options: Any) -> Any:
    return lambda q, k: F.scaled_dot_product_attention(q, k, k, **options)


def flat(q: Tensor, k: Tensor) -> Tensor:
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    return F.scaled_dot_product_attention(q, k, k).unflatten(0, (SAMPLES, HEADS))


def grouped(q: Tensor, k: Tensor) -> Tensor:
    mixed = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    return mixed


def explicit(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(WIDTH)
    scores = scores.masked_fill(~CAUSAL, torch.finfo(scores.dtype).min)
    return F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32), 0.1, training=False) @ k


def einsum(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q * WIDTH**-0.5, k) + BIAS
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), k)


def batched(q: Tensor, k: Tensor) -> Tensor:
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    scores = torch.baddbmm(BIAS.repeat(SAMPLES, 1, 1), q, k.mT, alpha=WIDTH**-0.5)
    return torch.bmm(nn.Softmax(dim=-1)(scores), k).unflatten(0, (SAMPLES, HEADS))


ADDED = torch.zeros(LENGTH, LENGTH).masked_fill(~CAUSAL, -math.inf)


@pytest.mark.parametrize(
    ("attend", "op", "scale", "bias", "visible"),
    [
        (fused(), "scaled_dot_product_attention", None, None, None),
        (fused(is_causal=True), "scaled_dot_product_attention", None, None, CAUSAL),
        (fused(attn_mask=PADDED), "scaled_dot_product_attention", None, None, PADDED),
        (fused(attn_mask=ADDED), "scaled_dot_product_attention", None, None, CAUSAL),
        (fused(attn_mask=BIAS), "scaled_dot_product_attention", None, BIAS, None),
        (fused(scale=0.7), "scaled_dot_product_attention", 0.7, None, None),
        (flat, "scaled_dot_product_attention", None, None, None),
        (grouped, "scaled_dot_product_attention", None, None, None),
        (explicit, "softmax", None, None, CAUSAL),
        (einsum, "softmax", None, BIAS, None),
        (batched, "softmax", None, BIAS, None),
    ],
)
def test_entropies_agree_with_float64(
    attend: Any, op: str, scale: float | None, bias: Tensor | None, visible: Tensor | None
) -> None:
    torch.manual_seed(0)
    model = Written(attend, key_heads=2 if attend is grouped else HEADS)
    x = torch.randn(SAMPLES, LENGTH, WIDTH)
    (record,) = records(model, x)
    query, key = (part.detach().double() for part in model.made(x))
    products = query @ key.repeat_interleave(HEADS // key.shape[1], 1).mT * (scale or WIDTH**-0.5)
    logits = products if bias is None else products + bias
    assert (record.name, record.op, record.call) == ("", op, 0)
    assert (record.heads, record.keys, record.queries) == (HEADS, LENGTH, LENGTH)
    assert record.entropies == pytest.approx(reference(logits, visible), rel=1e-4)
    shown = logits if op == "softmax" else products.abs()
    largest = shown if visible is None else shown.masked_fill(~visible, -math.inf)
    assert record.largest_logit == pytest.approx(largest.max().item(), rel=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["no", "causal", "added", "each head", "padding"])
@pytest.mark.parametrize("cross", [True, False])
def test_multihead_attention_agrees_with_the_weights_it_returns(
    batch_first: bool, masked: str, cross: bool
) -> None:
    torch.manual_seed(0)
    width = HEADS * WIDTH
    sizes = {"kdim": 12, "vdim": 12} if cross else {}
    module = nn.MultiheadAttention(width, HEADS, batch_first=batch_first, **sizes)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, memory = torch.randn(SAMPLES, LENGTH, width), torch.randn(SAMPLES, LENGTH, 12 if cross else width)
    mask = {
        "causal": {"attn_mask": ~CAUSAL},
        "added": {"attn_mask": ADDED},
        "each head": {"attn_mask": (~CAUSAL).repeat(SAMPLES * HEADS, 1, 1)},
        "padding": {"key_padding_mask": ~PADDED[:, 0, 0]},
    }.get(masked, {})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, x: Tensor, memory: Tensor) -> Any:
            pair = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
            return self.attention(pair[0], pair[1], pair[1], average_attn_weights=False, **mask)

    report = gradflow.inspect(Model(), (x, memory), lambda outputs, _: outputs[0].square().mean())
    (record,) = report.trace.attentions
    weights = Model()(x, memory)[1].detach()
    visible = {"no": None, "padding": PADDED}.get(masked, CAUSAL)
    assert (record.name, record.op) == ("attention", "multi_head_attention_forward")
    assert record.entropies == pytest.approx(reference(weights.double().log(), visible), rel=1e-4)


@pytest.mark.parametrize(("deviation", "expected"), [(0.5, 0.982), (1.0, 0.928)])
def test_random_logits_have_the_entropy_of_the_random_energy_model(deviation: float, expected: float) -> None:
    """Row 18: Hn = 1 - s^2/(2 ln T) for Gaussian logits of standard deviation s over T keys."""
    torch.manual_seed(0)
    keys, width = 1024, 64

    class Random(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k)

    q, k = deviation * torch.randn(2, 4, keys, width), torch.randn(2, 4, keys, width)
    (record,) = records(Random(), q, k.requires_grad_())
    assert record.queries < keys
    assert sum(record.entropies) / 4 == pytest.approx(1 - deviation**2 / (2 * math.log(keys)), rel=0.02)
    assert sum(record.entropies) / 4 == pytest.approx(expected, rel=0.02)


def no_attention(q: Tensor, k: Tensor) -> Tensor:
    """A softmax over features, one over classes, one over samples: none is over keys."""
    over_samples = (q @ k.mT).softmax(0).sum(-1, keepdim=True)
    return q.softmax(-1) + F.softmax(q.mean(1), dim=-1).unsqueeze(1) + over_samples


def test_other_softmaxes_are_no_attention() -> None:
    assert records(Written(no_attention), torch.randn(SAMPLES, LENGTH, WIDTH)) == ()
    head = nn.Sequential(nn.Linear(WIDTH, 5), nn.Softmax(dim=-1))
    assert records(head, torch.randn(SAMPLES, LENGTH, WIDTH)) == ()


def test_a_trace_with_attentions_is_read_back_the_same() -> None:
    trace = gradflow.inspect(
        Written(fused(is_causal=True)), (torch.randn(SAMPLES, LENGTH, WIDTH),), energy, steps=3
    ).trace
    assert len(trace.attentions) == 1
    assert trace_file.loads(trace_file.dumps(trace)) == trace


def test_under_autocast_and_in_half_precision_logits_are_taken_in_single() -> None:
    torch.manual_seed(0)
    model, x = Written(fused()), torch.randn(SAMPLES, LENGTH, WIDTH)
    (exact,) = records(model, x)
    (half,) = records(model.bfloat16(), x.bfloat16())
    assert half.entropies == pytest.approx(exact.entropies, rel=0.05)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, way) for name in ("gpt2", "bert", "llama") for way in ("eager", "sdpa")] + [("t5", "eager")],
)
def test_transformers_models_are_seen_either_way(name: str, implementation: str) -> None:
    model, inputs, expected = attention_models.transformers_model(name, implementation)
    report = gradflow.inspect(model, inputs)
    assert [(r.name, r.heads) for r in report.trace.attentions] == expected
    assert {r.op for r in report.trace.attentions} == {
        "softmax" if implementation == "eager" else "scaled_dot_product_attention"
    }
    assert min(min(r.entropies) for r in report.trace.attentions) > 0.7
    assert [f for f in report.findings if f.rule == "GF305"] == []


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_both_implementations_have_the_same_entropies(name: str) -> None:
    found = []
    for implementation in ("eager", "sdpa"):
        model, inputs, _ = attention_models.transformers_model(name, implementation)
        found.append([r.entropies for r in gradflow.inspect(model.eval(), inputs).trace.attentions])
    for eager, sdpa in zip(*found, strict=True):
        assert eager == pytest.approx(sdpa, rel=1e-3)


def make_attention(name: str = "attn", order: int = 0, **changes: Any) -> AttentionRecord:
    values: dict[str, Any] = {
        "op": "softmax",
        "call": 0,
        "heads": 4,
        "keys": 64,
        "queries": 64,
        "entropies": (0.9, 0.9, 0.9, 0.9),
        "largest_logit": 3.0,
    }
    return AttentionRecord(order=order, name=name, **(values | changes))


def said(*attentions: AttentionRecord) -> list[Finding]:
    trace = make_trace(layers=make_layers(*dict.fromkeys(a.name for a in attentions)))
    return list(find_rule("GF305").check(replace(trace, attentions=attentions), Config()))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"entropies": (0.05, 0.05, 0.9, 0.9)}, None),
        ({"entropies": (0.05, 0.05, 0.05, 0.9)}, WARNING),
        ({"entropies": (0.1, 0.1, 0.1, 0.9)}, None),
        ({"entropies": (0.02, 0.02, 0.02, 0.02)}, WARNING),
        ({"entropies": (0.019, 0.019, 0.019, 0.9)}, ERROR),
        ({"entropies": (0.019, 0.019, 0.9, 0.9)}, None),
        ({"entropies": (math.nan, math.nan, 0.9, 0.9)}, None),
        ({"entropies": (math.nan,) * 4}, None),
        ({"largest_logit": 100.0}, None),
        ({"largest_logit": 100.1}, WARNING),
        ({"largest_logit": 1000.0}, WARNING),
        ({"largest_logit": 1000.1}, ERROR),
        ({"entropies": (0.05,) * 4, "largest_logit": 2000.0}, ERROR),
    ],
)
def test_both_sides_of_every_limit(changes: dict[str, Any], expected: Severity | None) -> None:
    found = said(make_attention(**changes))
    assert [finding.severity for finding in found] == ([] if expected is None else [expected])


def test_neighbours_are_one_finding() -> None:
    sharp = [make_attention(f"a{k}", k, entropies=(e,) * 4) for k, e in enumerate((0.05, 0.04, 0.9, 0.01))]
    assert [(str(f.location), f.severity) for f in said(*sharp)] == [("a3", ERROR), ("a0–a1", WARNING)]
    assert "the sharpest a1" in said(*sharp)[1].message


class Pooled(nn.Module):
    """Layers of nn.MultiheadAttention with keys that no input has."""

    def __init__(self, depth: int, **options: Any) -> None:
        super().__init__()
        made = [nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options) for _ in range(depth)]
        self.layers = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


OWN_KEYS = "add_bias_kv and add_zero_attn add keys of their own"


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
@pytest.mark.parametrize(
    ("depth", "where"),
    [(1, "layers.0"), (2, "layers.0 and layers.1"), (4, "layers.0, layers.1 and 2 more")],
)
def test_keys_of_its_own_are_said_not_to_be_measured(depth: int, where: str, option: str, steps: int) -> None:
    run = gradflow.inspect(
        Pooled(depth, **{option: True}), (torch.randn(SAMPLES, LENGTH, WIDTH),), energy, steps=steps
    ).trace
    assert run.attentions == ()
    assert [note for note in run.run.notes if "attention" in note] == [
        f"attention not measured in {where}: {OWN_KEYS}"
    ]


def test_measured_attention_has_no_such_note() -> None:
    trace = gradflow.inspect(Pooled(2), (torch.randn(SAMPLES, LENGTH, WIDTH),), energy).trace
    assert len(trace.attentions) == 2
    assert trace.run.notes == ()


def test_a_measured_attention_between_two_that_are_not() -> None:
    model = Pooled(3, add_zero_attn=True)
    model.layers[1] = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    trace = gradflow.inspect(model, (torch.randn(SAMPLES, LENGTH, WIDTH),), energy).trace
    assert [row.name for row in trace.attentions] == ["layers.1"]
    assert trace.run.notes == (f"attention not measured in layers.0 and layers.2: {OWN_KEYS}",)


class Flexible(nn.Module):
    """flex_attention of what asks for no gradient, the only kind it has on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        heads = x.unsqueeze(1)
        return self.head(flex_attention(heads, heads, heads).squeeze(1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_said_not_to_be_measured() -> None:
    trace = gradflow.inspect(Flexible(), (torch.randn(SAMPLES, 16, WIDTH),), energy).trace
    assert trace.attentions == ()
    reason = "flex_attention changes the logits by a function of its own"
    assert trace.run.notes == (f"attention not measured in the model: {reason}",)


ALONE = """
import sys, warnings, torch
import gradflow
from test_attentions import Flexible, energy
warnings.simplefilter("ignore")
assert "torch._dynamo" not in sys.modules, "nothing is shown"
compile = torch.compile
trace = gradflow.inspect(Flexible(), (torch.randn(2, 16, 8),), energy).trace
assert torch.compile is compile
assert torch._dynamo.eval_frame._stance.stance == "default"
print(*trace.run.notes)
"""


def test_flex_attention_runs_where_nothing_was_compiled_before() -> None:
    """It compiles itself at its first call: dynamo comes in while the recording goes on, and may not trace that."""
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "flex_attention" in done.stdout
