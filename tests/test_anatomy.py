"""``gradflow anatomy``: rows, sections, every form, and the command."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from torch import nn
from typer.testing import CliRunner

import gradflow
from gradflow import trace_file
from gradflow.cli import app
from gradflow.errors import UsageError
from gradflow.report import Report
from gradflow.reporters import anatomy
from gradflow.reporters.anatomy_facts import facts
from gradflow.reporters.anatomy_forms import anatomy_reporters
from gradflow.reporters.anatomy_rows import ONE_BY_ONE, skeleton_rows
from gradflow.reporters.anatomy_stream import path_chart
from gradflow.reporters.op_text import branch_text
from gradflow.reporters.screen import Screen, encodable
from gradflow.trace_model import Ablation, BranchAblation, Removal
from tests.screens import SCREENS, make_finding, make_report
from tests.test_import_walls import SLOW_TO_LOAD, loaded_by
from tests.traces import make_residual, make_trace

EVERY = pytest.mark.parametrize("name", [*SCREENS, "anatomy"])


def pre_norm(blocks: int = 6, *, ablated: bool = True, **changes: Any) -> Report:
    """A normed stream, each block with its split of the gradient, ablated on three batches."""
    sites = [
        make_residual(
            f"h.{at}",
            at,
            rho=1 / math.sqrt(at + 1),
            source_variance=1.0 + at,
            variance=2.0 + at,
            path_share=1 / (at + 2),
            branch_gain=1 / math.sqrt(at + 1),
            gradient_cosine=0.01,
            angular_distance=math.atan(1 / math.sqrt(at + 1)) / math.pi,
            block_influence=1 - 1 / math.hypot(1, 1 / math.sqrt(at + 1)),
            norm_placement="before",
            previous=at - 1 if at else None,
            **changes,
        )
        for at in range(blocks)
    ]
    trace = make_trace(residuals=sites)
    if not ablated:
        return make_report(trace)
    branches = [
        BranchAblation(
            order=at,
            changes=tuple(noise + 0.3 / (at + 1) for noise in (-0.06, 0.0, 0.06)),
            output_changes=(0.5 / (at + 1),) * 3,
        )
        for at in range(blocks - 1)
    ]
    branches.append(
        BranchAblation(order=blocks - 1, note="its add was not found again when the step was repeated")
    )
    ablation = Ablation(
        order="greedy",
        measure="loss",
        varied="batches",
        losses=(2.3, 2.2, 2.4),
        branches=tuple(branches),
        removals=(Removal(order=blocks - 2, changes=(0.05,) * 3, output_changes=(0.1,) * 3),),
        forwards=27,
    )
    return make_report(replace(trace, ablation=ablation))


def screen(report: Report, width: int = 80, **changes: Any) -> str:
    return anatomy.render(report, Screen(width=width, command="gradflow anatomy model.py", **changes))


def named(name: str) -> Report:
    return pre_norm() if name == "anatomy" else SCREENS[name]()


@pytest.mark.parametrize("width", [80, 140])
def test_the_screen_looks_as_agreed(golden: Callable[[str, str], None], width: int) -> None:
    golden(f"anatomy-{width}.txt", screen(pre_norm(), width))


@EVERY
@pytest.mark.parametrize("width", [60, 80, 140, 160])
@pytest.mark.parametrize("show_all", [False, True])
def test_no_line_is_wider_than_the_screen(name: str, width: int, show_all: bool) -> None:
    assert max(cell_len(line) for line in screen(named(name), width, show_all=show_all).splitlines()) <= width


@EVERY
def test_colour_adds_nothing_but_colour(name: str) -> None:
    coloured = screen(named(name), 100, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == screen(named(name), 100)


@pytest.mark.parametrize("name", [name for name in (*SCREENS, "anatomy") if name != "awkward_names"])
def test_an_ascii_terminal_gets_the_same_lines(name: str) -> None:
    plain = screen(named(name), 140)
    text = encodable(plain, "ascii")
    assert "\\u" not in text
    assert [len(line) for line in text.splitlines()] == [len(line) for line in plain.splitlines()]


@EVERY
def test_every_form_is_written(name: str) -> None:
    forms = anatomy_reporters(Screen())
    assert list(forms) == ["table", "json", "csv", "markdown"]
    report = named(name)
    plain = json.loads(forms["json"](report), parse_constant=pytest.fail)
    assert len(plain["residuals"]) == len(report.trace.residuals)
    assert forms["csv"](report).count("\n") == len(report.trace.residuals) + 1
    assert forms["markdown"](report).startswith("## gradflow anatomy: ")


def test_json_holds_what_the_screen_shows() -> None:
    plain = json.loads(anatomy_reporters(Screen())["json"](pre_norm()))
    (stream,) = plain["streams"]
    assert stream["effective_depth"] == pytest.approx(sum(1 / (at + 2) for at in range(6)))
    assert stream["growth"][0]["law"] == "linear"
    assert plain["ablation"][0]["verdict"] == "worse"
    assert plain["agreement"][0] == {
        "measure": "rho",
        "blocks": 5,
        "spearman": pytest.approx(1.0),
        "kendall": pytest.approx(1.0),
        "output_spearman": pytest.approx(1.0),
        "output_kendall": pytest.approx(1.0),
    }


def test_a_hundred_blocks_stand_on_one_screen_and_a_finding_stands_alone() -> None:
    report = pre_norm(100, ablated=False)
    assert len(screen(report, 140).splitlines()) < 45
    finding = make_finding("GF201", location=gradflow.Location(first="h.70"))
    rows, left_out, folded = skeleton_rows(replace(report, findings=(finding,)))
    assert [row.cells["name"] for row in rows] == ["h.0–69", "h.70", "h.71–99"]
    assert [row.mark for row in rows] == [None, finding.severity, None]
    assert (left_out, folded) == (0, True)


def test_a_short_model_has_a_line_a_block() -> None:
    rows, _, folded = skeleton_rows(pre_norm(ONE_BY_ONE))
    assert (len(rows), folded) == (ONE_BY_ONE, False)
    assert rows[3].cells["rho"] == "0.5"
    assert rows[3].cells["share"] == "20%"
    assert rows[3].cells["growth"] == "×1.25"
    assert rows[3].cells["without"] == "+0.075"


def test_a_model_without_residual_sites_gets_a_sentence_and_its_verdict() -> None:
    text = screen(SCREENS["vanishing"]())
    assert "has no residual site" in text
    assert "vanishing gradient" in text
    assert "gradflow inspect model.py" in text
    assert "Residual skeleton" not in text


def test_an_unmatched_site_is_said() -> None:
    text = " ".join(screen(pre_norm()).split())
    assert "not measured for h.5: its add was not found again when the step was repeated" in text
    assert "least harmful first, change of the loss with all so far gone: h.4 +0.05" in text


def test_nested_and_parallel_sites_are_told_apart() -> None:
    sites = [make_residual("a.inner", 0, parent=1), make_residual("a", 1), make_residual("b", 2, branches=2)]
    rows, _, _ = skeleton_rows(make_report(make_trace(residuals=sites)))
    assert [row.cells["name"] for row in rows] == ["└ a.inner", "a", "b"]
    assert [row.cells["kind"] for row in rows] == ["identity", "identity", "2 parallel"]


def said(**changes: Any) -> dict[str, str]:
    return dict(facts(make_report(make_trace(residuals=[make_residual("b.0", 0, **changes)]))))


def test_design_facts() -> None:
    assert said(norm_placement="after")["norm"] == "after the add (post-norm): the one site"
    assert "no gradient passes where the sum is below it" in said(activation_after="relu")["activation"]
    assert said(activation_after="gelu")["activation"] == "gelu after the add in the one site"
    assert said(rho=0.0, opened_by=("b.0.gate",))["gates"] == "at zero in the one site, opened by b.0.gate"
    assert "nothing gets a gradient" in said(rho=0.0)["gates"]
    assert said(resets_stream=True, shortcut=("1x1", "norm"))["resets"].endswith(
        "b.0, the shortcut being 1x1 and norm"
    )
    assert (
        said(branch_scale=0.1, branch_factors=("channels",))["factors"]
        == "0.1 on the branch (channels) in the one site"
    )
    assert said(kind="concat")["joined"] == "by concatenation: the one site"
    assert said() == {}


@pytest.mark.parametrize(
    ("ops", "text"),
    [
        (
            ("layer_norm", "linear", "linear", "linear", "scaled_dot_product_attention", "linear"),
            "LN 3·lin attn lin",
        ),
        (("pow", "mean", "rsqrt", "linear", "silu", "linear", "linear"), "RMS lin silu 2·lin"),
        (("conv2d", "batch_norm", "relu", "24 more"), "conv BN relu …"),
        (("matmul", "softmax", "matmul"), "attn"),
        ((), ""),
    ],
)
def test_a_branch_in_short(ops: tuple[str, ...], text: str) -> None:
    assert branch_text(ops) == text


def test_the_chart_of_path_lengths_is_to_scale() -> None:
    lines = [line.plain for line in path_chart((0.25, 0.5, 0.25), 80)]
    assert lines[0].split("┤")[1].split() == ["██"]
    assert lines[2].split("│")[1].split() == ["██"] * 3
    assert lines[0].split()[0] == "50%"
    assert lines[-1].split() == ["0", "1", "2", "branches"]
    assert path_chart((1.0,), 80) == []
    wide = path_chart([1 / 300] * 300, 80)
    assert wide == []
    assert max(line.cell_len for line in path_chart([1 / 100] * 100, 80)) <= 80


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


def test_python_has_it_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *(Block() for _ in range(4)))
    report = gradflow.inspect(model, torch.randn(6, 8), ablate="greedy", ablate_top=2, paths=True)
    text = report.anatomy(width=100)
    for words in ("Residual skeleton", "Stream", "Least useful", "Design", "Ablation", "greedy", "exact"):
        assert words in text
    assert list(report.ablation["removal"].dropna()) == [1, 2] or set(
        report.ablation["removal"].dropna()
    ) == {1, 2}
    with pytest.raises(UsageError, match="ablate='all'"):
        gradflow.inspect(model, torch.randn(6, 8), ablate="all")
    with pytest.raises(UsageError, match="ablate_top=2"):
        gradflow.inspect(model, torch.randn(6, 8), ablate_top=2)


MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))

model = nn.Sequential(nn.Linear(8, 8), *(Block() for _ in range(3)))
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_a_saved_anatomy_is_shown_again(tmp_path: Path, model_file: Path) -> None:
    folder = tmp_path / "saved"
    code, first, _ = invoke("anatomy", model_file, "--ablate", "--csv", folder, "--input", "4x8")
    assert code == 0
    assert "Ablation  3 branches left out" in first
    assert (folder / "ablation.csv").read_text().count("\n") == 4
    again = invoke("anatomy", folder / "trace.json")
    assert again == (0, first, "")


def test_what_needs_a_model_is_refused_for_a_saved_trace(tmp_path: Path) -> None:
    saved = tmp_path / "trace.json"
    trace_file.save(pre_norm().trace, saved)
    code, _, error = invoke("anatomy", saved, "--ablate", "--input", "8x8")
    assert code == 2
    assert "holds no model to run: leave out --input, --ablate" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ablate-top", "3"), "add --ablate greedy"),
        (("--ablate=all",), "it takes each"),
        (("--ablate", "evry"), "--ablate 'evry': it takes each"),
        (("--format", "sarif"), "--format takes table, json, csv, markdown"),
    ],
)
def test_a_wrong_option_is_one_sentence(model_file: Path, arguments: tuple[str, ...], words: str) -> None:
    code, out, error = invoke("anatomy", model_file, *arguments)
    assert (code, out) == (2, "")
    assert words in error


def test_what_was_asked_for_and_cannot_be_had_is_said(tmp_path: Path) -> None:
    plain = tmp_path / "plain.py"
    plain.write_text("from torch import nn\nmodel = nn.Sequential(nn.Linear(8, 8), nn.Tanh())\n")
    code, out, error = invoke("anatomy", plain, "--ablate", "--input", "4x8")
    assert code == 0
    assert "Sequential has no residual site" in out
    assert "nothing was ablated" in error
    report = pre_norm()
    noted = replace(
        report, trace=replace(report.trace, paths_note="the model differentiates inside its forward")
    )
    assert "exact   not measured: the model differentiates inside" in screen(noted, 140)


def test_the_cost_of_the_greedy_order_is_said_first(model_file: Path) -> None:
    code, _, error = invoke("anatomy", model_file, "--ablate", "greedy", "--input", "4x8")
    assert code == 0
    assert error.startswith("gradflow: greedy ablation of 3 branches: 6 forwards, about 1 s")


def test_a_terminal_sees_a_bar(model_file: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gradflow", "anatomy", str(model_file), "--ablate", "--input", "4x8"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=theirs, timeout=120)
    os.close(theirs)
    seen = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "of 3 forwards" in seen
    assert "━" in seen


def test_a_saved_trace_needs_no_torch(tmp_path: Path) -> None:
    saved = tmp_path / "trace.json"
    trace_file.save(pre_norm().trace, saved)
    loaded = loaded_by("-m", "gradflow", "anatomy", str(saved))
    assert "gradflow.reporters.anatomy" in loaded
    assert loaded.isdisjoint(SLOW_TO_LOAD)
