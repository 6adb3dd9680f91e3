"""How a block is designed: where it normalises, what bends its sum, where the stream starts anew, its factors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow
from tests import residual_free_zoo as free
from tests import residual_transformers as deep
from tests import residual_zoo as plain
from tests import transformers_zoo as zoo

Build = Callable[[], tuple[nn.Module, Any]]


def sites_of(build: Build) -> pd.DataFrame:
    torch.manual_seed(0)
    return gradflow.inspect(*build()).residuals


PLACEMENTS: dict[str, tuple[Build, str]] = {
    # The block's first op is its norm, and the last op of the branch a linear map or its dropout.
    "GPT-2": (deep.gpt2, "before"),
    "ViT": (plain.vit12, "before"),
    "Pegasus": (deep.pegasus, "before"),
    # LlamaRMSNorm: `hidden * rsqrt(hidden.pow(2).mean(-1) + eps)`, then `weight * hidden`.
    "Llama": (deep.llama, "before"),
    "Mamba": (deep.mamba, "before"),
    # T5LayerNorm, likewise; `layer_norm` stands first in T5LayerSelfAttention, T5LayerCrossAttention and T5LayerFF.
    "T5": (zoo.t5, "before"),
    # One norm for both branches, `ln_attn` and `ln_mlp` for one each: every branch's way starts with one.
    "GPT-J": (zoo.gptj, "before"),
    "Cohere": (deep.cohere, "before"),
    # norm1 owns the scale, the pool mixes: PoolFormer's first branch has no weight layer to reach.
    "PoolFormer": (plain.poolformer, "before"),
    # bn1 and a ReLU come first; with a projection the shortcut starts after them, and they are the block's still.
    "pre-activation ResNet-18": (plain.preact_resnet18, "before"),
    "nn.TransformerEncoder, pre-norm": (partial(plain.encoder, norm_first=True), "before"),
    # LayerNorm(dropout(dense(h)) + input): the sum is read by its norm and by nothing else.
    "BERT": (deep.bert, "after"),
    "ALBERT": (zoo.albert, "after"),
    "DistilBERT": (deep.distilbert, "after"),
    "XLNet": (deep.xlnet, "after"),
    "BART": (zoo.bart, "after"),
    "nn.TransformerDecoder, post-norm": (partial(plain.decoder, norm_first=False), "after"),
    # `residual + post_attention_layernorm(attention)`: no norm before.
    "OLMo 2": (deep.olmo2, "end"),
    # `shortcut + drop_path(layernorm_before(attention))`.
    "Swin V2": (deep.swinv2, "end"),
    # bn2 is the last op of the branch; the downsample's norm stands on the skip.
    "ResNet-18": (plain.resnet18, "end"),
    "ResNet-50": (plain.resnet50, "end"),
    "MobileNetV2": (plain.mobilenet_v2, "end"),
    # input_layernorm before and post_attention_layernorm after each sublayer, both in plain ops.
    "Gemma2": (deep.gemma2, "both"),
    "Gemma3": (deep.gemma3, "both"),
    # The depthwise convolution comes before the norm.
    "ConvNeXt": (partial(plain.convnext, grn=False), "inside"),
    "LoRA": (free.lora, "none"),
    "Highway": (free.highway, "none"),
    "DenseNet": (free.densenet, ""),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_norm_is_placed_where_the_forward_places_it(name: str) -> None:
    build, expected = PLACEMENTS[name]
    sites = sites_of(build)
    assert set(sites.norm_placement) == {expected}, sites[
        ["name", "norm_placement", "branch_ops"]
    ].to_string()


def test_a_branch_whose_norm_is_left_out_is_told_apart() -> None:
    """ModernBertEncoderLayer: `attn_norm` of the first layer is an Identity, for the embedding is normalised."""
    assert list(sites_of(deep.modernbert).norm_placement) == ["none", "before", "before", "before"]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (plain.resnet18, {"relu"}),  # `self.relu(out)` in place
        (zoo.resnet, {"relu"}),
        (plain.preact_resnet18, {""}),  # the next block's norm reads the sum, and its skip does
        (plain.mobilenet_v2, {""}),  # linear bottlenecks
        (deep.gpt2, {""}),
        (deep.bert, {""}),
    ],
    ids=["ResNet-18", "ResNet (transformers)", "pre-activation", "MobileNetV2", "GPT-2", "BERT"],
)
def test_the_activation_after_the_add_is_named(build: Build, expected: set[str]) -> None:
    assert set(sites_of(build).activation_after) == expected


RESETS: dict[str, tuple[Build, list[bool]]] = {
    # The first block of stages 2 to 4 projects; stage 1 starts on the stem's stream.
    "ResNet-18": (plain.resnet18, [False, False] + [True, False] * 3),
    # Two stages of 2 and 3 blocks, a 2x2 convolution without a skip between them.
    "ConvNeXt": (partial(plain.convnext, grn=False), [False, False, True, False, False]),
    # 2 stages of 2 blocks, two adds each; patch merging is a linear map.
    "Swin": (zoo.swin, [False] * 4 + [True] + [False] * 3),
    "GPT-2": (deep.gpt2, [False] * 8),
    # Norms between the blocks change the scale of a stream, and do not start one.
    "BERT": (deep.bert, [False] * 8),
    # The decoder's stream begins with its own tokens.
    "T5": (zoo.t5, [False] * 10),
}


@pytest.mark.parametrize("name", RESETS)
def test_a_stream_starts_anew_at_a_projection_and_after_a_down_sampling(name: str) -> None:
    build, expected = RESETS[name]
    assert list(sites_of(build).resets_stream) == expected


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (plain.resnet50, {"", "1x1;norm"}),
        (plain.cifar_resnet20, {"", "slice;pad"}),
        (plain.preact_resnet18, {"", "1x1"}),
        (free.highway, {"gate"}),
        (free.hyper_connected, {"mix"}),
        (free.lora, {"linear"}),
    ],
    ids=["ResNet-50", "option A", "pre-activation", "Highway", "hyper-connections", "LoRA"],
)
def test_what_the_shortcut_does_is_told(build: Build, words: set[str]) -> None:
    assert set(sites_of(build).shortcut) == words


class Block(nn.Module):
    """One block, as written; ``then`` is what follows it."""

    def __init__(self, write: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.f = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.gate, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.alpha, self.gamma = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.rand(6))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.write(self, self.stem(x)))


def block(write: Callable[[Block, Tensor], Tensor]) -> pd.DataFrame:
    return sites_of(lambda: (Block(write), (torch.randn(4, 6),)))


def kept(f: Tensor, keep: float = 0.75) -> Tensor:
    """Stochastic depth."""
    return f / keep * f.new_empty(len(f), 1).bernoulli_(keep)


def length_norm(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / torch.sqrt(x.var(1, keepdim=True, correction=0) + 1e-5)


@pytest.mark.parametrize(
    ("write", "factors"),
    [
        (lambda m, x: x + m.f(x), ""),
        (lambda m, x: x + 0.1 * m.f(x), "number"),
        (lambda m, x: x + m.f(x) / 4, "number"),
        (lambda m, x: x + m.alpha * m.f(x), "scalar"),
        (lambda m, x: x + m.gamma * m.f(x), "channels"),
        (lambda m, x: x + kept(m.f(x)), "mask;number"),
        (lambda m, x: x + kept(m.gamma * m.f(x)), "mask;number;channels"),
        (lambda m, x: x + torch.sigmoid(m.gate(x)) * m.f(x), "gate"),
        # A norm's own weight is no factor, one that follows it is.
        (lambda m, x: x + m.norm(m.f(x)), ""),
        (lambda m, x: x + m.gamma * length_norm(m.f(x)), ""),
        (lambda m, x: x + 0.5 * (m.gamma * length_norm(m.f(x))), "number"),
    ],
)
def test_the_factors_on_a_branch_are_told_apart(
    write: Callable[[Block, Tensor], Tensor], factors: str
) -> None:
    assert list(block(write).branch_factors) == [factors]


@pytest.mark.parametrize(
    ("write", "placement"),
    [
        (lambda m, x: x + m.f(length_norm(x)), "before"),
        (lambda m, x: x + m.f(layer_norm(x)), "before"),
        (lambda m, x: x + m.f(F.normalize(x)), "before"),
        (lambda m, x: x + layer_norm(m.f(x)), "end"),
        (lambda m, x: x + m.f[2](layer_norm(m.f[0](x))), "inside"),
        # The softmax divides by a sum, global response normalisation by a mean of lengths: no norms.
        (lambda m, x: x + m.f(x.exp() / x.exp().sum(1, keepdim=True)), "none"),
        (lambda m, x: x + m.f(x * (x.norm(dim=0) / x.norm(dim=0).mean())), "none"),
        # Only one of two parallel branches starts with a norm.
        (lambda m, x: x + (m.f(m.norm(x)) + torch.tanh(m.gate(x))), "none"),
        # A final norm is nobody's.
        (lambda m, x: m.norm(x + m.f(x)), "none"),
    ],
)
def test_norms_in_plain_ops_count(write: Callable[[Block, Tensor], Tensor], placement: str) -> None:
    assert list(block(write).norm_placement) == [placement]


def test_a_stream_that_goes_on_from_a_norm_is_post_norm() -> None:
    sites = block(lambda m, x: (lambda y: y + m.f(y))(torch.relu(layer_norm(x + m.f(x)))))
    assert list(sites.norm_placement) == ["none", "none"]  # the ReLU's output is the second block's source
    sites = block(lambda m, x: (lambda y: y + m.f(y))(layer_norm(x + m.f(x))))
    assert list(sites.norm_placement) == ["after", "none"]


def test_only_an_activation_that_reads_the_sum_alone_counts() -> None:
    assert list(block(lambda m, x: torch.relu(x + m.f(x))).activation_after) == ["relu"]
    assert list(block(lambda m, x: (lambda y: y + torch.relu(y))(x + m.f(x))).activation_after) == [""]
