"""transformers models with random weights, with either of their two attentions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def transformers_model(
    name: str, implementation: str
) -> tuple[nn.Module, dict[str, torch.Tensor], list[tuple[str, int]]]:
    """A small model with random weights, its inputs, and where its attention is with how many heads."""
    import transformers as tf

    torch.manual_seed(0)
    ids = torch.randint(0, 100, (2, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "gpt2":
        config = tf.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=100)
        wanted = [(f"h.{k}.attn", 4) for k in range(2)]
        kind: Any = tf.GPT2Model
    elif name == "bert":
        config = tf.BertConfig(
            num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=100
        )
        wanted = [(f"encoder.layer.{k}.attention.self", 4) for k in range(2)]
        kind = tf.BertModel
    elif name == "llama":
        config = tf.LlamaConfig(
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=32,
            intermediate_size=64,
            vocab_size=100,
        )
        wanted = [(f"layers.{k}.self_attn", 4) for k in range(2)]
        kind = tf.LlamaModel
    else:
        config = tf.T5Config(num_layers=1, num_heads=4, d_model=32, d_kv=8, d_ff=64, vocab_size=100)
        wanted = [
            ("encoder.block.0.layer.0.SelfAttention", 4),
            ("decoder.block.0.layer.0.SelfAttention", 4),
            ("decoder.block.0.layer.1.EncDecAttention", 4),
        ]
        inputs["decoder_input_ids"] = ids
        kind = tf.T5Model
    config._attn_implementation = implementation
    return kind(config), inputs, wanted
