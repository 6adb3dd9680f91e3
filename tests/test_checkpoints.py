"""--checkpoint: every usual layout loads, and whatever does not fit is listed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from gradflow.cli import app
from gradflow.errors import CheckpointError
from gradflow.recording.checkpoints import load_checkpoint


def net(out: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, out))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model": {f"_orig_mod.module.{key}": value for key, value in state.items()}},
    ],
)
def test_torch_files(tmp_path: Path, wrap: Callable[[dict[str, Any]], Any]) -> None:
    trained, fresh = net(), net()
    torch.save(wrap(trained.state_dict()), tmp_path / "weights.pt")
    assert not same(trained, fresh)
    load_checkpoint(fresh, str(tmp_path / "weights.pt"))
    assert same(trained, fresh)


def test_safetensors(tmp_path: Path) -> None:
    trained, fresh = net(), net()
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    load_checkpoint(fresh, str(tmp_path / "weights.safetensors"))
    assert same(trained, fresh)


def test_tied_weights_stored_once(tmp_path: Path) -> None:
    trained, fresh = Tied(), Tied()
    save_file({"embed.weight": trained.embed.weight.detach()}, tmp_path / "weights.safetensors")
    load_checkpoint(fresh, str(tmp_path / "weights.safetensors"))
    assert same(trained, fresh) and fresh.head.weight is fresh.embed.weight


def test_safetensors_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(net().state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match=r"torch-gradflow\[safetensors\]"):
        load_checkpoint(net(), str(tmp_path / "weights.safetensors"))


def test_what_does_not_fit_is_listed_and_nothing_loaded(tmp_path: Path) -> None:
    state = net(out=5).state_dict()
    del state["0.bias"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(9)}
    torch.save(state, tmp_path / "weights.pt")
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, str(tmp_path / "weights.pt"))
    text = str(caught.value)
    assert "1 missing (0.bias)" in text
    assert "9 unexpected (extra.0, extra.1, extra.2, extra.3, extra.4 and 4 more)" in text
    assert "2 of another shape (2.weight is 5×4, the model's 2×4, 2.bias is 5, the model's 2)" in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Unsafe:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere.pt", None, "no such file"),
        ("weights.pt", b"not a checkpoint", "--checkpoint"),
        ("weights.pt", b"", "is not a torch file"),
        ("weights.safetensors", b"nope", "is not a safetensors file"),
        ("weights.pt", {"epoch": 3}, "holds no state dict"),
        ("weights.pt", [1, 2], "holds no state dict"),
        ("weights.pt", {"model": Unsafe()}, "holds more than tensors"),
    ],
)
def test_unreadable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, words: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(net(), str(tmp_path / name))
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "anatomy"])
def test_the_header_names_the_file(tmp_path: Path, command: str) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\nmodel = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))\n"
        "example_inputs = torch.randn(4, 3)\n",
        encoding="utf-8",
    )
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict(), tmp_path / "weights.pt")
    target, weights = str(tmp_path / "model.py"), str(tmp_path / "weights.pt")
    plain = CliRunner().invoke(app, [command, target, "--format", "markdown"])
    loaded = CliRunner().invoke(app, [command, target, "--checkpoint", weights, "--format", "markdown"])
    assert (plain.exit_code, loaded.exit_code) == (0, 0)
    assert "checkpoint" not in plain.stdout.replace("--checkpoint", "")
    screen = CliRunner().invoke(app, [command, target, "--checkpoint", weights], env={"COLUMNS": "400"})
    assert f"checkpoint {weights}" in screen.stdout
    saved = CliRunner().invoke(app, [command, target, "--checkpoint", weights, "--format", "json"])
    assert json.loads(saved.stdout)["run"]["checkpoint"] == weights
