"""The compiled passes against float64, against the stock ops they stand in for, and without a compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradflow
from gradflow.recording import kernels
from gradflow.recording.activations import ActivationCollector, Family, UnitPool, UnitStatistics
from gradflow.recording.gradient_split import pair_products
from gradflow.recording.sample_buffers import SUNK, BufferPool
from gradflow.recording.site_measures import operand_products
from gradflow.recording.tensor_stats import StatisticsCollector, norm_and_nonfinite

ROOT = Path(__file__).parent.parent
SIZES = (1, 7, 8, 15, 16, 17, 1000, 70_001)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
needs_kernels = pytest.mark.skipif(not kernels.is_loaded(), reason="built without a compiler")


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_functions", None)


def values(size: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(size, generator=generator).double() + scale / 3).to(dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_moments(size: int, dtype: torch.dtype, scale: float) -> None:
    x = values(size, dtype, scale)
    wide = x.double()
    found = kernels.moments(x)
    assert found is not None
    assert found.total == pytest.approx(wide.sum().item(), rel=1e-12, abs=1e-12 * wide.abs().sum().item())
    assert found.square == pytest.approx(wide.square().sum().item(), rel=1e-12)
    assert (found.low, found.high) == (wide.min().item(), wide.max().item())
    assert kernels.square(x) == pytest.approx(found.square, rel=1e-12)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_products(size: int, dtype: torch.dtype) -> None:
    a, b = values(size, dtype), values(size, dtype, seed=1)
    left, right = a.double(), b.double()
    expected = ((left * left).sum().item(), (right * right).sum().item(), (left * right).sum().item())
    assert kernels.products(a, b) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    rows = kernels.row_products(torch.stack((a, b)), torch.stack((b, b)))
    assert rows is not None
    assert rows[:, 0].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert rows[:, 1].tolist() == pytest.approx([expected[1]] * 3, rel=1e-10)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (5, 8), (64, 64), (33, 21), (2, 300)])
@pytest.mark.parametrize("step", [1, 3])
def test_units(shape: tuple[int, int], dtype: torch.dtype, step: int) -> None:
    rows, units = shape
    x = values(rows * units * step, dtype).relu().view(rows, -1)[:, ::step]
    x[:, 0] = -3.0 if rows == 1 else torch.linspace(-4.0, -3.0, rows).to(dtype)
    active, sunk = torch.full((units,), -1.0), torch.zeros(units, dtype=torch.bool)
    found = kernels.units(x, SUNK, active, sunk)
    wide = x.double()
    mean, variance = wide.mean(0), wide.var(0, correction=0)
    expected = [mean.mean(), variance.mean(), mean.var(correction=0), mean.square().mean(), wide.abs().max()]
    assert found is not None
    assert found[:5] == pytest.approx([value.item() for value in expected], rel=1e-9, abs=1e-12)
    assert found[5] == torch.count_nonzero(wide).item()
    assert torch.equal(active.long(), (wide != 0).sum(0))
    assert torch.equal(sunk, mean < -SUNK * variance.sqrt())
    assert sunk[0]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(4, 3), (1, 1), (8, 2047), (8, 2049), (4, 5, 7, 900), (600, 50), (7, 6000), (3, 4, 9000)]
)
def test_a_survey_says_what_its_parts_say(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whole tensors and sampled ones, with samples first, second and nowhere; a view that begins further on."""
    x = values(3 + math.prod(shape), dtype)[3:].relu().view(shape)
    for batch_size in (shape[0], shape[-1] if len(shape) > 2 else 1, 0):
        compiled, stock = (
            StatisticsCollector(batch_size, BufferPool()),
            StatisticsCollector(batch_size, BufferPool()),
        )
        compiled.add(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_functions", None)
            stock.add(x)
            (expected,) = stock.results()
        (found,) = compiled.results()
        said, wanted = ({k: v for k, v in asdict(row).items() if v is not None} for row in (found, expected))
        assert said == pytest.approx(wanted, rel=2e-5, abs=1e-6)
        assert found.mean == pytest.approx(x.double().mean().item(), rel=1e-9)
        assert found.rms == pytest.approx(x.double().square().mean().sqrt().item(), rel=1e-9)
        assert found.absmax == x.double().abs().max().item()


@needs_kernels
def test_a_survey_leaves_what_is_not_finite_to_stock_ops() -> None:
    collector = StatisticsCollector(4, BufferPool())
    for size in (16, 40_000):
        x = values(size, torch.float32).view(4, -1)
        collector.add(x)
        x[3, 3] = math.nan
        collector.add(x)
        collector.add(values(size, torch.float32).view(4, -1))
    results = collector.results()
    assert [found.nonfinite for found in results] == [0, 1, 0, 0, 1, 0]
    assert results[0] == results[2]
    assert results[3] == results[5]


@needs_kernels
def test_agreeing_rows_have_no_spread_at_all() -> None:
    x = values(300, torch.float32, 1e6).expand(40, 300).contiguous()
    found = kernels.units(x, SUNK, torch.empty(300), torch.empty(300, dtype=torch.bool))
    assert found is not None
    assert found[1] == 0.0


@needs_kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5, 16, 36])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_left_to_stock_ops(bad: float, place: int, dtype: torch.dtype) -> None:
    x, clean = values(37, dtype), values(37, dtype)
    x[place] = bad
    assert kernels.square(x) is None
    assert kernels.moments(x) is None
    assert kernels.products(x, clean) is None
    assert kernels.products(clean, x) is None
    assert kernels.row_products(x[None], clean[None]) is None
    assert kernels.squares([clean, x])[1] is None
    assert kernels.units(x[None], SUNK, torch.empty(37), torch.empty(37, dtype=torch.bool)) is None
    assert norm_and_nonfinite(x)[1] == 1


class Marked(Tensor):
    pass


@needs_kernels
@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, dtype=torch.float16),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, device="meta"),
        torch.ones(3).to_sparse(),
        torch.ones(3, dtype=torch.complex64).conj().imag,
        torch._efficientzerotensor(3),
        torch.ones(3).as_subclass(Marked),
        torch.empty(0),
    ],
    ids=["half", "integers", "meta", "sparse", "negated", "zero tensor", "subclass", "empty"],
)
def test_what_does_not_lie_in_memory_as_it_stands_is_not_read(tensor: Tensor) -> None:
    assert kernels.square(tensor) in (None, 0.0 if not tensor.numel() else None)
    assert kernels.squares([tensor])[0] is None
    assert kernels.moments(tensor) is None


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [(0,), (5, 3_000_000, 2_000_001, 4), (9_000_000,), (1, 2, 3)])
def test_threads_share_the_work(
    threads: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensors = [torch.full((size,), 0.5) for size in sizes]
    assert kernels.squares(tensors) == [size / 4 or None for size in sizes]


@needs_kernels
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_kernels_and_stock_ops_say_the_same(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    a = values(rows * columns, dtype, seed=seed).view(rows, columns)
    b = values(rows * columns, dtype, seed=seed + 1).view(rows, columns)

    def measured() -> list[float]:
        sites = operand_products(a, b, rows)
        assert sites is not None
        split = pair_products(a, b).tolist()
        return [norm_and_nonfinite(a)[0], *split, *sites.rows.sum(1).tolist()]

    compiled = measured()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_functions", None)
        assert compiled == pytest.approx(measured(), rel=2e-5, abs=2e-5)


def pre_activations(shape: tuple[int, ...], dtype: torch.dtype, axis: int) -> Tensor:
    """With a unit that is never active, one that always is, one that is sunk, and padding."""
    x = values(math.prod(shape), dtype).view(shape).movedim(axis, -1)
    x[..., 0], x[..., 1], x[..., 2] = -x[..., 0].abs(), x[..., 1].abs() + 0.1, x[..., 2] - 40
    x[-1] = 0
    return x.movedim(-1, axis).contiguous()


def units_of(x: Tensor, axis: int) -> UnitStatistics:
    collector = ActivationCollector(UnitPool())
    collector.add(x, Family.RECTIFIER, axis)
    (found,) = collector.results()
    assert found is not None
    return found


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((40, 6), 1),
        ((5, 7, 33), 2),
        ((9, 50, 70), 2),
        ((4, 19, 3, 5), 1),
        ((24, 17, 30, 30), 1),
        ((350, 8), 1),
    ],
)
def test_a_rectifiers_units_are_counted_alike(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = pre_activations(shape, dtype, axis)
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)
    compiled, copied = units_of(x, axis), units_of(apart, axis)
    monkeypatch.setattr(kernels, "_functions", None)
    said, *others = (
        {k: v for k, v in asdict(found).items() if v is not None}
        for found in (compiled, copied, units_of(x, axis))
    )
    assert others == [pytest.approx(said, rel=1e-6)] * 2
    assert compiled.inactive is not None
    assert compiled.inactive > 0


@needs_kernels
def test_what_is_not_finite_is_a_rectifiers_to_count() -> None:
    x = torch.ones(20, 4)
    x[3, 0], x[4, 1], x[:, 2], x[:, 3] = math.nan, -math.inf, -math.inf, math.nan
    found = units_of(x, 1)
    assert (found.inactive, found.always_active, found.sunk) == (0.5, 0.0, 0.0)


class Net(nn.Module):
    """Convolutions and a batch normalisation, a residual sum, large and small tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.block = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.block(x).relu()
        return self.head(x.mean((2, 3)))


def numbers(dtype: torch.dtype, memory: torch.memory_format) -> Iterator[tuple[str, float]]:
    torch.manual_seed(0)
    model, x = Net().to(dtype), torch.randn(8, 3, 40, 40).to(dtype).contiguous(memory_format=memory)
    yield from numbers_of(model, x)


def numbers_of(model: nn.Module, x: Tensor) -> Iterator[tuple[str, float]]:
    trace = gradflow.inspect(model, (x,), lambda y, _: y.square().mean()).trace
    for row in trace.layers:
        assert row.activation is not None
        for name in ("mean", "std", "rms", "absmax", "zero_fraction", "signal", "common_mode"):
            value = getattr(row.activation, name)
            if value is not None:
                yield f"{row.name} {name}", value
        yield f"{row.name} gradient", row.gradient_norm or 0.0
    for parameter in trace.parameters:
        yield f"{parameter.name} norm", parameter.norm or 0.0
        yield f"{parameter.name} gradient", parameter.gradient_norm or 0.0
    for site in trace.residuals:
        for name in ("skip_norm", "branch_norm", "rho", "cosine", "block_influence", "path_share"):
            yield f"{site.name} {name}", getattr(site, name)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_model_is_measured_alike(
    dtype: torch.dtype, memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = dict(numbers(dtype, memory))
    monkeypatch.setattr(kernels, "_functions", None)
    assert compiled == pytest.approx(dict(numbers(dtype, memory)), rel=2e-5, abs=2e-6)


@needs_kernels
def test_a_default_type_changes_nothing() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(8, 3, 40, 40)
    expected = dict(numbers_of(model, x))
    torch.set_default_dtype(torch.float64)
    try:
        assert dict(numbers_of(model, x)) == pytest.approx(expected, rel=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert kernels.load() is None


def test_without_a_library_there_are_none(tmp_path: Path) -> None:
    assert kernels.load(tmp_path / "_kernels.so") is None


def test_a_library_that_is_none_is_passed_over(tmp_path: Path) -> None:
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"not a library")
    assert kernels.load(broken) is None


@needs_kernels
def test_a_library_of_another_source_is_passed_over(source_tree: Path) -> None:
    source = source_tree / "gradflow/recording/kernels.c"
    assert build_script().compile_kernels(source_tree) == ""
    (library,) = source.parent.glob("_kernels.*")
    assert kernels.load(library) is not None
    source.write_text(source.read_text(encoding="utf-8") + "/* newer */", encoding="utf-8")
    assert kernels.load(library) is None


def test_stock_ops_answer_alone(stock: None) -> None:
    x = values(100, torch.float32)
    assert not kernels.is_loaded()
    assert kernels.square(x) is kernels.moments(x) is kernels.products(x, x) is None
    assert kernels.squares([x]) == [None]
    assert norm_and_nonfinite(x)[0] == pytest.approx(x.double().norm().item(), rel=1e-6)


def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    folder = tmp_path / "gradflow" / "recording"
    folder.mkdir(parents=True)
    (folder / "kernels.c").write_text((ROOT / "gradflow/recording/kernels.c").read_text(encoding="utf-8"))
    return tmp_path


@needs_kernels
def test_the_build_makes_a_library(source_tree: Path) -> None:
    assert build_script().compile_kernels(source_tree) == ""
    (library,) = (source_tree / "gradflow" / "recording").glob("_kernels.*")
    ctypes.CDLL(str(library)).gradflow_square.restype = ctypes.c_double
    assert kernels.load(library) is not None


@pytest.mark.parametrize(
    ("compiler", "said"), [("/bin/false", "failed"), ("no-such-compiler", "does not run")]
)
def test_a_build_without_a_compiler_goes_on(
    compiler: str, said: str, source_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    (source_tree / "gradflow/recording/_kernels.so").write_bytes(b"of an older source")
    assert said in build_script().compile_kernels(source_tree)
    assert [path.name for path in (source_tree / "gradflow" / "recording").iterdir()] == ["kernels.c"]


def test_the_source_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = os.environ.get("CC", "cc")
    flags = ("-O1", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-c")
    source = ROOT / "gradflow/recording/kernels.c"
    try:
        done = subprocess.run(
            [compiler, *flags, source, "-o", tmp_path / "kernels.o"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        pytest.skip("no compiler here")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the portable loops are what Windows runs")
@needs_kernels
def test_the_portable_loops_say_the_same(source_tree: Path) -> None:
    """As on a processor without AVX2."""
    folder = source_tree / "gradflow" / "recording"
    source = folder / "kernels.c"
    source.write_text(
        source.read_text(encoding="utf-8").replace("defined(__x86_64__)", "0"), encoding="utf-8"
    )
    assert build_script().compile_kernels(source_tree) == ""
    (library,) = folder.glob("_kernels.*")
    functions = kernels.load(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_functions", functions)
        for dtype in DTYPES:
            test_moments(1000, dtype, 1.0)
            test_products(1000, dtype)
            for step in (1, 3):
                test_units((33, 21), dtype, step)
