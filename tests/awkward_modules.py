"""Awkward modules of torch itself: fused paths, checkpoints, recurrence, parametrizations, compilation."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from awkward import Case, batch_of, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint
from witness import layer_row, missing, parameter_row

import gradflow

Built = tuple[nn.Module, Any]


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@seeded
def checkpoint_reentrant() -> Built:
    return Checkpointed(reentrant=True), (batch_of(8),)


@seeded
def checkpoint_saved_tensors() -> Built:
    return Checkpointed(reentrant=False), (batch_of(8),)


def checkpoint_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = module.stem(x)
    tensors = {"stem": x}
    for index, block in enumerate(module.blocks):
        tensors[f"blocks.{index}.0"] = block[0](x)
        tensors[f"blocks.{index}.1"] = x = torch.tanh(tensors[f"blocks.{index}.0"])
    return x, tensors


def checkpoint_check(report: gradflow.Report) -> None:
    rows = report.layers[report.layers.name.str.startswith("blocks.")]
    assert sorted(rows.name) == [f"blocks.{block}.{part}" for block in range(3) for part in range(2)]


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


@seeded
def multihead_attention() -> Built:
    return Attends(), (batch_of(5, 8),)


def attend(attention: Any, x: Tensor) -> Tensor:
    """What ``nn.MultiheadAttention`` computes, by hand, for batch-first self-attention with two heads."""
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = projected.view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
    return attention.out_proj((scores @ value).transpose(1, 2).flatten(2))


def multihead_attention_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    mixed = attend(module.attention, x)
    out = module.head(mixed)
    return out, {"attention:0": mixed, "head": out, "": out}


def multihead_attention_check(report: gradflow.Report) -> None:
    assert missing(layer_row(report, "attention.out_proj").gradient_norm)
    assert parameter_row(report, "attention.out_proj.weight").coverage == "measured"
    assert [f for f in report.findings if "out_proj" in str(f.location)] == []


class Encoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


@seeded
def encoder_in_eval() -> Built:
    return Encoded().eval(), (batch_of(5, 8),)


@seeded
def encoder_frozen() -> Built:
    """Nothing asks for a gradient before the head, so torch would take its fused path."""
    model = Encoded().eval()
    model.encoder.requires_grad_(False)
    return model, (batch_of(5, 8),)


def encoder_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    tensors = {}
    for index, layer in enumerate(module.encoder.layers):
        attended = attend(layer.self_attn, x)
        x = layer.norm1(x + attended)
        first = layer.linear1(x)
        second = layer.linear2(F.relu(first))
        tensors |= {f"encoder.layers.{index}.norm1": x, f"encoder.layers.{index}.linear1": first}
        x = layer.norm2(x + second)
        tensors |= {f"encoder.layers.{index}.linear2": second, f"encoder.layers.{index}.norm2": x}
    out = module.head(x)
    return out, tensors | {"head": out, "": out}


def frozen_encoder_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out, tensors = encoder_twin(module, x)
    return out, {"head": tensors["head"]}


class PackedLSTM(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.recurrent = kind(8, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(
            self.embedding(ids), lengths, batch_first=True, enforce_sorted=False
        )
        states, _ = rnn.pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        return self.head(states)


LENGTHS = (5, 2, 3, 5, 1, 4)


@seeded
def packed_lstm() -> Built:
    return PackedLSTM(nn.LSTM), (torch.randint(0, 11, (6, 5)), torch.tensor(LENGTHS))


@seeded
def packed_gru() -> Built:
    return PackedLSTM(nn.GRU), (torch.randint(0, 11, (6, 5)), torch.tensor(LENGTHS))


def packed_twin(module: Any, ids: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    embedded = module.embedding(ids)
    packed = rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
    states = module.recurrent(packed)[0]
    out = module.head(rnn.pad_packed_sequence(states, batch_first=True)[0])
    return out, {"embedding": embedded, "recurrent:0.data": states.data, "head": out, "": out}


@seeded
def parametrised() -> Built:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 2))
    return model, (batch_of(8),)


def parametrised_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    parts = module[0].parametrizations.weight
    rows = parts.original1.square().sum(1, keepdim=True).sqrt()
    first = F.linear(x, parts.original0 * parts.original1 / rows, module[0].bias)
    out = module[2](torch.tanh(first))
    return out, {"0": first, "2": out, "": out}


class LazyIdentity(nn.LazyLinear):
    """A lazy layer whose first values do not depend on a generator."""

    def reset_parameters(self) -> None:
        if self.bias is not None and not self.has_uninitialized_params():
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)


@seeded
def lazy() -> Built:
    return nn.Sequential(LazyIdentity(5), nn.Tanh(), nn.Linear(5, 2)), (batch_of(8),)


def lazy_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    first = module[0](x)
    out = module[2](torch.tanh(first))
    return out, {"0": first, "2": out, "": out}


@seeded
def compiled() -> Built:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    return torch.compile(model, backend="eager"), (batch_of(8),)


@seeded
def compiled_in_part() -> Built:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].compile(backend="eager")
    return model, (batch_of(8),)


def compiled_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    first = F.linear(x, module[0].weight, module[0].bias)
    hidden = torch.tanh(first)
    out = module[2](hidden)
    return out, {"0": first, "1": hidden, "2": out, "": out}


def compiled_check(report: gradflow.Report) -> None:
    notes = " ".join(report.trace.run.notes)
    assert "torch.compile" in notes
    assert "eager" in notes


class Stateful(nn.Module):
    """Changes everything a forward may change: running statistics, a counter, a cache, three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.cache: dict[str, Tensor] = {}
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(()) + random.random() + np.random.rand()
        self.seen += 1
        self.steps += 1
        out = self.norm(self.layer(x))
        self.cache["last"] = out
        self.latest = noise
        return out


@seeded
def stateful() -> Built:
    model = Stateful()
    model.norm.train(False)
    model.layer.weight.grad = torch.full_like(model.layer.weight, 0.25)
    return model, (batch_of(8),)


def stateful_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    layer = module.layer(x)
    out = module.norm(layer)
    return out, {"layer": layer, "norm": out, "": out}


def unwrapped(module: Any) -> nn.Module:
    return module._orig_mod.double()


CASES: tuple[Case, ...] = (
    Case(
        name="re-entrant checkpoint", build=checkpoint_reentrant, twin=checkpoint_twin, check=checkpoint_check
    ),
    Case(
        name="checkpoint",
        build=checkpoint_saved_tensors,
        twin=checkpoint_twin,
        check=checkpoint_check,
    ),
    Case(
        name="MultiheadAttention",
        build=multihead_attention,
        twin=multihead_attention_twin,
        coverage={"attention.out_proj": "bypassed", "attention:0": "measured", "attention:1": "no grad"},
        check=multihead_attention_check,
    ),
    Case(name="TransformerEncoder in eval", build=encoder_in_eval, twin=encoder_twin),
    Case(
        name="TransformerEncoder frozen",
        build=encoder_frozen,
        twin=frozen_encoder_twin,
        coverage={"encoder.layers.0.norm1": "frozen", "encoder.layers.1.linear2": "frozen"},
    ),
    Case(
        name="packed LSTM",
        build=packed_lstm,
        twin=packed_twin,
        coverage={"recurrent:0.data": "measured", "recurrent:1.0": "no grad", "recurrent:1.1": "no grad"},
    ),
    Case(name="packed GRU", build=packed_gru, twin=packed_twin, coverage={"recurrent:1": "no grad"}),
    Case(name="weight norm", build=parametrised, twin=parametrised_twin),
    Case(name="lazy", build=lazy, twin=lazy_twin),
    Case(name="compiled", build=compiled, twin=compiled_twin, check=compiled_check, widen=unwrapped),
    Case(name="compiled in part", build=compiled_in_part, twin=compiled_twin, check=compiled_check),
    Case(name="stateful", build=stateful, twin=stateful_twin),
)
