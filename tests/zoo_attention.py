"""The pair whose attention looks at one token only: A1 of the zoo."""

from __future__ import annotations

from collections.abc import Callable

import torch
import zoo_networks as networks
from torch import nn
from torch.nn import functional as F
from zoo import Built, Case
from zoo_residual import Stack

from gradflow.findings import Severity


def sharp(factor: float) -> Callable[..., Built]:
    """Pre-norm blocks over 64 tokens with unit-variance queries and keys, their logits ``factor`` times larger."""

    def build(seed: int, width: int = 64, depth: int = 4) -> Built:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 64, width, generator=generator)
        labels = torch.randint(0, 10, (8 * 64,), generator=generator)
        blocks = [networks.TransformerBlock(width, causal=False, pre_norm=True) for _ in range(depth)]
        for block in blocks:
            queries_and_keys = block.attention.qkv.weight[: 2 * width]
            nn.init.normal_(queries_and_keys, std=width**-0.5)
            with torch.no_grad():
                queries_and_keys[:width] *= factor
        model = Stack(nn.Linear(width, width), blocks, width)
        return model, (x,), lambda logits, _: F.cross_entropy(logits.flatten(0, 1), labels)

    return build


FAULTY: tuple[Case, ...] = (
    # Logits of standard deviation 15: five times what decides between 64 keys, sqrt(2 ln 64) = 2.9.
    Case(
        name="A1a",
        build=sharp(15.0),
        rule="GF305",
        severity=Severity.WARNING,
        region="blocks",
        exactly=True,
    ),
    # One-hot, and logits beyond 1e3.
    Case(name="A1b", build=sharp(400.0), rule="GF305", severity=Severity.ERROR, region="blocks"),
)
