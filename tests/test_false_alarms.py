"""What a sweep over library models was wrong about: a small model each that reproduces it, and its true twin."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow
from tests.transformers_zoo import images, tokens

WIDTH = 16


def loud(report: gradflow.Report, *rules: str) -> list[tuple[str, str, str]]:
    """Severity, rule and place of each warning and error that follows from no other."""
    return [
        (str(f.severity), f.rule, str(f.location))
        for f in report.findings
        if f.severity != "info" and f.consequence_of is None and (not rules or f.rule in rules)
    ]


class Windows(nn.Module):
    """Pools whole windows of tokens; for fewer tokens than one window it starts from nothing, as DeepSeek-V4."""

    def __init__(self, window: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.window = window
        self.pooled, self.all = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(x)
        usable = x.shape[1] // self.window * self.window
        if usable:
            windows = pooled[:, :usable].unflatten(1, (-1, self.window)).mean(2)
        else:
            windows = pooled[:, :0].new_zeros(len(x), 1, WIDTH)
        return self.all(x) + windows.mean(1, keepdim=True)


def test_a_tensor_made_in_another_s_likeness_cuts_no_graph() -> None:
    assert loud(gradflow.inspect(Windows(4), torch.randn(4, 8, WIDTH))) == []
    report = gradflow.inspect(Windows(64), torch.randn(4, 8, WIDTH))
    # Nothing of it reaches the loss, which is true; no op cut it off, which was said.
    assert loud(report) == [("warning", "GF103", "pooled")]
    assert next(f.message for f in report.findings if f.rule == "GF103").endswith("does not reach the loss")


def test_an_op_under_no_grad_still_cuts_the_graph() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            with torch.no_grad():
                h = h * 2
            return self.last(h)

    report = gradflow.inspect(Cut(), torch.randn(8, WIDTH))
    assert loud(report) == [("error", "GF103", "first")]


class Selected(nn.Module):
    """A bias of -inf but for the chosen keys, written by new_full and scatter_, returned by a module in a tuple."""

    def __init__(self, *, spoil: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.choice, self.values = Choice(), nn.Linear(WIDTH, WIDTH)
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        keys, bias = self.choice(x)
        scores = x @ keys.transpose(1, 2) / WIDTH**0.5 + bias
        if self.spoil:
            scores = scores - scores.amin()
        return scores.softmax(-1) @ self.values(x)


class Choice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys, self.offset = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[1]
        bias = x.new_full((len(x), length, length + 1), float("-inf"))
        chosen = torch.arange(length).view(1, -1, 1).expand(len(x), -1, 1)
        bias.scatter_(-1, chosen, 0.0)
        bias.scatter_(-1, torch.zeros_like(chosen), 0.0)
        return self.keys(x + self.offset), bias[..., :length]


def test_a_mask_that_a_module_returns_is_no_fault() -> None:
    x = torch.randn(8, 6, WIDTH)
    assert loud(gradflow.inspect(Selected(), x)) == []
    report = gradflow.inspect(Selected(spoil=True), x)
    assert [rule for _, rule, _ in loud(report, "GF303")] == ["GF303"]


class Detector(nn.Module):
    """Sines of the mask's positions are added again to what each attention is asked, as in DETR."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))

    def positions(self, mask: Tensor) -> Tensor:
        steps = mask.cumsum(1).float()[..., None] / 10.0 ** torch.linspace(0, 2, WIDTH // 2)
        return torch.cat((steps.sin(), steps.cos()), dim=-1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        where = self.positions(mask)
        for attention, norm in zip(self.blocks, self.norms, strict=True):
            asked = x + where
            x = norm(x + attention(asked, asked, x, need_weights=False)[0])
        return x


def test_positions_that_are_added_again_are_no_residual() -> None:
    inputs = (torch.randn(8, 6, WIDTH), torch.ones(8, 6, dtype=torch.int64))
    sites = gradflow.inspect(Detector(), inputs).residuals
    assert list(sites.kind) == ["identity"] * 4
    assert list(sites.name) == [""] * 4


def test_an_input_that_is_added_again_is_a_residual() -> None:
    class Injected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = x = torch.tanh(x.float() / 255)
            for layer in self.layers:
                h = torch.relu(layer(h)) + x
            return h

    assert len(gradflow.inspect(Injected(), torch.randn(8, WIDTH)).residuals) == 3


def detr(width: int) -> tuple[nn.Module, dict[str, Tensor]]:
    backbone = tf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = tf.DetrConfig(
        backbone_config=backbone,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=6,
    )
    mask = {"pixel_mask": torch.ones(4, 64, 64, dtype=torch.int64)}
    return tf.DetrForObjectDetection(config), images(64) | mask


@pytest.mark.parametrize("width", [32, 64])
def test_detr_has_its_blocks_and_no_others(width: int) -> None:
    torch.manual_seed(0)
    report = gradflow.inspect(*detr(width))
    # One backbone block, encoder 2 layers of 2 adds, decoder 2 of 3; the first decoder layer's queries are no data
    # yet, so that its self-attention and its cross-attention have nothing made from the skip to add.
    assert [site for site in report.residuals.name if "attn" in site] == []
    assert len(report.residuals) == 1 + 4 + 6 - 2
    assert loud(report, "GF101", "GF102") == []


def stages(widths: tuple[int, ...], *, blocks: int = 2, faulty: str = "") -> nn.Module:
    """Residual stages whose branches draw weights of one deviation whatever the width, behind a LayerScale."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.scale = nn.GroupNorm(1, width), nn.Parameter(torch.full((width, 1, 1), 1e-5))
            self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))

    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 2, 2), *(Block(width) for _ in range(blocks))]
        before = width
    model = nn.Sequential(*layers)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        if faulty and name == f"{faulty}.down.weight":
            nn.init.normal_(parameter, std=1e-4)
    return model


def test_a_stage_whose_width_makes_its_branches_small_is_no_fault() -> None:
    report = gradflow.inspect(stages((8, 64, 128, 512)), torch.randn(8, 3, 32, 32))
    rho = report.residuals.rho
    assert rho[:2].max() < 0.05 * rho.quantile(0.75)
    assert loud(report, "GF201") == []


def test_a_block_that_stands_out_in_its_stage_is_one() -> None:
    report = gradflow.inspect(stages((64, 64), blocks=3, faulty="2"), torch.randn(8, 3, 32, 32))
    assert loud(report, "GF201") == [("warning", "GF201", "2")]


def test_poolformer_is_silent() -> None:
    torch.manual_seed(0)
    model = tf.PoolFormerForImageClassification(tf.PoolFormerConfig())
    assert loud(gradflow.inspect(model, images(32))) == []


def test_mra_without_its_kernel_says_what_is_true() -> None:
    """Its attention then returns zeros_like(query): query, key and value do nothing, and no op cut them off."""
    torch.manual_seed(0)
    config = tf.MraConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    found = loud(gradflow.inspect(tf.MraModel(config), tokens()), "GF103")
    place = "encoder.layer.0.attention.self"
    assert [row for row in found if place in row[2]] == [("warning", "GF103", place)]
