"""``transformers`` classes as deep as the counts to meet ask: four layers, or two and two."""

from __future__ import annotations

import torch
import transformers as tf

from tests.transformers_zoo import BATCH, VOCABULARY, Built, images, layered, tokens, vision

FOUR = {"num_hidden_layers": 4}


def gpt2() -> Built:
    config = tf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config), tokens(labels="tokens")


def llama() -> Built:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**layered(num_key_value_heads=2, **FOUR))), tokens()


def mistral() -> Built:
    return tf.MistralForCausalLM(tf.MistralConfig(**layered(num_key_value_heads=2, **FOUR))), tokens()


def qwen2() -> Built:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**layered(num_key_value_heads=2, **FOUR))), tokens()


def gemma2() -> Built:
    config = tf.Gemma2Config(**layered(num_key_value_heads=2, head_dim=8, **FOUR))
    return tf.Gemma2ForCausalLM(config), tokens()


def opt() -> Built:
    config = tf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
        **FOUR,
    )
    return tf.OPTForCausalLM(config), tokens()


def bloom() -> Built:
    config = tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=4, n_head=4)
    return tf.BloomForCausalLM(config), tokens()


def bert() -> Built:
    return tf.BertForMaskedLM(tf.BertConfig(**layered(**FOUR))), tokens(labels="tokens")


def roberta() -> Built:
    config = tf.RobertaConfig(**layered(max_position_embeddings=40, **FOUR))
    return tf.RobertaForSequenceClassification(config), tokens(labels="class")


def deberta_v2() -> Built:
    config = tf.DebertaV2Config(**layered(relative_attention=True, pos_att_type=["p2c", "c2p"], **FOUR))
    return tf.DebertaV2Model(config), tokens()


def distilbert() -> Built:
    config = tf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=4, n_heads=4, hidden_dim=64)
    return tf.DistilBertForSequenceClassification(config), tokens(labels="class")


def mamba() -> Built:
    config = tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, state_size=4)
    return tf.MambaForCausalLM(config), tokens(labels="tokens")


def mamba2() -> Built:
    config = tf.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        state_size=4,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.Mamba2ForCausalLM(config), tokens()


def rwkv() -> Built:
    config = tf.RwkvConfig(
        vocab_size=VOCABULARY, context_length=32, hidden_size=32, num_hidden_layers=4, intermediate_size=64
    )
    return tf.RwkvForCausalLM(config), tokens() | {"use_cache": False}


def xlnet() -> Built:
    config = tf.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=4, n_head=4, d_inner=64)
    return tf.XLNetModel(config), tokens()


def gpt_neo() -> Built:
    config = tf.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
        window_size=8,
    )
    return tf.GPTNeoForCausalLM(config), tokens()


def falcon_sequential() -> Built:
    config = tf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, parallel_attn=False
    )
    return tf.FalconForCausalLM(config), tokens()


def phi() -> Built:
    return tf.PhiForCausalLM(tf.PhiConfig(**layered())), tokens()


def cohere() -> Built:
    return tf.CohereForCausalLM(tf.CohereConfig(**layered(num_key_value_heads=2))), tokens()


def granite() -> Built:
    config = tf.GraniteConfig(**layered(num_key_value_heads=2, residual_multiplier=0.25))
    return tf.GraniteForCausalLM(config), tokens()


def gemma3() -> Built:
    config = tf.Gemma3TextConfig(**layered(num_key_value_heads=2, head_dim=8))
    return tf.Gemma3ForCausalLM(config), tokens()


def olmo2() -> Built:
    return tf.Olmo2ForCausalLM(tf.Olmo2Config(**layered(num_key_value_heads=2))), tokens()


def modernbert() -> Built:
    return tf.ModernBertModel(tf.ModernBertConfig(**layered(attn_implementation="eager"))), tokens()


def pegasus() -> Built:
    config = tf.PegasusConfig(
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
    return tf.PegasusForConditionalGeneration(config), tokens(labels="tokens")


def longformer() -> Built:
    config = tf.LongformerConfig(**layered(attention_window=8, max_position_embeddings=40))
    return tf.LongformerModel(config), tokens()


def funnel() -> Built:
    config = tf.FunnelConfig(
        vocab_size=VOCABULARY,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
    )
    return tf.FunnelModel(config), tokens()


def beit() -> Built:
    return tf.BeitModel(tf.BeitConfig(**vision(layer_scale_init_value=0.1, drop_path_rate=0.0))), images()


def mobilenet_v2() -> Built:
    config = tf.MobileNetV2Config(image_size=64, depth_multiplier=0.35)
    return tf.MobileNetV2Model(config), images(64)


def regnet() -> Built:
    config = tf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=8)
    return tf.RegNetModel(config), images(64)


def swinv2() -> Built:
    config = tf.Swinv2Config(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    return tf.Swinv2Model(config), images()


def nemotron() -> Built:
    return tf.NemotronForCausalLM(tf.NemotronConfig(**layered(num_key_value_heads=2))), tokens()


def stablelm(*, parallel: bool) -> Built:
    config = tf.StableLmConfig(**layered(num_key_value_heads=2, use_parallel_residual=parallel))
    return tf.StableLmForCausalLM(config), tokens()


def codegen() -> Built:
    config = tf.CodeGenConfig(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.CodeGenForCausalLM(config), tokens()


def mpt() -> Built:
    config = tf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, max_seq_len=32)
    return tf.MptForCausalLM(config), tokens()


def mobilevit() -> Built:
    config = tf.MobileViTConfig(
        image_size=64,
        patch_size=2,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 12, 16, 16, 16, 16, 32],
        num_attention_heads=2,
    )
    return tf.MobileViTModel(config), images(64)


def mobilebert() -> Built:
    config = tf.MobileBertConfig(
        **layered(embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=4)
    )
    return tf.MobileBertModel(config), tokens()


def hubert() -> Built:
    config = tf.HubertConfig(
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
    return tf.HubertModel(config), {"input_values": torch.randn(BATCH, 800)}


def gpt_neox_japanese() -> Built:
    config = tf.GPTNeoXJapaneseConfig(**layered(intermediate_multiple_size=2, **FOUR))
    return tf.GPTNeoXJapaneseForCausalLM(config), tokens()


def cpmant() -> Built:
    config = tf.CpmAntConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_attention_heads=4,
        dim_head=8,
        dim_ff=64,
        num_hidden_layers=4,
        prompt_length=4,
        prompt_types=4,
        segment_types=4,
    )
    return tf.CpmAntForCausalLM(config), {"input_ids": tokens()["input_ids"]}
