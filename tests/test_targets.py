"""A target string -> a model that runs, or one clear sentence."""

from __future__ import annotations

import random
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradflow.errors import GradflowError, ModelError, TargetError, UsageError
from gradflow.recording.target import Target, TargetOptions, load_target, target_from_objects

HEADER = "import torch\nfrom torch import nn\n"
NET = """
class Net(nn.Module):
    def __init__(self, width=4):
        super(Net, self).__init__()
        self.fc = nn.Linear(6, width)
    def forward(self, x):
        return self.fc(x)
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(source: str, name: str = "model.py", header: str = HEADER) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + textwrap.dedent(source), encoding="utf-8")
        return path

    return write_file


def outputs(target: Target) -> Any:
    return target.forward(target.module, target.batches[0])


def loss_of(target: Target) -> torch.Tensor:
    return target.loss.compute(outputs(target), target.batches[0])


@pytest.mark.parametrize(
    ("source", "name", "kind"),
    [
        ("model = nn.Linear(6, 3)", None, "Linear"),
        ("model = nn.Linear(6, 3)\ndef build_model(): raise ValueError", None, "Linear"),
        ("def get_model(): return nn.Linear(6, 3)", None, "Linear"),
        ("def make_model(): return nn.Tanh()\ndef build_model(): return nn.Linear(6, 3)", None, "Linear"),
        (NET, None, "Net"),
        (NET + "model = Net", None, "Net"),
        (NET + "net = Net(3)", "net", "Net"),
        (NET + "class Zoo:\n    small = Net(2)", "Zoo.small", "Net"),
        (NET + "def build(): return Net, 3\nmodel = lambda: Net()", None, "Net"),
        (NET + "class Big(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
         "        self.a, self.b = Net(), nn.Linear(4, 2)\n"
         "    def forward(self, x): return self.b(self.a(x))", None, "Big"),
        (NET + "class Big(nn.Module):\n    def __init__(self, n):\n        super().__init__()\n"
         "        self.parts = nn.ModuleList([Net(6) for _ in range(n)])\n"
         "    def forward(self, x):\n        for p in self.parts: x = p(x)\n        return x\nbig = Big(2)",
         None, "Big"),
        (NET + "class Loss(nn.Module):\n    def forward(self, x): return x.mean()", None, "Net"),
        (NET + "class Base(nn.Module):\n    pass", None, "Net"),
    ],
)  # fmt: skip
def test_the_model_of_a_file(write: Write, source: str, name: str | None, kind: str) -> None:
    path = write(source)
    target = load_target(f"{path}:{name}" if name else str(path))
    assert type(target.module).__name__ == kind
    assert loss_of(target).dim() == 0


KERNELBENCH = """
batch_size = 16
dim = 12
class Model(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
    def forward(self, x, scale):
        return self.linear(x) * scale
def get_inputs():
    return [torch.randn(batch_size, dim), 2.0]
def get_init_inputs():
    return INIT
"""


@pytest.mark.parametrize(
    "init", ["[dim, 5]", "[[dim], {'out_features': 5}]", "{'in_features': dim, 'out_features': 5}"]
)
def test_kernelbench_files(write: Write, init: str) -> None:
    target = load_target(str(write(KERNELBENCH.replace("INIT", init))), TargetOptions(batch_size=4))
    assert outputs(target).shape == (4, 5)
    assert target.inputs_from == "get_inputs()"


def test_package_module_targets(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("", "shop/__init__.py", header="")
    write("WIDTH = 7", "shop/sizes.py", header="")
    write(
        "from .sizes import WIDTH\ndef make(): return nn.Linear(3, WIDTH), torch.zeros(2, 3)", "shop/nets.py"
    )
    monkeypatch.chdir(tmp_path)
    assert outputs(load_target("shop.nets:make")).shape == (2, 7)
    assert outputs(load_target("shop/nets.py:make")).shape == (2, 7)
    assert str(tmp_path) not in sys.path


def test_siblings_are_importable_and_do_not_leak(write: Write) -> None:
    for folder, width in (("a", 3), ("b", 5)):
        write(f"WIDTH = {width}", f"{folder}/layers_of_mine.py", header="")
        write("from layers_of_mine import WIDTH\nmodel = nn.Linear(2, WIDTH)", f"{folder}/model.py")
    widths = [load_target(str(write("", f"{f}/x.py").parent / "model.py")).module.out_features for f in "ab"]
    assert widths == [3, 5]


@pytest.mark.parametrize("name", ["torch.py", "random.py", "json.py", "my-model 2.py", "gradflow.py"])
def test_any_file_name(write: Write, name: str) -> None:
    before = {key: id(sys.modules[key]) for key in ("torch", "random", "json", "gradflow")}
    path = write("import json, random\nmodel = nn.Linear(json.loads('2'), random.randint(1, 1))", name)
    assert load_target(str(path)).module.in_features == 2
    assert {key: id(sys.modules[key]) for key in before} == before


def test_a_neighbour_shadows_no_installed_module(write: Write) -> None:
    write("raise RuntimeError('shadowed')", "numpy.py", header="")
    write("raise RuntimeError('shadowed')", "colorsys.py", header="")
    path = write("import colorsys, numpy\nmodel = nn.Linear(2, 1)")
    assert load_target(str(path)).module.in_features == 2


def test_prints_go_to_stderr_and_main_does_not_run(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("""
        import sys
        print("loading", len(sys.argv))
        class Loud(nn.Module):
            def __init__(self):
                super().__init__(); print("building"); self.fc = nn.Linear(2, 1)
            def forward(self, x):
                print("running"); return self.fc(x)
        if __name__ == "__main__":
            raise SystemExit("training")
        """)
    loss_of(load_target(str(path)))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "loading 1" in captured.err and "building" in captured.err and "running" in captured.err


def test_construction_is_seeded(write: Write) -> None:
    path = write(
        NET + "import random\ndef build_model():\n    m = Net(); m.noise = random.random(); return m"
    )
    first, second, other = (load_target(str(path), TargetOptions(seed=s)).module for s in (3, 3, 4))
    assert torch.equal(first.fc.weight, second.fc.weight) and first.noise == second.noise
    assert not torch.equal(first.fc.weight, other.fc.weight) and first.noise != other.noise


def test_mode_device_and_dtype(write: Write) -> None:
    path = str(write("model = nn.Linear(6, 3).eval()\nexample_inputs = torch.randn(4, 6)"))
    assert not load_target(path).module.training
    target = load_target(path, TargetOptions(mode="train", dtype="bf16", device="cpu"))
    assert target.module.training
    assert outputs(target).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("declaration", "source", "shapes"),
    [
        ("example_inputs = torch.zeros(5, 6)", "example_inputs", [(5, 6)]),
        ("def example_inputs(): return {'x': torch.zeros(5, 6)}", "example_inputs()", [(5, 6)]),
        ("def get_inputs(): return [torch.zeros(5, 6)]", "get_inputs()", [(5, 6)]),
        ("def get_inputs():\n    for n in (2, 3): yield torch.zeros(n, 6)", "get_inputs()", [(2, 6), (3, 6)]),
        ("get_inputs = lambda: [(torch.zeros(n, 6),) for n in (2, 3)]", "get_inputs()", [(2, 6), (3, 6)]),
        ("from torch.utils.data import DataLoader, TensorDataset as T\n"
         "example_inputs = DataLoader(T(torch.zeros(9, 6), torch.zeros(9)), batch_size=3)",
         "example_inputs", [(3, 6)] * 3),
        ("import numpy\nexample_input_array = numpy.zeros((5, 6), 'float32')",
         "example_input_array", [(5, 6)]),
        ("model = Net(); model.example_input_array = torch.zeros(7, 6)", "example_input_array", [(7, 6)]),
        ("model = Net(); model.dummy_inputs = {'x': torch.zeros(7, 6)}", "dummy_inputs", [(7, 6)]),
        ("model = Net(); model.dummy_inputs = {'input_ids': torch.zeros(7, 6)}", "inferred", [(8, 6)]),
        ("def build_model(): return Net(), torch.zeros(3, 6)", "build_model()", [(3, 6)]),
        ("", "inferred", [(8, 6)]),
    ],
)  # fmt: skip
def test_where_inputs_come_from(
    write: Write, declaration: str, source: str, shapes: list[tuple[int, ...]]
) -> None:
    target = load_target(str(write(NET + declaration)))
    assert target.inputs_from == source
    assert [(*b.args, *b.kwargs.values())[0].shape for b in target.batches] == shapes
    assert all(target.forward(target.module, batch).shape[-1] == 4 for batch in target.batches)


def test_an_endless_loader_is_capped(write: Write) -> None:
    path = write(NET + "def get_inputs():\n    while True: yield torch.zeros(2, 6)")
    assert 1 < len(load_target(str(path)).batches) <= 16


@pytest.mark.parametrize(
    ("specs", "shapes"),
    [(("3x6",), {0: (3, 6)}), (("x=3x6:float32:0..1",), {"x": (3, 6)})],
)
def test_input_options_come_first(write: Write, specs: tuple[str, ...], shapes: dict[Any, Any]) -> None:
    path = write(NET + "example_inputs = torch.zeros(5, 6)")
    batch = load_target(str(path), TargetOptions(inputs=specs)).batches[0]
    assert {k: tuple(v.shape) for k, v in [*enumerate(batch.args), *batch.kwargs.items()]} == shapes


@pytest.mark.parametrize("dtype", ["float64", "bf16"])
def test_floats_follow_the_dtype(write: Write, dtype: str) -> None:
    for declaration in ("", "example_inputs = torch.zeros(5, 6)"):
        target = load_target(str(write(NET + declaration)), TargetOptions(dtype=dtype))
        assert outputs(target).dtype == target.batches[0].args[0].dtype == target.module.fc.weight.dtype
        assert target.module.fc.weight.dtype != torch.float32


def test_batch_size_sets_the_files_own_first(write: Write) -> None:
    path = write("batch_size = 9\n" + NET + "def get_inputs(): return torch.zeros(batch_size, 6)")
    assert outputs(load_target(str(path), TargetOptions(batch_size=20))).shape[0] == 20


@pytest.mark.parametrize(
    ("declaration", "size", "result"),
    [
        ("example_inputs = torch.zeros(5, 6)", 2, 2),
        ("", 3, 3),
        ("example_inputs = torch.zeros(5, 6)", 6, "more than the 5 samples"),
        (
            "example_inputs = {'x': torch.zeros(5, 6), 'y': torch.zeros(4, 6)}",
            2,
            "share no leading dimension",
        ),
        ("example_inputs = torch.zeros(5, 6)", 0, "must be 1 or more"),
    ],
)
def test_batch_size_cuts(write: Write, declaration: str, size: int, result: int | str) -> None:
    path = str(write(NET + declaration))
    if isinstance(result, int):
        assert outputs(load_target(path, TargetOptions(batch_size=size))).shape[0] == result
    else:
        with pytest.raises(UsageError, match=result):
            load_target(path, TargetOptions(batch_size=size))


def test_loss_of_the_file_gets_what_forward_does_not_take(write: Write) -> None:
    path = write(
        NET
        + """
def get_inputs(): return torch.ones(5, 6), torch.full((5, 4), 2.0)
def loss(outputs, inputs):
    x, y = inputs
    return ((outputs - outputs.detach() + y) ** 2).mean()
"""
    )
    target = load_target(str(path))
    assert loss_of(target).item() == pytest.approx(4.0)
    assert target.loss.settled().description == "loss() of model.py"


PAIR = """
class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
    def forward(self, {arguments}):
        return {first} + self.fc({second})
batch = dict(a=torch.ones(5, 6), b=torch.ones(5, 6), label=torch.ones(5, 3))
def loss(outputs, inputs): return ((outputs - inputs["label"]) ** 2).mean()
"""


@pytest.mark.parametrize("inputs", ["batch", "[batch, batch]"])
@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [("a, b", "self.fc(a)", "b"), ("batch", "self.fc(batch['a'])", "batch['b']")],
)
def test_batches_that_are_dicts(write: Write, inputs: str, arguments: str, first: str, second: str) -> None:
    path = write(PAIR.format(arguments=arguments, first=first, second=second) + f"example_inputs = {inputs}")
    assert loss_of(load_target(str(path))).dim() == 0


def test_a_dict_as_the_one_argument_from_python() -> None:
    class Reads(nn.Linear):
        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return super().forward(batch["x"])

    given = {"x": torch.randn(5, 6)}
    assert outputs(target_from_objects(Reads(6, 3), given)).shape == (5, 3)


def test_the_files_optimizer(write: Write) -> None:
    path = write(NET + "def make_optimizer(model): return torch.optim.SGD(model.parameters(), lr=0.1)")
    target = load_target(str(path))
    assert isinstance(target.optimizer, torch.optim.SGD)
    assert target.optimizer.param_groups[0]["params"][0] is target.module.fc.weight
    with pytest.raises(TargetError, match="returned a int, not an optimizer"):
        load_target(str(write(NET + "def make_optimizer(model): return 3")))


THREE = NET + NET.replace("Net", "Wide") + NET.replace("Net", "Deep")
NEEDS = NET.replace("width=4", "width, depth")


@pytest.mark.parametrize(
    ("source", "spec", "error", "words"),
    [
        ("", "modle.py", TargetError, ["no such file: modle.py", "did you mean model.py?"]),
        ("", "nowhere/model.py", TargetError, ["there is no directory nowhere"]),
        ("", ".", TargetError, ["is a directory", "model.py"]),
        ("", "weights.pt", TargetError, ["is not a Python file", "--checkpoint"]),
        ("", "a b", TargetError, ["is no target"]),
        ("", "no_such_package.nets:Net", TargetError, ["no module named 'no_such_package'"]),
        ("def f(:\n  pass", "model.py", TargetError, ["model.py, line 3", "invalid syntax"]),
        ("import missing_package.sub", "model.py", TargetError,
         ["imports 'missing_package'", "at model.py:3", "install missing_package"]),
        ("from torch import nothing_like_it", "model.py", TargetError,
         ["cannot be imported (at model.py:3)"]),
        ("x = 1 / 0", "model.py", ModelError, ["importing model.py raised at model.py:3: ZeroDivisionError"]),
        ("import sys\nsys.exit(2)", "model.py", ModelError, ["asked Python to exit (2)", "__main__"]),
        ("x = 3", "model.py", TargetError, ["holds no model"]),
        (THREE, "model.py", TargetError, [f"inspect model.py:{n}" for n in ("Net", "Wide", "Deep")]),
        (NEEDS, "model.py", TargetError,
         ["model.py:Net   needs width, depth", "build_model()", "get_init_inputs()"]),
        (NEEDS, "model.py:Net", TargetError, ["needs arguments to be built (width, depth)"]),
        ("def build_model(config): ...", "model.py", TargetError, ["needs arguments (config)"]),
        ("def build_model(): return 3", "model.py", TargetError, ["returned a int"]),
        ("def build_model(): raise KeyError('depth')", "model.py", ModelError,
         ["building model.py:build_model raised at model.py:3: KeyError"]),
        ("width = 3\n" + NET, "model.py:width", TargetError, ["is a int"]),
        (NET, "model.py:Nets", TargetError, ["has no 'Nets'; try model.py:Net"]),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_clear_sentence(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    source: str, spec: str, error: type[GradflowError], words: list[str],
) -> None:  # fmt: skip
    write(source)
    (tmp_path / "weights.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        load_target(spec)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "__pycache__").exists()


def test_the_traceback_shown_is_the_users(write: Write) -> None:
    path = write(
        "def helper():\n    return {}['depth']\ndef build_model():\n    return nn.Linear(helper(), 2)"
    )
    with pytest.raises(ModelError) as caught:
        load_target(str(path))
    text = caught.value.trace_text
    assert "helper" in text and "KeyError: 'depth'" in text
    assert "gradflow/recording" not in text and "importlib" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (TargetOptions(device="cuda:99"), "not available here; there is cpu"),
        (TargetOptions(device="toaster"), "not available here"),
        (TargetOptions(dtype="int64"), "not a floating dtype"),
        (TargetOptions(loss="hinge"), "none of cross-entropy"),
        (TargetOptions(inputs=("8,3",)), "the form is"),
        (TargetOptions(inputs=("y=8x6",)), "forward takes no 'y', only x"),
        (TargetOptions(checkpoint="nowhere.pt"), "no such file"),
    ],
)
def test_options_refused(write: Write, options: TargetOptions, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_target(str(write(NET)), options)


def test_objects_from_python() -> None:
    model, x = nn.Linear(6, 3), torch.randn(5, 6)
    seen: list[Any] = []

    def loss(out: torch.Tensor, inputs: Any) -> torch.Tensor:
        seen.append(inputs)
        return out.mean()

    for given in (x, (x,), {"input": x}):
        target = target_from_objects(model, given, loss)
        assert loss_of(target).dim() == 0
        assert type(seen[-1]) is type(given)
    assert (target.name, target.inputs_from, target.loss.description) == ("Linear", "given", "loss()")
    assert target_from_objects(model).inputs_from == "inferred"
    with pytest.raises(TargetError, match="not an nn"):
        target_from_objects(nn.Linear, x)  # type: ignore[arg-type]


def test_inferring_from_python_leaves_the_random_state() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout())
    before = (torch.get_rng_state(), random.getstate())
    target_from_objects(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
