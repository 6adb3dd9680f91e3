"""The line that defines a module's class: of the user's own files only, whatever the class was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from gradflow import trace_file
from gradflow.recording.execution import record
from gradflow.recording.sources import class_sources
from gradflow.recording.target import TargetOptions, load_target

FILE = '''\
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


class Loud(nn.ReLU):
    """A class without a method of its own."""


def build_model():
    @torch.no_grad
    def unused():
        return None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(), Loud(), Block())

        def forward(self, x):
            return self.blocks(x)

    return Net()


def example_inputs():
    return torch.ones(2, 4)
'''
EXPECTED = {"": 23, "blocks.0": 5, "blocks.1": 14, "blocks.2": 5}


def sources_of(target: str) -> dict[str, str]:
    return dict(record(load_target(target, TargetOptions())).run.sources)


def test_classes_of_the_users_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "net.py").write_text(FILE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = sources_of("models/net.py")
    assert found == {name: f"models/net.py:{line}" for name, line in EXPECTED.items()}
    lines = FILE.splitlines()
    assert all(
        lines[int(place.rpartition(":")[2]) - 1].strip().startswith("class") for place in found.values()
    )


def test_a_file_elsewhere_keeps_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(FILE, encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert sources_of("../net.py")["blocks.0"] == f"{(tmp_path / 'net.py').resolve().as_posix()}:5"


def test_two_files_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, above in (("a", ""), ("b", "\n" * 10)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text(above + FILE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    models = [load_target(f"{folder}/net.py", TargetOptions()) for folder in ("a", "b")]
    found = [dict(record(model).run.sources)["blocks.0"] for model in models]
    assert found == ["a/net.py:5", "b/net.py:15"]


def test_a_redefined_class_is_found_at_its_own_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = FILE[FILE.index("class Block") : FILE.index("class Loud")]
    again = FILE.replace("class Loud", f"First = Block\n\n\n{block}class Loud")
    again = again.replace("Block(), Loud(), Block()", "Block(), Loud(), First()")
    (tmp_path / "net.py").write_text(again, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = sources_of("net.py")
    starts = [number for number, line in enumerate(again.splitlines(), 1) if line.startswith("class Block")]
    assert len(starts) == 2
    assert [found["blocks.2"], found["blocks.0"]] == [f"net.py:{start}" for start in starts]


def from_exec() -> nn.Module:
    space: dict[str, object] = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x\n", space)
    return space["Made"]()  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 2),
        from_exec(),
        type("Dynamic", (nn.Module,), {"__module__": "no_such_module"})(),
    ],
    ids=["torch's own", "exec", "type()"],
)
def test_what_has_no_source_of_the_users_is_left_out(module: nn.Module) -> None:
    assert class_sources({module: ""}) == ()


def test_sources_survive_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(FILE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    trace = record(load_target("net.py", TargetOptions()))
    assert trace_file.loads(trace_file.dumps(trace)).run.sources == trace.run.sources
