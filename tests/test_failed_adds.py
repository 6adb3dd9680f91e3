"""A residual add that fails for its shapes: the block, both shapes, who changed them, and a projection that works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import gradflow
from gradflow.cli import app
from gradflow.errors import ModelError
from gradflow.failed_add import FailedAdd, ResidualShapeError, ShapeChange, advice, sentence
from gradflow.recording.projections import Layout, projection, stride_for
from gradflow.reporters import JOINT_REPORTERS
from gradflow.reporters.failed_target import FailedTarget
from gradflow.rules.gf207_shortcut_shape import failed_add_finding

DATA = Path(__file__).parent / "data"


class Joined(nn.Module):
    """A block that adds its body to its shortcut, however ``join`` does it."""

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        join: Callable[[Tensor, Tensor], Tensor] = torch.add,
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x)
        return self.join(skip, self.body(x))


def failed(model: nn.Module, inputs: Any) -> FailedAdd:
    with pytest.raises(ResidualShapeError) as caught:
        gradflow.inspect(model, inputs)
    assert caught.value.exit_code == 3
    assert sentence(caught.value.failed_add) in str(caught.value)
    assert advice(caught.value.failed_add) in str(caught.value)
    return caught.value.failed_add


def fits(found: FailedAdd, stream: Tensor) -> bool:
    """Whether the code that gradflow wrote turns the stream into the branch's shape."""
    made = eval(found.projection, {"nn": nn})
    return bool(made(stream).shape == torch.Size(found.branch_shape))


def conv_body(a: int, b: int, stride: int, *, norm: bool = True, dims: int = 2) -> nn.Sequential:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    norms = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    layers: list[nn.Module] = [conv(a, b, 3, stride, 1), nn.ReLU(), conv(b, b, 3, 1, 1)]
    return nn.Sequential(*layers, *([norms(b)] if norm else []))


class Bottleneck(nn.Module):
    """1x1 reduces, 3x3 strides, 1x1 widens, then squeeze and excitation."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(a, a // 4, 1, bias=False)
        self.middle = nn.Conv2d(a // 4, a // 4, 3, stride, 1, bias=False)
        self.widen = nn.Conv2d(a // 4, b, 1, bias=False)
        self.norm = nn.BatchNorm2d(b)
        self.gate = nn.Conv2d(b, b, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.widen(F.relu(self.middle(F.relu(self.reduce(x))))))
        out = out * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(out, 1)))
        out += x
        return out


class Attention(nn.Module):
    """Pre-norm attention whose heads are merged by a reshape and whose output projection has a wrong width."""

    def __init__(self, width: int, heads: int, out: int | None, value: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v = nn.Linear(width, value or width)
        self.out = nn.Identity() if out is None else nn.Linear(value or width, out)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        mixed = F.scaled_dot_product_attention(*(self.split(p(h)) for p in (self.q, self.k, self.v)))
        return x + self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


class ChannelsLast(nn.Module):
    """A ConvNeXt block: the convolution works channels first, the rest and the stream channels last."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.project(F.gelu(self.expand(h)))


def mlp(a: int, b: int, *, norm: bool = False) -> nn.Sequential:
    layers = [nn.Linear(a, 4 * a), nn.GELU(), nn.Linear(4 * a, b)]
    return nn.Sequential(*layers, *([nn.BatchNorm1d(b)] if norm else []))


def conv2(a: int, b: int, stride: int = 1, kernel: int = 1, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, stride, bias=False, **more)


MENDED: dict[str, tuple[nn.Module, tuple[int, ...], str, str]] = {
    "ResNet": (
        Joined(conv_body(8, 16, 2)), (2, 8, 12, 12),
        "nn.Sequential(nn.Conv2d(8, 16, kernel_size=1, stride=2, bias=False), nn.BatchNorm2d(16))",
        "1.body.0 (conv2d) takes dimension 1 from 8 to 16, dimensions 2 and 3 from 12 to 6",
    ),
    "wider only, no norm": (
        Joined(conv_body(8, 16, 1, norm=False)), (2, 8, 12, 12),
        "nn.Conv2d(8, 16, kernel_size=1, bias=False)", "1.body.0 (conv2d) takes dimension 1 from 8 to 16",
    ),
    "smaller only": (
        Joined(conv_body(8, 8, 3, norm=False)), (2, 8, 13, 9),
        "nn.Conv2d(8, 8, kernel_size=1, stride=3, bias=False)",
        "dimension 2 from 13 to 5, dimension 3 from 9 to 3",
    ),
    "two strides": (
        Joined(nn.Sequential(nn.Conv2d(8, 8, 3, (2, 1), 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))),
        (2, 8, 12, 12), "nn.Conv2d(8, 8, kernel_size=1, stride=(2, 1), bias=False)",
        "takes dimension 2 from 12 to 6",
    ),
    "bottleneck": (
        Bottleneck(16, 32, 2), (2, 16, 8, 8),
        "nn.Sequential(nn.Conv2d(16, 32, kernel_size=1, stride=2, bias=False), nn.BatchNorm2d(32))",
        "1.middle (conv2d) takes dimensions 2 and 3 from 8 to 4 and 1.widen (conv2d) takes dimension 1 from 4 to 32",
    ),
    "pooled": (
        Joined(nn.Sequential(conv_body(8, 8, 1), nn.MaxPool2d(2))), (2, 8, 8, 8),
        "nn.Sequential(nn.Conv2d(8, 8, kernel_size=1, stride=2, bias=False), nn.BatchNorm2d(8))",
        "1.body.1 (max_pool2d) takes dimensions 2 and 3 from 8 to 4",
    ),
    "upsampling": (
        Joined(nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))),
        (2, 8, 6, 6), "nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, kernel_size=1, bias=False))",
        "1.body.0 (conv_transpose2d) takes dimension 1 from 8 to 4, dimensions 2 and 3 from 6 to 12",
    ),
    "upsampling only": (
        Joined(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=3))),
        (2, 8, 5, 5), "nn.Upsample(scale_factor=3)", "takes dimensions 2 and 3 from 5 to 15",
    ),
    "1-d": (
        Joined(conv_body(8, 16, 2, dims=1)), (2, 8, 30),
        "nn.Sequential(nn.Conv1d(8, 16, kernel_size=1, stride=2, bias=False), nn.BatchNorm1d(16))",
        "1.body.0 (conv1d) takes dimension 1 from 8 to 16, dimension 2 from 30 to 15",
    ),
    "3-d": (
        Joined(conv_body(4, 8, 2, dims=3, norm=False)), (2, 4, 6, 6, 6),
        "nn.Conv3d(4, 8, kernel_size=1, stride=2, bias=False)", "dimensions 2 and 3 and 4 from 6 to 3",
    ),
    "MLP": (Joined(mlp(16, 24)), (4, 16), "nn.Linear(16, 24)", "1.body.2 (linear) takes dimension 1 from 64 to 24"),
    "MLP with a batch norm": (
        Joined(mlp(16, 24, norm=True)), (4, 16),
        "nn.Sequential(nn.Linear(16, 24, bias=False), nn.BatchNorm1d(24))", "1.body.2 (linear)",
    ),
    "feed-forward of tokens": (
        Joined(mlp(16, 24)), (2, 5, 16), "nn.Linear(16, 24)", "1.body.2 (linear) takes dimension 2 from 64 to 24",
    ),
    "attention": (
        Attention(16, 4, 24), (2, 5, 16), "nn.Linear(16, 24)", "1.out (linear) takes dimension 2 from 16 to 24",
    ),
    "attention without an output projection": (
        Attention(16, 4, None, value=24), (2, 5, 16), "nn.Linear(16, 24)",
        "1.v (linear) takes dimension 2 from 16 to 24",
    ),
    "channels last": (
        ChannelsLast(16, 24), (2, 6, 6, 16), "nn.Linear(16, 24)",
        "1.project (linear) takes dimension 3 from 64 to 24",
    ),
    "a shortcut without the stride": (
        Joined(conv_body(8, 16, 2), conv2(8, 16)), (2, 8, 12, 12),
        "nn.Sequential(nn.Conv2d(8, 16, kernel_size=1, stride=2, bias=False), nn.BatchNorm2d(16))",
        "1.body.0 (conv2d) takes dimensions 2 and 3 from 12 to 6",
    ),
    "a shortcut of another width": (
        Joined(conv_body(8, 16, 2), nn.Sequential(conv2(8, 12, 2), nn.BatchNorm2d(12))), (2, 8, 12, 12),
        "nn.Sequential(nn.Conv2d(8, 16, kernel_size=1, stride=2, bias=False), nn.BatchNorm2d(16))",
        "1.body.0 (conv2d) takes dimension 1 from 8 to 16",
    ),
    "only the shortcut strides": (
        Joined(conv_body(8, 16, 1), conv2(8, 16, 2)), (2, 8, 12, 12),
        "nn.Sequential(nn.Conv2d(8, 16, kernel_size=1, bias=False), nn.BatchNorm2d(16))",
        "1.shortcut (conv2d) on the shortcut takes dimensions 2 and 3 from 12 to 6",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("block", "shape", "code", "words"), MENDED.values(), ids=MENDED)
def test_the_projection_mends_it(block: nn.Module, shape: tuple[int, ...], code: str, words: str) -> None:
    stream = torch.randn(shape)
    found = failed(nn.Sequential(nn.Identity(), block, nn.Identity()), stream)
    assert (found.name, found.projection, found.instead) == ("1", code, "")
    assert words in sentence(found)
    assert found.branch_shape != found.skip_shape
    assert fits(found, stream)
    assert found.has_shortcut is (
        "shortcut" in sentence(found) or getattr(block, "shortcut", None) is not None
    )


SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + f": lambda x, f: x + f,
    "f + x": lambda x, f: f + x,
    "f += x": lambda x, f: f.__iadd__(x),
    "f.add_(x)": lambda x, f: f.add_(x),
    "x.clone() += f": lambda x, f: x.clone().add_(f),
    "torch.add": lambda x, f: torch.add(x, f),
    "torch.add(other=)": lambda x, f: torch.add(x, other=f),
    "alpha": lambda x, f: torch.add(x, f, alpha=0.5),
    "x - f": lambda x, f: x - f,
    "scaled": lambda x, f: 0.5 * x + f,
    "scaled branch": lambda x, f: x + 0.1 * f,
    "sum": lambda x, f: sum([x, f]),
    "lerp": lambda x, f: torch.lerp(x, f, 0.5),
    "addcmul": lambda x, f: torch.addcmul(x, f, torch.ones(())),
}


@pytest.mark.parametrize("join", SPELLINGS.values(), ids=SPELLINGS)
def test_however_it_is_written(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    stream = torch.randn(2, 8, 12, 12)
    found = failed(nn.Sequential(Joined(conv_body(8, 16, 2), join=join)), stream)
    assert (found.name, found.skip_shape, found.branch_shape) == ("0", (2, 8, 12, 12), (2, 16, 6, 6))
    assert fits(found, stream)


def test_a_write_into_a_branch_that_cannot_grow() -> None:
    """(N, 16) into (N, 1) in place: torch could broadcast the sum, but not the tensor that is written."""
    found = failed(nn.Sequential(Joined(mlp(16, 1), join=lambda x, f: f.add_(x))), torch.randn(4, 16))
    assert (found.projection, found.changes[0].name) == ("nn.Linear(16, 1)", "0.body.2")


class Wrapping(nn.Module):
    """Passes a failure on as one of its own, from the middle of several frames."""

    def __init__(self, block: nn.Module, *, hide: bool) -> None:
        super().__init__()
        self.block, self.hide = block, hide

    def forward(self, x: Tensor) -> Tensor:
        def run(depth: int) -> Tensor:
            return run(depth - 1) if depth else self.block(x)

        try:
            return run(3)
        except RuntimeError as error:
            if self.hide:
                raise ValueError("the block does not fit") from None
            raise ValueError("the block does not fit") from error


@pytest.mark.parametrize("hide", [False, True])
def test_an_error_that_surfaces_as_another(hide: bool) -> None:
    model = nn.Sequential(Wrapping(Joined(conv_body(8, 16, 2)), hide=hide))
    with pytest.raises(ResidualShapeError) as caught:
        gradflow.inspect(model, torch.randn(2, 8, 12, 12))
    assert caught.value.failed_add.name == "0.block"
    assert caught.value.failed_add.source.startswith("test_failed_adds.py:")
    assert "the block does not fit" in caught.value.trace_text
    assert "torch/nn/modules" not in caught.value.trace_text


def test_the_add_of_the_root_and_in_a_helper() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return SPELLINGS["x + f"](x, self.body(x))

    found = failed(Root(), torch.randn(4, 16))
    assert found.name == ""
    assert sentence(found).startswith("The skip of the model (test_failed_adds.py:")
    assert str(failed_add_finding(found).location) == ""


NOT_MENDED: dict[str, tuple[nn.Module, tuple[int, ...], tuple[str, ...]]] = {
    "flattened": (
        Joined(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 48))), (2, 3, 8, 8),
        ("0.body.2 (flatten)", "number of dimensions"),
    ),
    "no padding": (
        Joined(nn.Sequential(nn.Conv2d(8, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))), (2, 8, 12, 12),
        ("0.body.0 (conv2d) takes dimensions 2 and 3 from 12 to 8", "give 0.body.0 padding=2"),
    ),
    "no padding, and wider": (
        Joined(nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1))), (2, 8, 12, 12),
        ("give 0.body.0 padding=1", "self.shortcut = nn.Conv2d(8, 16, kernel_size=1, bias=False)"),
    ),
    "no padding in one dimension": (
        Joined(nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU())), (2, 8, 30), ("give 0.body.0 padding=1",),
    ),
    "tokens cut off": (
        Joined(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()), join=lambda x, f: x + f[:, 2:]), (2, 9, 8),
        ("0 (getitem) takes dimension 1 from 9 to 7", "dimension 1 differs", "cut, pad or pool the skip"),
    ),
    "the shortcut alone changes the shape": (
        Joined(conv_body(8, 8, 1), nn.AvgPool2d(2)), (2, 8, 12, 12),
        ("0.shortcut (avg_pool2d) on the shortcut", "Take the shortcut away"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("block", "shape", "words"), NOT_MENDED.values(), ids=NOT_MENDED)
def test_no_projection_can_mend_it(block: nn.Module, shape: tuple[int, ...], words: tuple[str, ...]) -> None:
    found = failed(nn.Sequential(block), torch.randn(shape))
    assert found.projection == ""
    said = f"{sentence(found)}. {advice(found)}"
    assert [word for word in words if word not in said] == []


class TwoTowers(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, a))
        self.b = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, b))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.a(x) + self.b(x if y is None else y)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(9, 16))
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.positions


class RaisesBesides(nn.Module):
    """A residual add that fits, and an error elsewhere; one that is caught counts for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return x + F.pad(self.layer(x), (0, 1))
        except RuntimeError:
            x = x + self.layer(x)
        raise KeyError("depth")


class Reshapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.layer(x)).view(7, 7)


OTHERS: dict[str, tuple[nn.Module, Any]] = {
    "two towers of one input": (TwoTowers(8, 4), torch.randn(3, 16)),
    "two inputs": (TwoTowers(8, 4), (torch.randn(3, 16), torch.randn(3, 16))),
    "positions": (Positions(), torch.randn(2, 5, 16)),
    "another op": (Reshapes(), torch.randn(3, 16)),
    "a scale that does not broadcast": (
        Joined(nn.Linear(16, 8), join=lambda x, f: x * f), torch.randn(3, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "inputs"), OTHERS.values(), ids=OTHERS)
def test_any_other_failure_stays_what_it_is(model: nn.Module, inputs: Any) -> None:
    with pytest.raises(ModelError) as caught:
        gradflow.inspect(model, inputs)
    assert not isinstance(caught.value, ResidualShapeError)
    assert "raised at test_failed_adds.py:" in str(caught.value)


def test_an_add_that_the_model_caught_explains_only_what_it_led_to() -> None:
    with pytest.raises(ModelError, match="KeyError") as caught:
        gradflow.inspect(RaisesBesides(), torch.randn(3, 16))
    assert not isinstance(caught.value, ResidualShapeError)


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.BatchNorm1d(16), Joined(mlp(16, 24)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    failed(model, torch.randn(4, 16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks and not model[1]._forward_pre_hooks


SIZES = st.integers(1, 40)


@given(have=SIZES, want=SIZES)
@settings(deadline=None)
def test_a_stride_gives_the_size_and_none_means_that_none_does(have: int, want: int) -> None:
    stride = stride_for(have, want)
    reached = {s for s in range(1, have + 1) if len(range(0, have, s)) == want}
    assert stride in reached if stride is not None else not reached


@given(
    have=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    want=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    batch_norm=st.booleans(),
    first=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_whatever_code_is_written_gives_the_shape(
    have: list[int], want: list[int], batch_norm: bool, first: bool
) -> None:
    layout = Layout(features=1, positions=2) if first else Layout(features=3, positions=0)
    code = projection(have, [have[0], *want[1:]], layout, batch_norm=batch_norm)
    if code:
        made = eval(code, {"nn": nn}).eval()
        assert list(made(torch.zeros(have)).shape) == [have[0], *want[1:]]


FAILED = FailedAdd(
    name="stage.1",
    source="net.py:31",
    place="models/net.py:31",
    skip_shape=(8, 64, 32, 32),
    branch_shape=(8, 128, 16, 16),
    changes=(ShapeChange(name="stage.1.conv1", op="conv2d", sizes=((1, 64, 128), (2, 32, 16), (3, 32, 16))),),
    projection="nn.Conv2d(64, 128, kernel_size=1, stride=2, bias=False)",
    instead="",
)
TARGET = FailedTarget(
    target="models/net.py",
    message=sentence(FAILED),
    traceback="Traceback\n",
    finding=failed_add_finding(FAILED),
    place=FAILED.place,
)


def test_the_finding() -> None:
    finding = failed_add_finding(FAILED)
    assert (finding.rule, finding.severity, str(finding.location)) == ("GF207", "error", "stage.1")
    assert finding.message == (
        "The skip of stage.1 (net.py:31) is 8×64×32×32 and its branch 8×128×16×16, which cannot be added: "
        "stage.1.conv1 (conv2d) takes dimension 1 from 64 to 128, dimensions 2 and 3 from 32 to 16"
    )
    assert f"self.shortcut = {FAILED.projection}" in finding.hint
    assert dict(finding.evidence)["projection"] == FAILED.projection


def test_sarif_has_it_as_a_result() -> None:
    log = json.loads(JOINT_REPORTERS["sarif"]((), (TARGET,)))
    jsonschema.validate(log, json.loads((DATA / "sarif-2.1.0-rtm.5.json").read_text()))
    (result,) = log["runs"][0]["results"]
    rules = log["runs"][0]["tool"]["driver"]["rules"]
    assert (result["ruleId"], rules[result["ruleIndex"]]["id"], result["level"]) == (
        "GF207",
        "GF207",
        "error",
    )
    (location,) = result["locations"]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "models/net.py"
    assert location["physicalLocation"]["region"]["startLine"] == 31
    assert location["logicalLocations"][0]["fullyQualifiedName"] == "stage.1"
    assert log["runs"][0]["invocations"][0]["executionSuccessful"] is False


def test_the_other_forms_have_it() -> None:
    case = ElementTree.fromstring(JOINT_REPORTERS["junit"]((), (TARGET,))).find(".//testcase")
    assert case is not None and case.get("name") == "GF207 shortcut-shape"
    assert case.find("error") is not None
    github = JOINT_REPORTERS["github"]((), (TARGET,))
    assert github.startswith("::error file=models/net.py,line=31,title=GF207 shortcut-shape at stage.1::")
    (entry,) = json.loads(JOINT_REPORTERS["gitlab"]((), (TARGET,)))
    assert (entry["check_name"], entry["location"]["lines"]["begin"]) == ("GF207", 31)
    assert "GF207 shortcut-shape | stage.1" in JOINT_REPORTERS["markdown"]((), (TARGET,))


MODEL = """\
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, 2, 1)

    def forward(self, x):
        return x + torch.relu(self.conv(x))


model = nn.Sequential(nn.Conv2d(3, 8, 1), Block())
example_inputs = torch.randn(2, 3, 8, 8)
"""


def command(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.stdout, done.stderr


def test_the_commands_exit_with_3_and_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL, encoding="utf-8")
    code, out, err = command("inspect", "net.py")
    assert (code, out) == (3, "")
    assert "nn.Conv2d(8, 16, kernel_size=1, stride=2, bias=False)" in err and 'net.py", line 11' in err

    code, out, err = command("inspect", "net.py", "--format", "json")
    (row,) = json.loads(out)["findings"]
    assert (code, row["rule"], row["location"]) == (3, "GF207", "1")

    code, out, _ = command("check", "net.py", "--format", "json")
    (target,) = json.loads(out)["targets"]
    assert (code, target["exit_code"], target["findings"][0]["rule"]) == (3, 3, "GF207")

    code, out, _ = command("check", "net.py", "--format", "json", "--ignore", "GF207")
    assert (code, json.loads(out)["targets"][0]["findings"]) == (3, [])
