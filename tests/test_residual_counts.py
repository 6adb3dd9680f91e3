"""How many residual sites a model has, counted by hand from its classes' own forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

import gradflow
from tests import residual_free_zoo as free
from tests import residual_transformers as deep
from tests import residual_zoo as plain
from tests import transformers_zoo as zoo

transformers_logging.set_verbosity_error()
COUNTED = ("identity", "projection", "scaled")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a model must have.

    ``labelled`` are the sites that are named and do not count; None where naming them is not asked for.
    """

    build: Callable[[], tuple[nn.Module, Any]]
    identity: int = 0
    projection: int = 0
    branches: int = 1
    labelled: dict[str, int] | None = field(default_factory=dict)


CONVOLUTIONAL = {
    # 2+2+2+2 blocks, each `out += identity`. layer1 keeps 64 channels at stride 1, so both its skips are bare; the
    # first block of layers 2 to 4 has a downsample (1x1 convolution and norm): 3 projections, 5 identities.
    "ResNet-18": Row(build=plain.resnet18, identity=5, projection=3),
    # 3+4+6+3 = 16 basic blocks with the same three downsamples.
    "ResNet-34": Row(build=plain.resnet34, identity=13, projection=3),
    # 16 bottlenecks. They widen by four, so layer1's first block needs a downsample too: 4 projections.
    "ResNet-50": Row(build=plain.resnet50, identity=12, projection=4),
    # 8 blocks, `out + skip`. Three change width: there the 1x1 shortcut starts after the norm and ReLU that the
    # branch shares, so the source of both is the ReLU's output.
    "pre-activation ResNet-18": Row(build=plain.preact_resnet18, identity=5, projection=3),
    # 9 blocks; two widen, with `F.pad(x[:, :, ::2, ::2])` as the shortcut: slice and pad only, a projection.
    "CIFAR ResNet-20, option A": Row(build=plain.cifar_resnet20, identity=7, projection=2),
    # 17 inverted residuals; use_res_connect holds for all repeats but the first of each group, whose width or
    # stride changes: 0+1+2+3+2+2+0 = 10.
    "MobileNetV2": Row(build=plain.mobilenet_v2, identity=10),
    # The same table in transformers: `residual + features if self.use_residual else features`.
    "MobileNetV2 (transformers)": Row(build=deep.mobilenet_v2, identity=10),
    # 2+3 blocks, `skip + x`; gamma on the branch is LayerScale. Down-sampling convolutions have no skip.
    "ConvNeXt": Row(build=partial(plain.convnext, grn=False), identity=5),
    # The same; GRN's `gamma * (x * n) + beta + x` adds its input to an elementwise product with it: no weight
    # layer and no norm that owns a parameter lies between, so it is no branch.
    "ConvNeXtV2": Row(build=partial(plain.convnext, grn=True), identity=5),
    "ConvNeXtV2 (transformers)": Row(build=zoo.convnext_v2, identity=4),  # depths 2+2, `residual + drop_path`
    # 3 blocks of `x + (pool(norm(x)) - norm(x))` and `x + mlp(norm(x))`. Pooling owns nothing; its norm does.
    "PoolFormer": Row(build=plain.poolformer, identity=6),
    "PoolFormer (transformers)": Row(build=zoo.poolformer, identity=8),  # depths 2+2, two adds each
    # depths 2+2; stage 1 keeps 16 channels at stride 1, stage 2's first layer has a ResNetShortCut.
    "ResNet (transformers)": Row(build=zoo.resnet, identity=3, projection=1),
    # depths 1+2; both stages start at stride 2, so `self.shortcut(residual)` is a convolution and a norm there.
    "RegNet": Row(build=deep.regnet, identity=1, projection=2),
}

ATTENTIONAL = {
    # Two adds a block, 12 blocks. `tokens + self.positions` adds a parameter: no data, and broadcast.
    "ViT-12": Row(build=plain.vit12, identity=24),
    # _sa_block and _ff_block, one add each in every layer, 3 layers: `x + f(norm(x))` or `norm(x + f(x))`.
    "nn.TransformerEncoder, pre-norm": Row(build=partial(plain.encoder, norm_first=True), identity=6),
    "nn.TransformerEncoder, post-norm": Row(build=partial(plain.encoder, norm_first=False), identity=6),
    # _mha_block besides: cross-attention's queries come from the stream that it is added to.
    "nn.TransformerDecoder, pre-norm": Row(build=partial(plain.decoder, norm_first=True), identity=9),
    "nn.TransformerDecoder, post-norm": Row(build=partial(plain.decoder, norm_first=False), identity=9),
    "ViT": Row(build=zoo.vit, identity=4),  # 2 layers, attention and MLP
    "DeiT": Row(build=zoo.deit, identity=4),
    "BEiT": Row(build=deep.beit, identity=4),  # lambda_1 and lambda_2 scale the branches
    "DINOv2": Row(build=zoo.dinov2, identity=4),  # `drop_path(layer_scale(...)) + residual`
    # Windows are a reshape, shifts a roll: `shortcut + drop_path(windows)`. Patch merging has no skip. 4 x 2.
    "Swin": Row(build=zoo.swin, identity=8),
    "Swin V2": Row(build=deep.swinv2, identity=8),
    # depths 2+2, two adds a layer. The MixFFN's depthwise convolution lies within its branch; the decode head
    # concatenates four linear maps of four streams, and none of them is made from another.
    "SegFormer": Row(build=zoo.segformer, identity=8),
    "CLIP": Row(build=zoo.clip, identity=8),  # 2 layers of text and 2 of vision, two adds each
}

DECODERS = {
    "GPT-2": Row(
        build=deep.gpt2, identity=8
    ),  # GPT2Block: `attn_output + residual`, `residual + feed_forward`
    # Decoder layers of `residual + self_attn(norm(x))` and `residual + mlp(norm(x))`. RMSNorm's product and the
    # rotary embedding's `q cos + rotate_half(q) sin` join tensors of one source by factors alone.
    "Llama": Row(build=deep.llama, identity=8),
    "Mistral": Row(build=deep.mistral, identity=8),
    "Qwen2": Row(build=deep.qwen2, identity=8),
    "Gemma2": Row(build=deep.gemma2, identity=8),  # a norm after each branch as well as before
    "Gemma3": Row(build=deep.gemma3, identity=4),  # 2 layers
    "OLMo2": Row(build=deep.olmo2, identity=4),  # 2 layers, a norm after each branch only
    "Granite": Row(build=deep.granite, identity=4),  # 2 layers, `residual + hidden * residual_multiplier`
    "Mixtral": Row(
        build=zoo.mixtral, identity=4
    ),  # 2 layers; experts are added up with index_add_, no stream
    "GPT-Neo": Row(build=deep.gpt_neo, identity=4),  # 2 layers, one global and one local
    # The second add is `(residual + hidden).view(shape)` of flattened tokens.
    "OPT": Row(build=deep.opt, identity=8),
    # dropout_add(x, residual) of the attention's and of the MLP's own module. GELU's polynomial
    # `x * 0.5 * (1 + tanh(0.79 x (1 + 0.044715 x x)))` adds numbers; alibi adds a mask.
    "BLOOM": Row(build=deep.bloom, identity=8),
    # One sum a layer of the residual and two branches of it: `attn + feed_forward + residual`.
    "GPT-J": Row(build=zoo.gptj, identity=2, branches=2),
    "GPT-NeoX": Row(build=zoo.gpt_neox, identity=2, branches=2),  # `mlp + attn + hidden`, parallel by default
    "Falcon": Row(
        build=zoo.falcon, identity=2, branches=2
    ),  # `mlp_output += attention_output`, then dropout_add
    "Phi": Row(build=deep.phi, identity=2, branches=2),
    "Cohere": Row(build=deep.cohere, identity=2, branches=2),  # `residual + attention + mlp`: the other order
    "Falcon, sequential": Row(
        build=deep.falcon_sequential, identity=4
    ),  # parallel_attn=False: dropout_add twice
    # bias_dropout_add of attention and MLP; the last layer adds `bias.expand_as(residual)` before.
    "GPT-NeoX Japanese": Row(build=deep.gpt_neox_japanese, identity=8),
    # `hidden + outputs` of attention and FFN. The position bias is made from the ids' segments, and added to the
    # scores of every layer.
    "CPM-Ant": Row(build=deep.cpmant, identity=8),
}

ENCODERS = {
    # BertSelfOutput and BertOutput: `LayerNorm(hidden + input)`. BertEmbeddings adds token-type and position
    # embeddings, which no data but indices make.
    "BERT": Row(build=deep.bert, identity=8),
    "RoBERTa": Row(build=deep.roberta, identity=8),
    "ELECTRA": Row(build=zoo.electra, identity=4),  # 2 layers
    "LayoutLM": Row(build=zoo.layoutlm, identity=4),  # 2 layers; six embeddings of boxes are added before
    "Longformer": Row(
        build=deep.longformer, identity=4
    ),  # 2 layers; `attn_scores += diagonal_mask` is a mask
    # The same two outputs; `score += c2p_att` sums attention scores, of one source, with nothing that owns a
    # parameter between the scores.
    "DeBERTa-v2": Row(build=deep.deberta_v2, identity=8),
    # TransformerBlock: `sa_layer_norm(attention + hidden)`, `output_layer_norm(ffn + attention)`.
    "DistilBERT": Row(build=deep.distilbert, identity=8),
    # One AlbertLayer called twice: `LayerNorm(hidden + attn)` and `full_layer_layer_norm(ffn + attention)` a call.
    "ALBERT": Row(build=zoo.albert, identity=4),
    # post_attention's `attn_out + h` and the feed-forward's `layer_norm(output + inp)`; rel_shift and the biases
    # r_w_bias, r_r_bias are adds of parameters.
    "XLNet": Row(build=deep.xlnet, identity=8),
    "ModernBERT": Row(build=deep.modernbert, identity=4),  # 2 layers
    # 2 layers, and the convolutional position embedding: `hidden + gelu(conv(hidden))` is made from the stream,
    # and so it is a residual site like any other.
    "wav2vec 2.0": Row(build=zoo.wav2vec2, identity=5),
    "HuBERT": Row(build=deep.hubert, identity=5),
    # Two layers in two blocks and one of the decoder, two adds each; the decoder adds the first block's hidden
    # states to the upsampled last: a long skip over the second block.
    "Funnel": Row(build=deep.funnel, identity=7),
}

SEQUENCE_TO_SEQUENCE = {
    # Encoder layers 2 x (self-attention, feed-forward), decoder layers 2 x (self, cross, feed-forward) = 4 + 6.
    "T5": Row(build=zoo.t5, identity=10),
    "BART": Row(build=zoo.bart, identity=10),
    "Pegasus": Row(build=deep.pegasus, identity=10),
    "Whisper": Row(build=zoo.whisper, identity=10),  # the two convolutions in front have no skip
}

STATE_SPACE_AND_RECURRENT = {
    # MambaBlock: `residual.to(float32)`, then `residual + mixer(norm(x))`, one a layer. Inside the mixer the scan
    # adds `hidden * D`: a factor a channel beside the scan of the same hidden states, at best a gate.
    "Mamba": Row(build=deep.mamba, identity=4, labelled=None),
    "Mamba2": Row(build=deep.mamba2, identity=4, labelled=None),
    # RwkvBlock: `hidden + attention`, `hidden + feed_forward`. Time mixing adds `hidden * m` and `shifted * (1 - m)`,
    # the linear recurrence `e1 * num_state + e2 * value`: no skip of either.
    "RWKV": Row(build=deep.rwkv, identity=8),
    "LSTM": Row(build=free.lstm),  # one op
    "LSTM cell, looped": Row(build=free.lstm_cell_loop),  # one op a step
    "GRU cell, looped": Row(build=free.gru_cell_loop),
    # `(1 - keep) * new + keep * h`: 6 steps, the first with a state of zeros that no data made.
    "GRU in plain ops": Row(build=free.gru_loop, labelled={"gated": 5}),
    # `tanh(W x + U h)`: W x is made from this step's input and U h from the others'. Adding is no skip.
    "RNN in plain ops": Row(build=free.rnn_loop),
}

WITHOUT = {
    "DenseNet": Row(build=free.densenet, labelled={"concat": 4}),  # `cat((x, body(x)))`, 4 layers
    "U-Net": Row(build=free.unet, labelled={"concat": 2}),  # two levels, `cat((first, lift(x)))`
    "VGG": Row(build=free.vgg),  # a sequence
    "Highway": Row(build=free.highway, labelled={"gated": 3}),  # `t H(x) + (1 - t) x`
    # `post * F(pre * X) + mix @ X` over four streams: the skip is a mixture, in one sum a block.
    "hyper-connections": Row(build=free.hyper_connected, labelled={"gated": 6}),
    "attention over the stream itself": Row(build=free.values_unprojected),  # `softmax(q @ k.T) @ x + mlp(x)`
    "LoRA": Row(build=free.lora, labelled={"low_rank": 2}),  # `base(x) + b(a(x))`, nothing that bends
    # `dense(x) + pointwise(x)`: two linear maps of x side by side are one linear map; nothing bends in either.
    "RepVGG": Row(build=free.repvgg),
    # The pairs reach the scores of layers 2 and 3 through the layers before: `scores + bias(pairs)` is read by a
    # softmax alone, and so it is no stream.
    "attention with a pair bias": Row(build=free.pair_bias),
    "a bias with the stream's shape": Row(
        build=free.expanded_bias
    ),  # `bias.expand_as(x)` takes no value of x
}

ROWS = (
    CONVOLUTIONAL
    | ATTENTIONAL
    | DECODERS
    | ENCODERS
    | SEQUENCE_TO_SEQUENCE
    | STATE_SPACE_AND_RECURRENT
    | WITHOUT
)


@pytest.mark.parametrize("name", ROWS)
def test_a_model_has_as_many_residual_sites_as_its_forward_writes(name: str) -> None:
    row = ROWS[name]
    torch.manual_seed(0)
    report = gradflow.inspect(*row.build())
    sites = report.residuals
    kinds = Counter(kind for kind in sites.kind if kind in COUNTED)
    expected = {"identity": row.identity, "projection": row.projection}
    listing = sites[["name", "index", "call", "kind", "source", "branch_ops"]].to_string()
    assert kinds == Counter({kind: count for kind, count in expected.items() if count}), listing
    assert set(sites[sites.kind.isin(COUNTED)].branches) <= {row.branches}, listing
    if row.labelled is not None:
        assert Counter(kind for kind in sites.kind if kind not in COUNTED) == Counter(row.labelled), listing


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("DINOv2", 1.0),  # Dinov2LayerScale, layerscale_value=1.0
        ("BEiT", 0.1),  # lambda_1, lambda_2 of layer_scale_init_value
        ("ConvNeXt", 1e-6),  # gamma
        ("PoolFormer (transformers)", 1e-5),  # layer_scale_init_value
        ("Granite", 0.25),  # residual_multiplier
    ],
)
def test_a_factor_on_the_branch_is_a_column(name: str, scale: float) -> None:
    torch.manual_seed(0)
    sites = gradflow.inspect(*ROWS[name].build()).residuals
    assert sites.branch_scale.tolist() == pytest.approx([scale] * len(sites), rel=1e-6)


def test_a_module_that_is_called_twice_has_its_sites_twice() -> None:
    torch.manual_seed(0)
    sites = gradflow.inspect(*zoo.albert()).residuals
    assert sites.groupby("name").call.apply(list).tolist() == [[0, 1], [0, 1]]
    assert sites["index"].tolist() == [0] * 4


def test_a_long_skip_is_the_parent_of_what_it_passes() -> None:
    torch.manual_seed(0)
    sites = gradflow.inspect(*deep.funnel()).residuals
    (long,) = sites[sites.index.isin(sites.parent.dropna())].itertuples()
    assert list(sites[sites.parent == long.order].order) == [2, 3]
    assert long.span > sites.span[2] + sites.span[3]
