"""Attention as it runs: how sharp each head is, and how large its logits are.

A fused kernel never shows its weights, so the logits of a sample of queries are computed again from what the
kernel is given; an explicit softmax over the product of two tensors of data is looked at itself. Only a few
queries are: what attention costs grows with their number, and the statistics do not need them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradflow.recording.dataflow import Dataflow, Node
from gradflow.recording.residual_ops import ADD_OPS, SCALE_OPS, VALUE_OPS, data_inputs
from gradflow.recording.tensor_stats import is_transformed
from gradflow.recording.transfers import listed
from gradflow.recording.weight_ops import LINEAR_OPS
from gradflow.trace_model import AttentionRecord

FUSED = "scaled_dot_product_attention"
MULTI_HEAD = "multi_head_attention_forward"
SOFTMAX = "softmax"
FLEX = "flex_attention"
ATTENTION_CALLS = frozenset({FUSED, MULTI_HEAD, SOFTMAX, FLEX})
SAMPLES = 2
"""So many samples of the batch are looked at."""
LOGITS = 131_072
"""And so many queries of each that there are about this many logits in all,"""
FEWEST_QUERIES, MOST_QUERIES = 4, 64
"""though never fewer, nor more, than these."""
MASKED = -9_000.0
"""An explicit softmax hides a key by a logit below this: masks add -10,000 or the type's smallest number."""
_NAMED = 2
"""So many modules a note names."""
_FARTHEST = 32
"""So many nodes back the product is looked for."""
_PRODUCTS = LINEAR_OPS - {"linear", "bilinear"}
_BENT = "sub masked_fill masked_fill_ where tanh clamp nan_to_num maximum max tril __setitem__ pad cat"
_CARRIED = VALUE_OPS | SCALE_OPS | ADD_OPS | frozenset(_BENT.split())
"""What may stand between the product and the softmax: scales, masks, biases, caps."""
_FUSED_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_MULTI_HEAD = """
query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p
out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight
q_proj_weight k_proj_weight v_proj_weight
"""
_MULTI_HEAD_NAMES = tuple(_MULTI_HEAD.split())
_NAMES = {
    FUSED: _FUSED_NAMES,
    MULTI_HEAD: _MULTI_HEAD_NAMES,
    SOFTMAX: ("input", "dim"),
    FLEX: ("query", "key", "value"),
}
_OWN_KEYS = "add_bias_kv and add_zero_attn add keys of their own"
_OWN_SCORES = "flex_attention changes the logits by a function of its own"


@dataclass(slots=True)
class _Seen:
    op: str
    heads: int
    keys: int
    queries: int
    """Looked at, of each sample and head."""
    numbers: Tensor
    """The normalised entropy of each head, then the largest logit; NaN where no query sees two keys."""
    node: Node | None = None


@dataclass(frozen=True, slots=True)
class _Logits:
    """A sample of logits as [samples, heads, queries, keys]."""

    values: Tensor
    visible: Tensor | None
    """Which keys each query sees; None for all."""
    largest: Tensor


class AttentionRecorder:
    """Watches the attention of a step.

    Args:
        batch_size: N, to tell samples from heads where a tensor has both in one dimension.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._pending: _Seen | None = None
        self._reason = ""
        self._seen: list[_Seen] = []
        self._unmeasured: dict[str, dict[str, None]] = {}
        """By reason, the modules whose attention was not measured, in execution order."""

    def attach(self, dataflow: Dataflow) -> None:
        """Say whose nodes to ask."""
        self._dataflow = dataflow

    def before(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        """Look at what attention is given."""
        self._pending = None
        names = _NAMES[op]
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        self._reason = _why_not(op, given)
        first = given.get(names[0])
        if self._reason or not isinstance(first, Tensor) or not _is_readable(first):
            return
        if op == SOFTMAX:
            if not self._is_attention(first, given.get("dim")):
                return
        elif not _is_readable(given.get("key")):
            return
        with (
            torch._C.DisableTorchFunction(),
            torch.no_grad(),
            torch.autocast(first.device.type, enabled=False),
        ):
            logits = self._logits(op, given)
            if logits is not None:
                self._pending = _measured(op, logits)

    def after(self, node: Node) -> None:
        """Note which node attention made."""
        if self._reason:
            self._unmeasured.setdefault(self._reason, {})[node.module] = None
            return
        seen, self._pending = self._pending, None
        if seen is not None and seen.op == node.op:
            seen.node = node
            self._seen.append(seen)

    def records(self) -> tuple[AttentionRecord, ...]:
        """Freeze what was seen, in execution order; where no query sees two keys there is nothing to say."""
        calls: dict[str, int] = {}
        found: list[AttentionRecord] = []
        for seen, numbers in zip(self._seen, listed([seen.numbers for seen in self._seen]), strict=True):
            name = "" if seen.node is None else seen.node.module
            call = calls[name] = calls.get(name, -1) + 1
            if all(math.isnan(entropy) for entropy in numbers[:-1]):
                continue
            found.append(
                AttentionRecord(
                    order=len(found),
                    name=name,
                    op=seen.op,
                    call=call,
                    heads=seen.heads,
                    keys=seen.keys,
                    queries=seen.queries,
                    entropies=tuple(numbers[:-1]),
                    largest_logit=numbers[-1],
                )
            )
        return tuple(found)

    def notes(self) -> tuple[str, ...]:
        """Which attention was not measured, and why: a sentence for each reason."""
        return tuple(
            f"attention not measured in {_listing(list(names))}: {reason}"
            for reason, names in self._unmeasured.items()
        )

    def _is_attention(self, value: Tensor, dim: Any) -> bool:
        """Tell whether a softmax is over the keys: the last dimension of a product of two tensors of data."""
        if value.dim() < 3 or dim not in (-1, value.dim() - 1) or value.shape[-1] < 2:
            return False
        nodes, node = self._dataflow.nodes, self._dataflow.node_of(value)
        waiting = [] if node is None else [node.index]
        looked_at: set[int] = set()
        while waiting and len(looked_at) < _FARTHEST:
            index = waiting.pop()
            if index in looked_at:
                continue
            looked_at.add(index)
            inputs = data_inputs(nodes[index], nodes)
            if nodes[index].op in _PRODUCTS and len(inputs) > 1:
                return True
            if nodes[index].op in _CARRIED:
                waiting.extend(inputs)
        return False

    def _logits(self, op: str, given: dict[str, Any]) -> _Logits | None:
        if op == SOFTMAX:
            return _of_softmax(self._with_heads(given["input"]))
        if op == MULTI_HEAD:
            return _of_multi_head(given)
        query, key = self._with_heads(given["query"]), self._with_heads(given["key"])
        mask = given.get("attn_mask")
        if mask is not None and mask.dim() >= 2:
            wide = torch.broadcast_to(mask, (*given["query"].shape[:-1], given["key"].shape[-2]))
            mask = self._with_heads(wide)
        return _of_fused(query, key, mask, bool(given.get("is_causal")), given.get("scale"))

    def _with_heads(self, value: Tensor) -> Tensor:
        """A tensor as [samples, heads, rows, columns]; samples and heads may come in one dimension."""
        if value.dim() < 3:
            return value.reshape(1, 1, *value.shape[-2:])
        if value.dim() == 3:
            lead = value.shape[0]
            heads = lead // self._batch_size if self._batch_size and lead % self._batch_size == 0 else 1
            return value.reshape(-1, heads, *value.shape[1:])
        return value.flatten(0, -4)


def _why_not(op: str, given: dict[str, Any]) -> str:
    """Why this attention is not measured; "" where it is, or where there is nothing to measure."""
    if op == FLEX:
        return _OWN_SCORES
    own = op == MULTI_HEAD and (given.get("bias_k") is not None or given.get("add_zero_attn"))
    return _OWN_KEYS if own else ""


def _listing(names: Sequence[str]) -> str:
    """ "a, b and 3 more"; the root goes by what it is."""
    shown = [name or "the model" for name in names[:_NAMED]]
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    *first, last = [*shown, *more]
    return f"{', '.join(first)} and {last}" if first else last


def _is_readable(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() >= 2
        and value.numel() > 0
        and value.is_floating_point()
        and value.layout is torch.strided
        and not value.is_meta
        and not value.is_nested
        and not is_transformed(value)
    )


def _rows(samples: int, heads: int, queries: int, keys: int) -> tuple[slice, slice]:
    """Which samples and which queries to look at; the last query, which may see most keys, among them."""
    sample_step = max(1, samples // SAMPLES)
    wanted = LOGITS // max(1, min(samples, SAMPLES) * heads * keys)
    step = math.ceil(queries / max(FEWEST_QUERIES, min(wanted, MOST_QUERIES)))
    return slice(0, sample_step * SAMPLES, sample_step), slice((queries - 1) % step, None, step)


def _of_fused(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: Any) -> _Logits | None:
    """Of scaled_dot_product_attention; queries and keys are [samples, heads, positions, features]."""
    samples, heads, queries, features = query.shape
    keys = key.shape[2]
    picked, rows = _rows(samples, heads, queries, keys)
    q, k = query[picked, :, rows].float(), key[picked].float()
    if heads % k.shape[1]:
        return None
    k = k.repeat_interleave(heads // k.shape[1], 1) if k.shape[1] != heads else k
    logits = q @ k.mT * (features**-0.5 if scale is None else scale)
    visible = None
    if causal:
        positions = torch.arange(queries, device=q.device)[rows].unsqueeze(1)
        visible = (torch.arange(keys, device=q.device) <= positions).expand_as(logits)
    return _masked(logits, visible, None if mask is None else mask[picked, :, rows])


def _masked(logits: Tensor, visible: Tensor | None, mask: Tensor | None) -> _Logits:
    """Add a mask: a boolean one is True for what is seen, any other is added to the logits."""
    values = logits
    if mask is not None:
        seen = mask if mask.dtype is torch.bool else mask > MASKED
        values = logits if mask.dtype is torch.bool else logits + mask.float()
        visible = seen if visible is None else visible & seen
    shown = logits if visible is None else logits.masked_fill(~visible, 0)
    return _Logits(values, visible, shown.abs().amax())


def _of_softmax(value: Tensor) -> _Logits:
    picked, rows = _rows(*value.shape)
    values = value[picked, :, rows].float()
    visible = values > MASKED
    # A mask of -100 is in use too: what stands far below 0 may be one.
    return _Logits(values, visible, values.amax())


def _of_multi_head(given: dict[str, Any]) -> _Logits:
    """Of nn.MultiheadAttention: [positions, samples, features], and masks that are True for what is hidden."""
    query, key, heads = given["query"], given["key"], given["num_heads"]
    if query.dim() == 2:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
    queries, samples, width = query.shape
    keys = key.shape[0]
    picked, rows = _rows(samples, heads, queries, keys)
    weights, biases = _input_projections(given)
    q = F.linear(query[rows, picked].float(), weights[0], biases[0])
    k = F.linear(key[:, picked].float(), weights[1], biases[1])
    q, k = (part.reshape(*part.shape[:2], heads, -1).permute(1, 2, 0, 3) for part in (q, k))
    logits = q @ k.mT * (width // heads) ** -0.5
    visible, mask = None, given.get("attn_mask")
    if mask is not None:
        wide = (
            mask.reshape(-1, heads, *mask.shape[1:])
            if mask.dim() == 3
            else mask.expand(samples, heads, *mask.shape)
        )
        mask = wide[picked, :, rows]
        mask = ~mask if mask.dtype is torch.bool else mask
    hidden = given.get("key_padding_mask")
    if hidden is not None:
        hidden = hidden.reshape(-1, keys)[picked, None, None]
        visible = (~hidden if hidden.dtype is torch.bool else hidden > MASKED).expand_as(logits)
    return _masked(logits, visible, mask)


def _input_projections(given: dict[str, Any]) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Weights and biases that make queries and keys, in single precision."""
    if given.get("use_separate_proj_weight"):
        weights = (given["q_proj_weight"], given["k_proj_weight"])
    else:
        weights = given["in_proj_weight"].chunk(3)[:2]
    bias = given.get("in_proj_bias")
    biases = (None, None) if bias is None else tuple(part.float() for part in bias.chunk(3)[:2])
    return tuple(weight.float() for weight in weights), biases


def _measured(op: str, logits: _Logits) -> _Seen:
    """H of each row over the logarithm of how many keys it sees, averaged over the rows that see two or more."""
    values, visible = logits.values, logits.visible
    _, heads, queries, keys = values.shape
    if visible is None:
        entropy = torch.special.entr(values.softmax(3)).sum(3) / math.log(max(keys, 2))
        by_head = entropy.mean((0, 2)) if keys > 1 else torch.full_like(entropy[0, :, 0], math.nan)
    else:
        count = visible.sum(3)
        chances = values.masked_fill(~visible, -math.inf).softmax(3).nan_to_num_(0.0)
        entropy = torch.special.entr(chances).sum(3) / count.clamp_min(2).log()
        counted = count > 1
        by_head = (entropy * counted).sum((0, 2)) / counted.sum((0, 2))
    return _Seen(op, heads, keys, queries, torch.cat((by_head, logits.largest.reshape(1))))
