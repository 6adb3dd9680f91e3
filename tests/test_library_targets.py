"""Targets from libraries: transformers classes by inference alone, LightningModules by training_step."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradflow.recording.target import Target, TargetOptions, load_target

SMALL = "hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64"
SEQ = (
    "d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, "
    "encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=200"
)
GPT = "GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=200, bos_token_id=1, eos_token_id=1)"
PICTURE = f"{SMALL}, image_size=32, patch_size=8"
WAVE = (
    f"{SMALL}, conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, vocab_size=30"
)
CLIP = (
    f"CLIPConfig(text_config=dict({SMALL}, vocab_size=200, eos_token_id=2, bos_token_id=1), "
    f"vision_config=dict({PICTURE}))"
)
OWN = "the output's own .loss"

CLASSES: list[tuple[str, str, dict[str, tuple[int, ...]], str]] = [
    ("GPT2LMHeadModel", GPT, {"0": (4, 16), "labels": (4, 16)}, OWN),
    ("LlamaForCausalLM", f"LlamaConfig({SMALL}, vocab_size=200)", {"0": (4, 16), "labels": (4, 16)}, OWN),
    ("BertForMaskedLM", f"BertConfig({SMALL}, vocab_size=200)", {"0": (4, 16), "labels": (4, 16)}, OWN),
    ("BertForSequenceClassification", f"BertConfig({SMALL}, vocab_size=200)",
     {"0": (4, 16), "labels": (4,)}, OWN),
    ("BertForQuestionAnswering", f"BertConfig({SMALL}, vocab_size=200)",
     {"0": (4, 16), "start_positions": (4,), "end_positions": (4,)}, OWN),
    ("BertForMultipleChoice", f"BertConfig({SMALL}, vocab_size=200)", {"0": (4, 2, 16), "labels": (4,)}, OWN),
    ("MistralModel", f"MistralConfig({SMALL}, num_key_value_heads=1, vocab_size=200)",
     {"0": (4, 16)}, "probe"),
    ("ViTForImageClassification", f"ViTConfig({PICTURE})", {"0": (4, 3, 32, 32), "1": (4,)}, OWN),
    ("Dinov2Model", f"Dinov2Config({PICTURE})", {"0": (4, 3, 32, 32)}, "probe"),
    ("ResNetForImageClassification",
     "ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic')",
     {"0": (4, 3, 64, 64), "1": (4,)}, OWN),
    ("VideoMAEForVideoClassification", f"VideoMAEConfig({PICTURE}, num_frames=4)",
     {"0": (2, 4, 3, 32, 32), "1": (2,)}, OWN),
    ("CLIPModel", CLIP, {"0": (4, 16), "1": (4, 3, 32, 32)}, "probe"),
    ("Wav2Vec2ForCTC", f"Wav2Vec2Config({WAVE})", {"0": (4, 9600), "labels": (4, 4)}, OWN),
    ("ASTForAudioClassification", f"ASTConfig({SMALL}, max_length=64, num_mel_bins=32)",
     {"0": (4, 64, 32), "1": (4,)}, OWN),
    ("WhisperForConditionalGeneration",
     f"WhisperConfig({SEQ}, max_source_positions=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, "
     "decoder_start_token_id=3)", {"0": (4, 80, 100), "labels": (4, 16)}, OWN),
]  # fmt: skip


def run(target: Target) -> Tensor:
    batch = target.batches[0]
    loss = target.loss.compute(target.forward(target.module, batch), batch)
    loss.backward()
    return loss


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "config", "shapes", "loss"), CLASSES, ids=[case[0] for case in CLASSES])
def test_transformers_by_inference_alone(
    tmp_path: Path, name: str, config: str, shapes: dict[str, Any], loss: str
) -> None:
    path = tmp_path / "model.py"
    path.write_text(
        f"from transformers import *\nfrom transformers import {name}\nmodel = {name}({config})\n"
    )
    target = load_target(str(path))
    batch = target.batches[0]
    found = {str(i): tuple(arg.shape) for i, arg in enumerate(batch.args)}
    assert found | {key: tuple(value.shape) for key, value in batch.kwargs.items()} == shapes
    assert (target.inputs_from, target.loss.description) == ("inferred", loss)
    assert torch.isfinite(run(target))
    assert any(p.grad is not None and bool(p.grad.any()) for p in target.module.parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_class_with_dummy_inputs_of_its_own_says_more_than_inference(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(f"from transformers import *\nmodel = BartForConditionalGeneration(BartConfig({SEQ}))\n")
    target = load_target(str(path))
    assert target.inputs_from == "dummy_inputs"
    assert torch.isfinite(run(target)) and target.loss.settled().is_probe


LIGHTNING = """
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import nn

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
{extra}
    def forward(self, x):
        return self.fc(x)
    def training_step(self, batch, batch_idx):
        {step}
        self.log("loss", loss)
        self.log_dict({{"again": loss}}, prog_bar=True)
        return {returned}
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        return {optimizers}
{after}
"""
CLASSIFY = "x, y = batch; loss = F.cross_entropy(self(x), y)"


def lightning_file(tmp_path: Path, **parts: str) -> str:
    known = {"extra": "", "step": CLASSIFY, "returned": "loss", "optimizers": "optimizer", "after": ""}
    path = tmp_path / "lightning_model.py"
    path.write_text(LIGHTNING.format(**(known | parts)))
    return str(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"returned": "{'loss': loss, 'y': y}"},
        {"step": "x, y = batch; loss = F.mse_loss(self(x), y)"},
        {"step": "loss = self(batch).square().mean()"},
        {"extra": "        self.example_input_array = torch.randn(5, 6)"},
        {"after": "def get_inputs(): return torch.randn(5, 6), torch.arange(5) % 3"},
        {"after": "def get_inputs(): return {'x': torch.randn(5, 6), 'y': torch.arange(5) % 3}",
         "step": "loss = F.cross_entropy(self(batch['x']), batch['y'])"},
        {"optimizers": "[optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]"},
        {"optimizers": "{'optimizer': optimizer, 'lr_scheduler': None}"},
    ],
)  # fmt: skip
def test_a_training_step_is_the_forward_and_the_loss(tmp_path: Path, parts: dict[str, str]) -> None:
    target = load_target(lightning_file(tmp_path, **parts))
    assert target.loss.description == "training_step" and not target.loss.is_probe
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(run(target))
    assert target.module.fc.weight.grad is not None
    assert isinstance(target.optimizer, torch.optim.AdamW)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_loss_of_the_file_or_the_command_line_comes_before_training_step(tmp_path: Path) -> None:
    path = lightning_file(tmp_path, after="def loss(outputs, inputs): return outputs.sum()")
    assert load_target(path).loss.description == "loss() of lightning_model.py"
    assert load_target(path, TargetOptions(loss="probe")).loss.is_probe


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_needs_a_trainer_is_said(tmp_path: Path) -> None:
    path = lightning_file(
        tmp_path,
        step="x, y = batch; loss = self(x).sum() * self.trainer.max_epochs",
        optimizers="[optimizer, torch.optim.SGD(self.parameters(), 0.1)]",
    )
    target = load_target(path)
    assert target.loss.description == "probe" and target.optimizer is None
    assert run(target).dim() == 0
    notes = " / ".join(target.notes)
    assert "training_step could not be run" in notes and "2 optimizers" in notes


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_module_with_a_training_step_alone(tmp_path: Path) -> None:
    path = tmp_path / "autoencoder.py"
    path.write_text(
        textwrap.dedent("""
        import torch
        from lightning import LightningModule
        from torch import nn

        class AutoEncoder(LightningModule):
            def __init__(self):
                super().__init__()
                self.encoder, self.decoder = nn.Linear(28 * 28, 3), nn.Linear(3, 28 * 28)
            def training_step(self, batch, batch_idx):
                x, _ = batch
                x = x.view(x.size(0), -1)
                return nn.functional.mse_loss(self.decoder(self.encoder(x)), x)
        """)
    )
    target = load_target(str(path))
    assert target.loss.description == "training_step"
    assert target.batches[0].args[0].shape == (8, 784)
    assert torch.isfinite(run(target)) and target.module.encoder.weight.grad is not None
