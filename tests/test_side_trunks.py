"""The trunks beside the main one: which they are, what they are called, and that the gain rules look at them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from witness import layer_row

import gradflow
from gradflow.analyzer import analyze
from gradflow.config import Config
from gradflow.findings import Severity
from gradflow.reporters import json_file
from gradflow.reporters.screen import Screen
from gradflow.reporters.terminal import render
from gradflow.trace_file import dumps, loads
from tests.screens import make_report
from tests.traces import make_trace, make_trunk

WIDTH = 16


def tower(depth: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(WIDTH, WIDTH), activation())])


class TwoInputsTwoOutputs(nn.Module):
    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.shared = tower(6), second, tower(4)
        self.head, self.auxiliary = nn.Linear(WIDTH, 3), tower(5)

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        shared = self.shared(self.image(image) * self.text(text))
        return {"logits": self.head(shared), "aux": self.auxiliary(shared)}


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, WIDTH), torch.randn(8, WIDTH)


def described(report: gradflow.Report) -> list[tuple[str, str, str, int]]:
    return [
        (trunk.path, trunk.points[0].name, trunk.points[-1].name, len(trunk.points))
        for trunk in (report.trace.trunk, *report.trace.side_trunks)
    ]


def test_two_inputs_and_two_outputs_have_their_towers() -> None:
    report = gradflow.inspect(TwoInputsTwoOutputs(tower(5)), inputs())
    # The path through most layers is image (6), shared (4) and auxiliary (5), whose last is the head.
    assert described(report) == [
        ("image → aux", "image.0", "auxiliary.6", 14),
        ("text → aux", "text.0", "text.8", 5),
    ]


def test_the_gradients_of_a_side_trunk_are_those_of_its_layers() -> None:
    report = gradflow.inspect(TwoInputsTwoOutputs(tower(5)), inputs())
    (side,) = report.trace.side_trunks
    for point in side.points:
        assert point.gradient_norm == layer_row(report, point.name).gradient_norm
    ((path, summary),) = report.side_profiles
    assert path == side.path
    assert summary.gain == side.points[0].gradient_norm / side.points[-1].gradient_norm


def test_a_tower_of_two_layers_makes_no_trunk() -> None:
    assert gradflow.inspect(TwoInputsTwoOutputs(tower(2)), inputs()).trace.side_trunks == ()


def test_a_gradient_that_vanishes_in_a_side_tower_is_found_there() -> None:
    class Wide(TwoInputsTwoOutputs):
        def __init__(self) -> None:
            super().__init__(tower(12, nn.Sigmoid))
            self.image = tower(14)
            for layer in (*self.image, *self.shared, *self.auxiliary):
                if isinstance(layer, nn.Linear):
                    nn.init.orthogonal_(layer.weight)

    report = gradflow.inspect(Wide(), inputs())
    (found,) = [f for f in report.findings if f.rule == "GF101" and f.severity is Severity.ERROR]
    assert str(found.location).startswith("text.")
    assert found.message.endswith("(on the path text → aux)")
    assert ("path", "text → aux") in found.evidence


class Branching(nn.Module):
    """One input, one output, two towers beside each other that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.long, self.short = tower(1), tower(5), tower(4)
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.long(x), self.short(x)], 1))


class Siamese(nn.Module):
    """The same tower twice: its layers are on the trunk already."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = tower(5), nn.Linear(WIDTH, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.tower(left) - self.tower(right))


class Teacher(nn.Module):
    """A second tower that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = tower(6), tower(5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return self.student(x) - target


class Unrolled(nn.Module):
    """A cell looped over time: each step's input projection uses the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.step, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], WIDTH)
        for t in range(x.shape[1]):
            state = torch.tanh(self.read(x[:, t]) + self.step(state))
        return self.head(state)


@pytest.mark.parametrize(
    ("model", "shapes", "sides"),
    [
        (Branching, [(8, WIDTH)], [("x → loss via short.0", "short.0", "short.6", 4)]),
        (Siamese, [(8, WIDTH)] * 2, []),
        (Teacher, [(8, WIDTH)], []),
        (Unrolled, [(8, 12, WIDTH)], []),
    ],
)
def test_what_counts_as_a_trunk_of_its_own(
    model: Callable[[], nn.Module], shapes: list[tuple[int, ...]], sides: list[Any]
) -> None:
    torch.manual_seed(0)
    given = tuple(torch.randn(shape) for shape in shapes)
    assert described(gradflow.inspect(model(), given))[1:] == sides


class DeepHead(nn.Module):
    """Residual blocks, then a head of five layers behind a pooling: no part of the residual trunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(tower(2) for _ in range(4))
        self.head = nn.Sequential(*tower(5, nn.Sigmoid), nn.Linear(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


def test_a_deep_head_behind_the_trunk_is_a_trunk_of_its_own() -> None:
    report = gradflow.inspect(DeepHead(), torch.randn(8, 4, WIDTH))
    assert described(report) == [("x → loss", "", "", 4), ("x → loss via head.0", "head.0", "head.8", 5)]
    assert any(f.rule == "GF101" and str(f.location).startswith("head.") for f in report.findings)


def test_encoder_and_decoder_of_a_library_have_a_trunk_each() -> None:
    """T5's forward: the encoder reads input_ids, the decoder the shifted labels; they meet in cross attention."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=100,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    ids, labels = torch.randint(1, 99, (2, 8)), torch.randint(1, 99, (2, 8))
    report = gradflow.inspect(T5ForConditionalGeneration(config), {"input_ids": ids, "labels": labels})
    assert described(report) == [
        ("labels → logits", "decoder.block.0.layer.0", "decoder.block.2.layer.2", 9),
        ("input_ids → logits", "encoder.block.0.layer.0", "encoder.block.2.layer.1", 6),
    ]
    # Given as both, one tensor goes by one name: where each trunk begins tells them apart.
    report = gradflow.inspect(T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids})
    assert [path for path, *_ in described(report)] == [
        "input_ids → logits",
        "input_ids → logits via encoder.block.0.layer.0",
    ]


def two_trunks() -> Any:
    side = replace(make_trunk([1e-9, 1e-6, 1.0, 1.0], names=["b.0", "b.1", "b.2", "b.3"]), path="b → loss")
    main = replace(make_trunk([1.0, 1.1, 1.2]), path="a → loss")
    return replace(make_trace(trunk=main), side_trunks=(side,))


def test_a_trace_keeps_its_side_trunks() -> None:
    trace = two_trunks()
    assert loads(dumps(trace)) == trace


def test_the_rules_look_at_every_trunk_of_a_saved_trace() -> None:
    report = analyze(two_trunks(), Config())
    (found,) = [f for f in report.findings if f.rule == "GF101"]
    assert found.location.first.startswith("b.")
    assert analyze(replace(two_trunks(), side_trunks=()), Config()).findings == ()


def test_forms_tell_the_side_trunks() -> None:
    report = make_report(two_trunks())
    plain = json.loads(json_file.render(report))
    assert [side["path"] for side in plain["side_profiles"]] == ["b → loss"]
    assert plain["profile"]["path"] == "a → loss"
    for width in (60, 80, 140):
        shown = render(report, Screen(width=width))
        assert "beside it  b → loss: b.0–b.3 · first / last 1e-09" in shown
        assert all(len(line) <= width for line in shown.splitlines())
