"""Which tensors an output holds, and under which path."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from gradflow.recording.leaves import floating_leaves, tensor_leaves

X, Y, IDS = torch.zeros(2, 3), torch.ones(2), torch.arange(3)
Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Out:
    logits: Any
    loss: Any = None


class DynamicCache:
    def __init__(self) -> None:
        self.key = X


cyclic: dict[str, Any] = {"x": X}
cyclic["self"] = cyclic


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        (X, [""]),
        (None, []),
        ("text", []),
        (3.0, []),
        ((X, None, Y), ["0", "2"]),
        ([X, [Y, (X,)]], ["0", "1.0", "1.1.0"]),
        ({"logits": X, "hidden_states": (X, Y)}, ["logits", "hidden_states.0", "hidden_states.1"]),
        ({0: X, "a": None}, ["0"]),
        (Pair(X, {"k": Y}), ["first", "second.k"]),
        (Out(X), ["logits"]),
        (Out({"a": X}, loss=Y), ["logits.a", "loss"]),
        (SimpleNamespace(x=X, n=3, parts=[X, Y], deep=SimpleNamespace(x=X)), ["x", "parts.0", "parts.1"]),
        (torch.distributions.Normal(X, torch.ones(2, 3)), ["loc", "scale"]),
        (pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)]), ["data"]),
        ((X, DynamicCache()), ["0"]),
        ((X, nn.Linear(2, 2)), ["0"]),
        (X.to_sparse(), [""]),
    ],
)
def test_paths(value: Any, paths: list[str]) -> None:
    assert [path for path, _ in tensor_leaves(value)] == paths


def test_a_leaf_is_the_very_tensor() -> None:
    ((_, lone),) = tensor_leaves(X)
    assert lone is X
    assert dict(tensor_leaves({"a": [X, Y]}))["a.1"] is Y


def test_a_cycle_ends() -> None:
    assert len(tensor_leaves(cyclic)) < 100


def test_integer_leaves_carry_no_gradient() -> None:
    complex_leaf = torch.zeros(2, dtype=torch.complex64)
    assert [path for path, _ in floating_leaves((X, IDS, complex_leaf))] == ["0", "2"]
