"""Residual sites of twenty-six architectures of ``transformers``: kinds, design and nesting, argued from their forward.

Every number is read off the class's own ``forward`` (named in the comment), with the depths of the configuration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

import gradflow
from tests import residual_transformers as deep
from tests import transformers_zoo as zoo

transformers_logging.set_verbosity_error()


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a model must have.

    ``placements`` counts where sites normalise, ``factors`` what stands last on their branches; sites that are not
    named have none. ``nested`` counts sites within another's branch, ``resets`` those where a stream starts anew.
    """

    build: Callable[[], tuple[nn.Module, Any]]
    kinds: Mapping[str, int]
    placements: Mapping[str, int]
    branches: int = 1
    factors: Mapping[str, int] = field(default_factory=dict)
    nested: int = 0
    resets: int = 0


def plain(build: Callable[[], tuple[nn.Module, Any]], sites: int, placement: str, **more: Any) -> Row:
    """Identity sites of one design."""
    return Row(build=build, kinds={"identity": sites}, placements={placement: sites}, **more)


ROWS = {
    # GPTJBlock, 2 of them: `attn_output + feed_forward_hidden_states + residual`, both from `ln_1(hidden_states)`.
    "GPT-J": plain(zoo.gptj, 2, "before", branches=2),
    # GPTNeoXLayer with use_parallel_residual: `mlp_output + attn_output + hidden_states`, a norm for each branch.
    "GPT-NeoX": plain(zoo.gpt_neox, 2, "before", branches=2),
    # FalconDecoderLayer with parallel_attn: `mlp_output += attention_output`, then dropout_add(mlp_output, residual).
    "Falcon": plain(zoo.falcon, 2, "before", branches=2),
    # FalconDecoderLayer without: dropout_add after attention and after the MLP, 2 layers.
    "Falcon, sequential": plain(deep.falcon_sequential, 4, "before"),
    # Gemma2DecoderLayer, 4: input_layernorm and post_attention_layernorm around the attention,
    # pre_feedforward_layernorm and post_feedforward_layernorm around the MLP. The weight that Gemma2RMSNorm ends
    # with, `output * (1 + weight)`, is the norm's.
    "Gemma2": plain(deep.gemma2, 8, "both"),
    # MixtralDecoderLayer, 2: `residual + hidden_states` twice. Experts are gathered with index_add_: no stream.
    "Mixtral": plain(zoo.mixtral, 4, "before"),
    # Mamba2Block, 4: `residual + mixer(norm(hidden))`. The mixer's D-skip `y + D_residual` adds to a scan that is
    # made of einsum-like products of its own input with B, C and dt: no weight layer lies between.
    "Mamba2": plain(deep.mamba2, 4, "before"),
    # RwkvBlock, 4: `hidden + attention` ends in a linear map; `hidden + feed_forward` in `receptance * value`.
    "RWKV": plain(deep.rwkv, 8, "before", factors={"gate": 4}),
    # WhisperEncoderLayer, 2 x 2 adds, WhisperDecoderLayer, 2 x 3; a norm heads each.
    "Whisper": plain(zoo.whisper, 10, "before"),
    # T5LayerSelfAttention, T5LayerCrossAttention and T5LayerFF: `hidden + dropout(...)` after `layer_norm(hidden)`.
    "T5": plain(zoo.t5, 10, "before"),
    # ConvNextV2Layer, depths 2+2: `residual + drop_path(x)`, dwconv before the norm. GRN replaced LayerScale. The
    # second stage starts with a norm and a strided convolution without a skip.
    "ConvNeXtV2": plain(zoo.convnext_v2, 4, "inside", resets=1),
    # SwinLayer, depths 2+2: `shortcut + drop_path(windows)` and `hidden + output`. Stochastic depth rises from 0 in
    # block 0 and drops the attention branch of the three others; patch merging is a linear map.
    "Swin": plain(zoo.swin, 8, "before", factors={"mask;number": 3}, resets=1),
    # SegformerLayer, depths 2+2: drop_path on both branches, 0 in the first block; the second stage's overlapping
    # patch embedding is a convolution.
    "SegFormer": plain(zoo.segformer, 8, "before", factors={"mask;number": 6}, resets=1),
    # CohereDecoderLayer, 2: `residual + hidden_states_attention + hidden_states_mlp`, one norm in plain ops.
    "Cohere": plain(deep.cohere, 2, "before", branches=2),
    # PhiDecoderLayer, 2: `attn_outputs + feed_forward_hidden_states + residual`.
    "Phi": plain(deep.phi, 2, "before", branches=2),
    # StableLmDecoderLayer, 2, either way: `residual + self_attn_output + mlp_output`, or one add after the other.
    "StableLM, parallel": plain(partial(deep.stablelm, parallel=True), 2, "before", branches=2),
    "StableLM": plain(partial(deep.stablelm, parallel=False), 4, "before"),
    # CodeGenBlock, 2: `attn_outputs + feed_forward_hidden_states + residual`.
    "CodeGen": plain(deep.codegen, 2, "before", branches=2),
    # NemotronDecoderLayer, 2 x 2 adds; NemotronLayerNorm1P calls F.layer_norm with `weight + 1`.
    "Nemotron": plain(deep.nemotron, 4, "before"),
    # MptBlock, 2: `dropout(attn_outputs) + residual`; the second add is in MptMLP, `output + residual`.
    "MPT": plain(deep.mpt, 4, "before"),
    # Olmo2DecoderLayer, 2: `residual + post_attention_layernorm(attention)`, the same for the MLP; none before.
    "OLMo 2": plain(deep.olmo2, 4, "end"),
    # XLNetRelativeAttention.post_attention and XLNetFeedForward, 4 layers: `layer_norm(output + inp)`.
    "XLNet": plain(deep.xlnet, 8, "after"),
    # PoolFormerLayer, depths 2+2: `hidden + drop_path(layer_scale_1 * output)`, and so the MLP.
    "PoolFormer": plain(zoo.poolformer, 8, "before", factors={"channels": 8}, resets=1),
    # Dinov2Layer, 2: `drop_path(layer_scale(...)) + hidden`.
    "DINOv2": plain(zoo.dinov2, 4, "before", factors={"channels": 4}),
    # layer_2 has three MobileViTInvertedResiduals, of which the last two keep stride and width: 2 sites that end in a
    # norm. Three MobileViTLayers hold 2+4+3 transformer layers of two adds each, 18 sites, in the branch of a
    # `cat((residual, features))`; each comes after a strided block without a skip.
    "MobileViT": Row(
        build=deep.mobilevit,
        kinds={"identity": 20, "concat": 3},
        placements={"end": 2, "before": 18, "": 3},
        resets=3,
    ),
    # MobileBertLayer, 2. The attention's skip is `bottleneck.input(hidden)`, a linear map and NoNorm's factor and
    # bias: a projection. 3 FFNLayers and MobileBertOutput add to their own input, 4; OutputBottleneck adds the
    # layer's own hidden states to all of this: one around the five others. NoNorm divides by nothing: no norm.
    "MobileBERT": Row(
        build=deep.mobilebert,
        kinds={"projection": 2, "identity": 10},
        placements={"none": 12},
        nested=10,
        resets=2,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_an_architecture_has_the_sites_of_its_forward(name: str) -> None:
    row = ROWS[name]
    torch.manual_seed(0)
    sites = gradflow.inspect(*row.build()).residuals
    listing = sites[["name", "kind", "branches", "norm_placement", "branch_factors", "parent"]].to_string()
    assert Counter(sites.kind) == Counter(row.kinds), listing
    assert Counter(sites.norm_placement) == Counter(row.placements), listing
    assert Counter(filter(None, sites.branch_factors)) == Counter(row.factors), listing
    assert set(sites.branches) == {row.branches}, listing
    assert sites.parent.notna().sum() == row.nested, listing
    assert sites.resets_stream.sum() == row.resets, listing
    assert set(sites.added_by) <= {"add", "cat"}


def test_mobilebert_keeps_every_inner_site_s_parent() -> None:
    torch.manual_seed(0)
    sites = gradflow.inspect(*deep.mobilebert()).residuals
    outer = [site.order for site in sites.itertuples() if site.name.endswith("output.bottleneck")]
    assert outer == [5, 11]
    assert sites.parent.dropna().tolist() == [5] * 5 + [11] * 5
