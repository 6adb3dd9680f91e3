"""Small ``transformers`` models with random weights, each as a user's two-line model file would build it.

``MODELS`` maps a name to a builder of ``(model, inputs)``; inputs are keyword arguments with a batch of 4.
Where they hold labels the model returns its own loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

Built = tuple[nn.Module, dict[str, Any]]
BATCH, LENGTH, VOCABULARY = 4, 16, 96


def tokens(*, labels: str = "") -> dict[str, torch.Tensor]:
    """Token ids, and labels of one kind: "tokens", "class", or none."""
    ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH))
    inputs = {"input_ids": ids}
    if labels == "tokens":
        inputs["labels"] = ids
    elif labels == "class":
        inputs["labels"] = torch.randint(0, 2, (BATCH,))
    return inputs


def images(size: int = 32, *, labels: bool = False) -> dict[str, torch.Tensor]:
    inputs = {"pixel_values": torch.randn(BATCH, 3, size, size)}
    if labels:
        inputs["labels"] = torch.randint(0, 2, (BATCH,))
    return inputs


def layered(**options: Any) -> dict[str, Any]:
    """The names most configurations share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | options


def vision(**options: Any) -> dict[str, Any]:
    shared = layered(image_size=32, patch_size=8)
    return {name: shared[name] for name in shared if name != "vocab_size" and "token" not in name} | options


def gpt2() -> Built:
    config = tf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config), tokens(labels="tokens")


def llama() -> Built:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**layered(num_key_value_heads=2))), tokens(labels="tokens")


def mistral() -> Built:
    return tf.MistralForCausalLM(tf.MistralConfig(**layered(num_key_value_heads=2))), tokens()


def qwen2() -> Built:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**layered(num_key_value_heads=2))), tokens(labels="tokens")


def gemma2() -> Built:
    config = tf.Gemma2Config(**layered(num_key_value_heads=2, head_dim=8))
    return tf.Gemma2ForCausalLM(config), tokens()


def opt() -> Built:
    config = tf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
    )
    return tf.OPTForCausalLM(config), tokens(labels="tokens")


def bloom() -> Built:
    config = tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    return tf.BloomForCausalLM(config), tokens()


def gptj() -> Built:
    config = tf.GPTJConfig(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.GPTJForCausalLM(config), tokens(labels="tokens")


def gpt_neox() -> Built:
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**layered())), tokens()


def falcon() -> Built:
    config = tf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    return tf.FalconForCausalLM(config), tokens(labels="tokens")


def mixtral() -> Built:
    config = tf.MixtralConfig(**layered(num_key_value_heads=2, num_local_experts=4))
    return tf.MixtralForCausalLM(config), tokens(labels="tokens")


def bert() -> Built:
    return tf.BertForMaskedLM(tf.BertConfig(**layered())), tokens(labels="tokens")


def roberta() -> Built:
    config = tf.RobertaConfig(**layered(max_position_embeddings=40))
    return tf.RobertaForSequenceClassification(config), tokens(labels="class")


def distilbert() -> Built:
    config = tf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    return tf.DistilBertForSequenceClassification(config), tokens(labels="class")


def albert() -> Built:
    return tf.AlbertModel(tf.AlbertConfig(**layered(embedding_size=16))), tokens()


def electra() -> Built:
    config = tf.ElectraConfig(**layered(embedding_size=16))
    return tf.ElectraForSequenceClassification(config), tokens(labels="class")


def deberta_v2() -> Built:
    config = tf.DebertaV2Config(**layered(relative_attention=True, pos_att_type=["p2c", "c2p"]))
    return tf.DebertaV2Model(config), tokens()


def t5() -> Built:
    config = tf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return tf.T5ForConditionalGeneration(config), tokens(labels="tokens")


def bart() -> Built:
    config = tf.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=32,
    )
    return tf.BartForConditionalGeneration(config), tokens(labels="tokens")


def whisper() -> Built:
    config = tf.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    inputs = {"input_features": torch.randn(BATCH, 16, 64)}
    return tf.WhisperForConditionalGeneration(config), inputs | {"labels": tokens()["input_ids"]}


def vit() -> Built:
    return tf.ViTForImageClassification(tf.ViTConfig(**vision())), images(labels=True)


def deit() -> Built:
    return tf.DeiTModel(tf.DeiTConfig(**vision())), images()


def swin() -> Built:
    config = tf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    return tf.SwinForImageClassification(config), images(labels=True)


def convnext_v2() -> Built:
    config = tf.ConvNextV2Config(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, image_size=32)
    return tf.ConvNextV2ForImageClassification(config), images(labels=True)


def resnet() -> Built:
    config = tf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=2
    )
    return tf.ResNetForImageClassification(config), images(64, labels=True)


def poolformer() -> Built:
    config = tf.PoolFormerConfig(
        hidden_sizes=[16, 32],
        depths=[2, 2],
        num_encoder_blocks=2,
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
    )
    return tf.PoolFormerForImageClassification(config), images(64)


def segformer() -> Built:
    config = tf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    )
    inputs = images(64) | {"labels": torch.randint(0, 2, (BATCH, 64, 64))}
    return tf.SegformerForSemanticSegmentation(config), inputs


def dinov2() -> Built:
    return tf.Dinov2Model(tf.Dinov2Config(**vision(mlp_ratio=2))), images()


def wav2vec2() -> Built:
    config = tf.Wav2Vec2Config(
        **layered(
            conv_dim=(16, 16),
            conv_stride=(5, 4),
            conv_kernel=(10, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
        )
    )
    return tf.Wav2Vec2Model(config), {"input_values": torch.randn(BATCH, 800)}


def mamba() -> Built:
    config = tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    return tf.MambaForCausalLM(config), tokens(labels="tokens")


def rwkv() -> Built:
    config = tf.RwkvConfig(
        vocab_size=VOCABULARY, context_length=32, hidden_size=32, num_hidden_layers=2, intermediate_size=64
    )
    # With its cache on, RWKV in eval overwrites the state that its own backward needs.
    return tf.RwkvForCausalLM(config), tokens() | {"use_cache": False}


def clip() -> Built:
    config = tf.CLIPConfig(
        text_config=layered(max_position_embeddings=32, projection_dim=16),
        vision_config=vision(projection_dim=16),
        projection_dim=16,
    )
    ids = tokens()["input_ids"]
    ids[:, -1] = 2  # CLIP reads the text at its end-of-text token
    return tf.CLIPModel(config), {"input_ids": ids} | images()


def layoutlm() -> Built:
    config = tf.LayoutLMConfig(**layered(max_2d_position_embeddings=128))
    boxes = torch.randint(0, 60, (BATCH, LENGTH, 2))
    inputs = tokens(labels="class") | {"bbox": torch.cat((boxes, boxes + 10), dim=-1)}
    return tf.LayoutLMForSequenceClassification(config), inputs


MODELS: dict[str, Callable[[], Built]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "Mistral": mistral,
    "Qwen2": qwen2,
    "Gemma 2": gemma2,
    "OPT": opt,
    "BLOOM": bloom,
    "GPT-J": gptj,
    "GPT-NeoX": gpt_neox,
    "Falcon": falcon,
    "Mixtral": mixtral,
    "BERT": bert,
    "RoBERTa": roberta,
    "DistilBERT": distilbert,
    "ALBERT": albert,
    "ELECTRA": electra,
    "DeBERTa-v2": deberta_v2,
    "T5": t5,
    "BART": bart,
    "Whisper": whisper,
    "ViT": vit,
    "DeiT": deit,
    "Swin": swin,
    "ConvNeXt V2": convnext_v2,
    "ResNet": resnet,
    "PoolFormer": poolformer,
    "SegFormer": segformer,
    "DINOv2": dinov2,
    "wav2vec 2.0": wav2vec2,
    "Mamba": mamba,
    "RWKV": rwkv,
    "CLIP": clip,
    "LayoutLM": layoutlm,
}
