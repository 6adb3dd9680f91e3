"""What a person gets wrong, and what a model does to the process: one clear sentence, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gradflow
from gradflow.cli import app

HEADER = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
    def forward(self, x):
        {forward}
        return self.head(self.encoder(x).relu())
model, example_inputs = Net(), torch.randn(4, 8)
"""
PACKAGE = str(Path(gradflow.__file__).parent)


def net(forward: str = "pass", after: str = "") -> str:
    """A healthy model with a line of its own in forward, and lines after it."""
    return NET.format(forward=forward) + after


class Folder:
    """A working folder with a model in it, and gradflow run there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stdout, self.stderr, self.code = "", "", -1

    def write(self, source: str | bytes, name: str = "model.py") -> None:
        text = source if isinstance(source, bytes) else (HEADER + textwrap.dedent(source)).encode()
        (self.path / name).write_bytes(text)

    def inspect(self, *arguments: str) -> None:
        result = CliRunner().invoke(app, ["inspect", *arguments])
        self.code, self.stdout, self.stderr = result.exit_code, result.stdout, result.stderr

    @property
    def sentence(self) -> str:
        """The last thing said, which is all that is said where it is not the model's own traceback."""
        lines = self.stderr.splitlines()
        start = max(i for i, line in enumerate(lines) if line.startswith("gradflow: "))
        return "\n".join(lines[start:])

    def refused(self, code: int, *words: str) -> None:
        """One sentence with these words, the exit code, and nothing else anywhere."""
        assert (self.code, self.stdout) == (code, ""), self.stdout + self.stderr
        for word in words:
            assert word in self.sentence
        if code == 2:
            assert self.stderr.startswith(self.sentence)
        assert PACKAGE not in self.stderr, "frames of gradflow's own"
        assert {path.suffix for path in self.path.iterdir()} <= {".py", ".pt", ".safetensors"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.chdir(tmp_path)
    return Folder(tmp_path)


@pytest.fixture(autouse=True)
def _torch_as_found() -> Iterator[None]:
    """Model files may set what holds for the whole process, which is this one."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)


WRITING = ("--csv", "out", "--output", "report.txt")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("modle.py", ["no such file: modle.py", "did you mean model.py"]),
        ("no/such/model.py", ["no such file", "there is no directory no/such"]),
        (".", ["is a directory (model.py)", "name the file"]),
        ("model.py:Nett", ["model.py has no 'Nett'", "model.py:Net"]),
        ("model.py:example_inputs", ["is a Tensor", "an nn.Module"]),
        ("no_such_module:Net", ["no module named 'no_such_module'"]),
        ("not a module", ["'not a module' is no target"]),
        ("torch.nn:Linear", ["torch.nn:Linear needs arguments", "in_features, out_features"]),
    ],
)
def test_no_such_target(folder: Folder, target: str, words: list[str]) -> None:
    folder.write(net())
    folder.inspect(target, *WRITING)
    folder.refused(2, *words)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def broken(:", ["model.py, line 4", "cannot import it"]),
        ("if True:\n\tx = 1\n        y = 2", ["model.py, line 6", "tabs and spaces"]),
        (b"\x00\x01\x02", ["null bytes"]),
        (b"name = '\xe9'\n", ["model.py, line 1", "utf-8"]),
        ("import no_such_package.part",
         ["imports 'no_such_package' (at model.py:4)", "install no_such_package"]),
        ("from torch.nn import Lineer", ["model.py:4", "cannot import name 'Lineer'"]),
        ("x = 1", ["holds no model"]),
        (b"", ["holds no model"]),
        ("a = nn.Linear(2, 2)\nb = nn.Linear(2, 2)\nc = nn.Linear(2, 2)",
         ["holds 3 models", "gradflow inspect model.py:a", "gradflow inspect model.py:c"]),
        ("class Net(nn.Module):\n    def __init__(self, width, depth):\n        super().__init__()\n"
         "    def forward(self, x): return x",
         ["without arguments", "model.py:Net   needs width, depth", "build_model()"]),
    ],
)  # fmt: skip
def test_files_that_hold_no_one_model(folder: Folder, source: str | bytes, words: list[str]) -> None:
    folder.write(source)
    folder.inspect("model.py", *WRITING)
    folder.refused(2, *words)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("table = {}\ntable['a']", ["importing model.py raised at model.py:5", "KeyError: 'a'"]),
        ("raise SystemExit('bye')", ["asked Python to exit (bye)", "at model.py:4", "__main__"]),
        ("import argparse\np = argparse.ArgumentParser()\np.add_argument('data')\np.parse_args()",
         ["asked Python to exit (2)", "at model.py:7"]),
        ("raise MemoryError", ["importing model.py ran out of memory at model.py:4"]),
        ("class Net(nn.Module):\n    def __init__(self): open('no')\n    def forward(self, x): return x",
         ["building model.py:Net raised at model.py:5", "FileNotFound"]),
        (net().replace("example_inputs", "unused") + "\ndef get_inputs(): raise OSError('no data')",
         ["get_inputs() raised at model.py:14: OSError: no data"]),
        (net().replace("example_inputs", "unused") + "\ndef get_inputs(): raise SystemExit('no data')",
         ["the code of model.py raised at model.py:14: SystemExit: no data"]),
        (net(after="\ndef make_optimizer(m): return m.lr"), ["make_optimizer()", "at model.py:14", "lr"]),
        (net("raise ValueError('boom')"), ["the model's forward raised at model.py:10: ValueError: boom"]),
        (net("raise ValueError"), ["the model's forward raised at model.py:10: ValueError"]),
        (net("assert x.shape[1] == 9"), ["the model's forward raised at model.py:10: AssertionError"]),
        (net("raise SystemExit(0)"), ["the model's forward raised at model.py:10: SystemExit: 0"]),
        (net("return self(x)"), ["the model's forward raised at model.py:10: RecursionError"]),
        ("class Net(nn.Module): pass\nmodel, example_inputs = Net(), torch.ones(2)", ['"forward" function']),
        (net("h = self.encoder(x).sigmoid(); y = self.head(h); h.add_(1); return y"),
         ["the model's backward raised", "modified by an inplace operation"]),
        (net(after="\ndef loss(outputs, inputs): return F.cross_entropy(outputs, inputs)"),
         ["the model's loss raised at model.py:14"]),
        (net("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')"),
         ["out of memory in the forward", "--batch-size"]),
        (net("raise RuntimeError(\"DefaultCPUAllocator: can't allocate memory: you tried 12 bytes\")"),
         ["out of memory in the forward", "--batch-size"]),
        (net("raise MemoryError"), ["out of memory in the forward"]),
        (net("torch.empty(10**15)"), ["out of memory in the forward"]),
    ],
)  # fmt: skip
def test_code_that_raises(folder: Folder, source: str, words: list[str]) -> None:
    folder.write(source)
    folder.inspect("model.py", *WRITING)
    folder.refused(3, *words)


def test_a_model_that_raises_whatever_it_gets_puts_its_inputs_in_doubt(folder: Folder) -> None:
    folder.write(net("raise RuntimeError('no graph')").replace("example_inputs", "unused"))
    folder.inspect("model.py", *WRITING)
    folder.refused(3, "model.py:10: RuntimeError: no graph; the inputs were inferred (8×8)", "--input")
    assert folder.stderr.count("the inputs were inferred") == 1


def test_a_note_of_the_users_own_stays_in_the_traceback(folder: Folder) -> None:
    folder.write(net("e = RuntimeError('no graph'); e.add_note('call reset() '+'first'); raise e"))
    folder.inspect("model.py", *WRITING)
    folder.refused(3, "RuntimeError: no graph")
    assert folder.stderr.count("call reset() first") == 1 and "reset" not in folder.sentence


BACKWARD = """
class Odd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, gradient): {backward}
"""


@pytest.mark.parametrize(
    ("backward", "words"),
    [
        ("raise ValueError('no way back')", ["the model's backward raised at model.py:9", "no way back"]),
        ("return gradient[:1]", ["the model's backward raised", "OddBackward", "invalid gradient"]),
        ("raise MemoryError", ["out of memory in the backward"]),
    ],
)
def test_a_backward_that_raises(folder: Folder, backward: str, words: list[str]) -> None:
    folder.write(BACKWARD.format(backward=backward) + net("return self.head(Odd.apply(self.encoder(x)))"))
    folder.inspect("model.py", *WRITING)
    folder.refused(3, *words)


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ("model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))", "--input 4x7",
         ["layer 0 (Linear)", "got 4×7 float32", "wants (…, 8) float32"]),
        ("model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(7200, 4))", "--input 4x3x28x28",
         ["layer 2 (Linear)", "got 4×5408", "wants (…, 7200)"]),
        ("model = nn.Linear(8, 4)", "--input 4x7", ["Linear's own forward got 4×7", "wants (…, 8)"]),
        (net(), "--input 4x8:int64", ["layer encoder (Linear)", "got 4×8 int64", "wants (…, 8) float32"]),
        (net(), "--input y=4x8", ["forward takes no 'y', only x"]),
        (net(), "--input 4xfoo", ["'4xfoo'", "8x3x32x32"]),
        (net(), "--input -1x8", ["'-1x8'", "8x3x32x32"]),
        (net(), "--input 4x8:float33", ["'float33' is not a dtype", "bfloat16"]),
        (net(), "--input 99999999999x8", ["99999999999x8", "cannot be made"]),
        (net(), "--input 0x8", ["the inputs hold no sample (0×8)"]),
        (net(), "--batch-size 9", ["--batch-size 9 is more than the 4 samples"]),
        (net(after="\nexample_inputs = []"), "", ["the inputs do not fit Net.forward", "--input x=SHAPE"]),
        (net(after="\nexample_inputs = 'cat.png'"), "", ["example_inputs is 'cat.png'", "a tensor, a tuple"]),
        (net(after="\ndef loss(outputs, inputs): return outputs"), "",
         ["loss() of model.py is not a scalar but 4×4", ".mean()"]),
        (net(after="\ndef loss(outputs, inputs): return 3.0"), "", ["is no tensor but a float"]),
        (net(after="\ndef loss(outputs, inputs): pass"), "", ["is no tensor but a NoneType"]),
        (net("return self.encoder(x).argmax(1)"), "", ["returned a 4 int64 tensor", "to differentiate"]),
        (net("return None"), "", ["the model returned None"]),
        ("with torch.device('meta'): model = nn.Linear(2, 2)\nexample_inputs = torch.ones(2, 2)", "",
         ["weight is on the meta device", "no values"]),
        (net(after="\ndef make_optimizer(model): return 3"), "", ["returned a int, not an optimizer"]),
    ],
)  # fmt: skip
def test_inputs_and_losses_that_do_not_fit(
    folder: Folder, source: str, arguments: str, words: list[str]
) -> None:
    folder.write(source)
    folder.inspect("model.py", *arguments.split(), *WRITING)
    folder.refused(2, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--format xml", ["no format 'xml'", "table, json, csv, markdown, sarif"]),
        ("--steps 0", ["'--steps'", "greater than or equal to 1", "gradflow inspect --help"]),
        ("--steps many", ["'--steps'", "integer"]),
        ("--batch-size 0", ["'--batch-size'", "greater than or equal to 1"]),
        ("--seed 99999999999999999999", ["'--seed'", "less than or equal to 4294967295"]),
        ("--fail-on bad", ["'--fail-on'", "'info', 'warning', 'error'"]),
        ("--select GF9", ["'GF9' selects no rule"]),
        ("--loss huber", ["--loss 'huber'", "cross-entropy, mse, sum, probe"]),
        ("--device cuda:77", ["--device 'cuda:77' is not available here", "cpu"]),
        ("--device toaster", ["--device 'toaster' is not available here", "cpu"]),
        ("--dtype int8", ["--dtype 'int8' is not a floating dtype", "bfloat16"]),
        ("--nonsense", ["--nonsense", "gradflow inspect --help"]),
        ("--output no/such/report.txt", ["cannot write no/such/report.txt", "no folder"]),
        ("--output .", ["cannot write .", "it is a folder"]),
        ("--csv model.py", ["cannot write to model.py", "is a file"]),
        ("--csv model.py/out", ["model.py is a file"]),
        ("--csv /proc/gradflow", ["cannot write /proc/gradflow"]),
        ("--output /dev/full", ["cannot write /dev/full: No space left on device"]),
        ("--checkpoint no.pt", ["--checkpoint no.pt: no such file"]),
        ("--checkpoint corrupt.pt", ["--checkpoint corrupt.pt is not a torch file", "damaged"]),
        ("--checkpoint cut.pt", ["--checkpoint cut.pt is not a torch file", "damaged"]),
        ("--checkpoint text.pt", ["text.pt is not a torch file, or is damaged: its bytes cannot be read"]),
        ("--checkpoint corrupt.safetensors", ["corrupt.safetensors is not a safetensors file"]),
        ("--checkpoint object.pt", ["object.pt holds more than tensors", "state_dict"]),
        ("--checkpoint list.pt", ["list.pt holds no state dict"]),
        ("--checkpoint other.pt", ["does not fit the model", "2 missing (encoder.weight, encoder.bias)",
                                   "1 unexpected (extra)", "head.weight is 4×15, the model's 4×16"]),
        ("--checkpoint other.safetensors", ["does not fit the model", "1 unexpected (extra)"]),
    ],
)  # fmt: skip
def test_options_that_are_wrong(folder: Folder, arguments: str, words: list[str]) -> None:
    from safetensors.torch import save_file

    folder.write(net())
    (folder.path / "corrupt.pt").write_bytes(b"not a checkpoint")
    (folder.path / "text.pt").write_bytes(b"hello")
    (folder.path / "cut.pt").write_bytes(b"\x80\x02.")
    (folder.path / "corrupt.safetensors").write_bytes(b"not a checkpoint")
    torch.save(torch.nn.Linear(2, 2), folder.path / "object.pt")
    torch.save([1, 2], folder.path / "list.pt")
    other = {"head.weight": torch.ones(4, 15), "head.bias": torch.ones(4), "extra": torch.ones(1)}
    torch.save(other, folder.path / "other.pt")
    save_file(other, folder.path / "other.safetensors")
    folder.inspect("model.py", *arguments.split())
    folder.refused(2, *words)


DECORATED = net().replace("    def forward", "    @torch.{mode}()\n    def forward")


@pytest.mark.parametrize(
    ("source", "loss", "op"),
    [
        (net("return self.head(self.encoder(x)).detach()"), (), "detach"),
        (net("return self.head(self.encoder(x)).detach()"), ("--loss", "mse"), "detach"),
        (net(after="\ndef loss(outputs, inputs): return outputs.detach().mean()"), (), "detach"),
        (net(after="\ndef loss(outputs, inputs): return outputs.argmax().sum()"), (), "argmax"),
        (DECORATED.replace("{mode}", "no_grad"), (), "no_grad"),
        (DECORATED.replace("{mode}", "no_grad"), ("--loss", "cross-entropy"), "no_grad"),
    ],
)
def test_a_loss_without_a_gradient_is_a_finding(
    folder: Folder, source: str, loss: tuple[str, ...], op: str
) -> None:
    folder.write(source)
    folder.inspect("model.py", "--format", "json", "--fail-on", "error", *loss)
    assert folder.code == 1, folder.stderr
    report = json.loads(folder.stdout)
    assert [(f["rule"], f["severity"]) for f in report["findings"]] == [("GF103", "error")]
    assert (
        "cut after" in report["findings"][0]["message"] and f" by {op} " in report["findings"][0]["message"]
    )


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        (net(after="\nmodel.requires_grad_(False)"), "nothing to train: all 212 parameters are frozen"),
        (
            "model, example_inputs = nn.Tanh(), torch.randn(4, 8)",
            "nothing to train: the model has no parameters",
        ),
    ],
)
def test_nothing_to_train(folder: Folder, source: str, verdict: str) -> None:
    folder.write(source)
    folder.inspect("model.py")
    assert (folder.code, folder.stderr) == (0, "")
    assert f"✓ {verdict}" in folder.stdout
    assert "cpu ·  ·" not in folder.stdout


NESTED = """
class Nested(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.inner = Nested(depth - 1) if depth else nn.Linear(4, 4)
    def forward(self, x):
        return self.inner(x)
model = Nested(200)
"""
SCALAR = """
class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
    def forward(self, t):
        return t * self.factor
model, example_inputs = Scale(), {inputs}
"""
INFERRED = net(after="\ndel example_inputs")


@pytest.mark.parametrize(
    "source",
    [
        "torch.set_default_dtype(torch.float64)\n" + net(),
        "torch.set_default_dtype(torch.bfloat16)\n" + INFERRED,
        INFERRED + "\ntorch.set_default_device('meta')",
        net(after="\ntorch.set_default_device('meta')"),
        "torch.use_deterministic_algorithms(True)\n" + net(),
        "torch.autocast('cpu', dtype=torch.bfloat16).__enter__()\n" + net(),
        "torch.set_grad_enabled(False)\n" + net(),
        net(after="\nexample_inputs = torch.randn(1, 8)"),
        net(after="\nexample_inputs = torch.randn(8)"),
        net("x.add_(1)"),
        net("self.calls = getattr(self, 'calls', 0) + 1; assert self.calls == 1"),
        net("return {'y': self.head(self.encoder(x)), 'name': 'net', 'depth': 3, 'none': None}"),
        net(after="\nmodel(example_inputs).mean().backward()"),
        net(after="\nif __name__ == '__main__': raise SystemExit"),
        "import argparse\nargs = argparse.ArgumentParser().parse_args()\n" + net(),
        SCALAR.format(inputs="torch.tensor(3.0)"),
        SCALAR.format(inputs="(3.0,)"),
        NESTED,
        NESTED + "example_inputs = torch.randn(2, 4)",
        b"\xef\xbb\xbf" + (HEADER + net()).encode(),
        (HEADER + net()).replace("\n", "\r\n").encode(),
        ("# -*- coding: cp1252 -*-\n" + HEADER + net(after="\nname = 'é'")).encode("cp1252"),
    ],
)  # fmt: skip
def test_odd_files_with_healthy_models(folder: Folder, source: str | bytes) -> None:
    folder.write(source)
    folder.inspect("model.py")
    assert (folder.code, folder.stderr) == (0, "")
    assert "✓" in folder.stdout and "✗" not in folder.stdout
    assert [path.name for path in folder.path.iterdir()] == ["model.py"]


@pytest.mark.parametrize(
    "name", ["my model.py", "modèle.py", "2nd-model.v1.py", "torch.py", "random.py", "types.py"]
)
def test_files_with_odd_names(folder: Folder, name: str) -> None:
    folder.write("import random, types\nassert random.random() and types.FunctionType\n" + net(), name)
    folder.inspect(name)
    assert (folder.code, folder.stderr) == (0, "")
    assert "✓ the gradient flows" in folder.stdout


def test_a_model_that_changes_the_folder_does_not_move_the_report(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder.write("import os\nos.chdir('elsewhere')\n" + net())
    folder.inspect("model.py", "--csv", "out", "--output", "report.txt")
    assert folder.stderr == "wrote out\nwrote report.txt\n"
    assert {path.name for path in tmp_path.iterdir()} == {"model.py", "elsewhere", "out", "report.txt"}


def test_a_working_folder_that_cannot_be_written_to(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write(net())
    monkeypatch.chdir("/proc")
    folder.inspect(str(folder.path / "model.py"))
    assert (folder.code, folder.stderr) == (0, "")
    folder.inspect(str(folder.path / "model.py"), "--csv", "out")
    folder.refused(2, "cannot write out")


def test_three_thousand_modules(folder: Folder) -> None:
    folder.write(
        "model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(1000)])\n"
        "example_inputs = torch.randn(4, 8)"
    )
    folder.inspect("model.py")
    assert (folder.code, folder.stderr) == (0, "")
    assert max(map(len, folder.stdout.splitlines())) <= 80


NOISY = """
import atexit, logging, os, sys, threading, warnings
atexit.register(lambda: print("at exit"))
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
threading.Thread(target=lambda: print("a thread")).start()
print("at import")
""" + net(
    "print('in forward'); os.write(1, b'raw\\n'); os.system('echo a child'); logging.info('logged'); "
    "print('kept', file=sys.__stdout__); warnings.warn('careful')"
)


def run(command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A shell command in which G is gradflow."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")
    }
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; G() {{ {sys.executable} -m gradflow "$@"; }}; {command}'],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=kept | {"PYTHONPATH": str(Path(PACKAGE).parent)} | variables,
        encoding="utf-8",
    )


def test_whatever_a_model_prints_standard_output_is_the_report(folder: Folder) -> None:
    folder.write(NOISY)
    done = run("G inspect model.py --format json", folder.path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["run"]["model"] == "Net"
    for said in (
        "at import",
        "a thread",
        "in forward",
        "raw",
        "a child",
        "kept",
        "logged",
        "careful",
        "at exit",
    ):
        assert said in done.stderr


@pytest.mark.parametrize(
    ("variables", "width"),
    [
        ({"TERM": "dumb", "COLUMNS": "40"}, 60),
        ({"NO_COLOR": "1", "COLUMNS": "200"}, 160),
        ({"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, 80),
    ],
)
def test_terminals_and_locales(folder: Folder, variables: dict[str, str], width: int) -> None:
    folder.write(net("return self.head(self.encoder(x).detach())"), "modèle.py")
    done = run("G inspect modèle.py <&-", folder.path, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "GF103 no-gradient" in done.stdout and "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= width
    assert done.stdout.isascii() is ("PYTHONIOENCODING" in variables)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("G rules > /dev/full", 2, "gradflow: cannot write to standard output: No space left on device\n"),
        ("G rules >&-", 0, ""),
        ("G rules 2>&-", 0, ""),
        ("G inspect no.py <&- >&- 2>&-", 2, ""),
        ("G rules | true", 0, ""),
        ("G inspekt m.py", 2, "gradflow: no such command 'inspekt'. Did you mean 'inspect'? "
         "(see gradflow --help)\n"),
        ("G --nothing", 2, "gradflow: no such option: --nothing (see gradflow --help)\n"),
        ("G inspect", 2, "gradflow: missing argument 'TARGET' (see gradflow inspect --help)\n"),
    ],
)  # fmt: skip
def test_streams_that_are_gone(tmp_path: Path, command: str, code: int, said: str) -> None:
    done = run(command, tmp_path)
    assert (done.returncode, done.stderr) == (code, said)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_inspect(folder: Folder) -> None:
    folder.write(net())
    done = run("G inspect model.py --all | head -1", folder.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gradflow ")
