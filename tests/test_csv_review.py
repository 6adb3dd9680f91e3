"""Tables for review: they open as they are, come back through pandas unchanged, and are never half written."""

from __future__ import annotations

import csv
import io
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gradflow import trace_file
from gradflow.cli import app
from gradflow.columns import LAYER_COLUMNS, Kind
from gradflow.errors import UsageError
from gradflow.findings import Location
from gradflow.report import Report
from gradflow.reporters import csv_files, parquet_files
from gradflow.trace_model import Coverage
from tests.screens import SCREENS, make_finding, make_report
from tests.test_ci_formats import AWKWARD_NAMES, names
from tests.traces import make_layer, make_parameter, make_residual, make_trace

numbers = st.one_of(
    st.none(), st.floats(), st.sampled_from((0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0))
)


def named(name: str, number: float | None = 1.0) -> Report:
    """A report in which every text that a user may choose is this, and every free number that."""
    trace = make_trace(
        layers=[
            make_layer(name, type=name, note=name, output=name, gradient_norm=number),
            make_layer("plain", 1, coverage=Coverage.NEVER_CALLED, activation=None, gradient_norm=None),
        ],
        parameters=[make_parameter(f"{name}.weight", aliases=(name, name), module_type=name, norm=number)],
        residuals=[make_residual(name, source=name, like=name, rho=number)],
    )
    return make_report(trace, make_finding(location=Location(first=name), message=name, hint=name))


def tables(report: Report) -> dict[str, str]:
    return {name: text for name, text in csv_files.files(report).items() if name.endswith(".csv")}


def check_tables(report: Report) -> None:
    for text in tables(report).values():
        lines = text.removesuffix("\n").split("\n")
        rows = list(csv.reader(lines, strict=True))
        assert [line for line in text.splitlines() if line] == lines, "a cell breaks its line"
        assert {len(row) for row in rows} == {len(rows[0])}
        for cell in (cell for row in rows[1:] for cell in row):
            assert not cell.startswith(("=", "+", "@", "\t", "\r", "\n", "\ufeff"))
            assert not cell.startswith("-") or is_number(cell)
            assert all(char >= " " for char in cell)


def is_number(cell: str) -> bool:
    return cell == "-Infinity" or (cell[1:2].isdigit() and math.isfinite(float(cell)))


def check_pandas(report: Report) -> None:
    """Through pandas and back: the same bytes; and read as numbers: the same numbers, to the last bit."""
    for text in tables(report).values():
        stored = text.encode("utf-8", "backslashreplace").decode()
        again = pd.read_csv(io.StringIO(stored), dtype=str, keep_default_na=False)
        assert again.to_csv(index=False, lineterminator="\n") == stored
    read = pd.read_csv(io.StringIO(tables(report)["layers.csv"].encode("utf-8", "backslashreplace").decode()))
    ours = report.layers
    for column in (column.name for column in LAYER_COLUMNS if column.kind is Kind.NUMBER):
        for mine, theirs in zip(ours[column], read[column], strict=True):
            assert repr(float(mine)) == repr(float(theirs)), column


@pytest.mark.parametrize("name", SCREENS)
def test_every_screen_opens_and_comes_back(name: str) -> None:
    check_tables(SCREENS[name]())
    check_pandas(SCREENS[name]())


@pytest.mark.parametrize("name", AWKWARD_NAMES)
def test_an_awkward_name_opens_and_comes_back(name: str) -> None:
    check_tables(named(name))
    check_pandas(named(name))


@settings(max_examples=60, deadline=None)
@given(name=names, number=numbers)
def test_any_name_and_number_opens_and_comes_back(name: str, number: float | None) -> None:
    check_tables(named(name, number))
    check_pandas(named(name, number))


@settings(max_examples=40, deadline=None)
@given(name=names, number=numbers)
def test_any_name_and_number_survives_json_and_the_trace(name: str, number: float | None) -> None:
    report = named(name, number)
    assert repr(trace_file.loads(trace_file.dumps(report.trace))) == repr(report.trace)


@pytest.mark.parametrize(
    "start", ["=", "+", "-", "@", "\t=", "\r=", "\n=", "\ufeff=", "\uff1d", "\uff0b", "\x00="]
)
def test_no_start_of_a_formula_survives(start: str) -> None:
    cell = next(csv.DictReader(io.StringIO(csv_files.render(named(f"{start}1+1")))))["name"]
    assert cell[0] in "'\\"


def test_a_byte_order_mark_only_when_asked_for(tmp_path: Path) -> None:
    report = named("blöcke")
    for folder, asked in (("plain", False), ("marked", True)):
        report.to_csv(tmp_path / folder, byte_order_mark=asked)
        for path in (tmp_path / folder).iterdir():
            marked = path.read_bytes().startswith(b"\xef\xbb\xbf")
            assert marked is (asked and path.suffix == ".csv"), path
    plain, marked_table = (pd.read_csv(tmp_path / folder / "layers.csv") for folder in ("plain", "marked"))
    pd.testing.assert_frame_equal(plain, marked_table)


@pytest.mark.parametrize("name", SCREENS)
def test_parquet_holds_the_same_rows_with_their_types(tmp_path: Path, name: str) -> None:
    report = SCREENS[name]()
    report.to_parquet(tmp_path)
    residuals = {"residuals.parquet"} if report.trace.residuals else set()
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"layers.parquet", "parameters.parquet", "findings.parquet"} | residuals
    read = pd.read_parquet(tmp_path / "layers.parquet")
    assert read["order"].dtype == "Int64" and read["gradient_norm"].dtype == "float64"
    pd.testing.assert_frame_equal(read.astype(report.layers.dtypes), report.layers, check_exact=True)


def test_parquet_takes_any_name() -> None:
    for name in AWKWARD_NAMES:
        content = parquet_files.render(named(name), "residuals")
        read = pd.read_parquet(io.BytesIO(content))
        assert read["name"][0] == name.encode("utf-8", "backslashreplace").decode()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trace_file.save(SCREENS["residual_sites"]().trace, tmp_path / "trace.json")
    return tmp_path / "trace.json"


def invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stderr


@pytest.mark.parametrize(
    ("file", "column"), [("layers", "coverage"), ("residuals", "rho"), ("mine", "coverage")]
)
def test_the_name_of_the_output_asks_for_parquet(saved: Path, file: str, column: str) -> None:
    output = saved.with_name(f"{file}.parquet")
    assert invoke("report", saved, "--output", output)[0] == 0
    assert column in pd.read_parquet(output).columns


def test_options_that_contradict_are_one_sentence(saved: Path) -> None:
    code, said = invoke("report", saved, "--output", saved.with_name("a.parquet"), "--format", "json")
    assert code == 2 and "Parquet" in said and "json" in said
    assert invoke("report", saved, "--csv-bom") == (
        2,
        "gradflow: --csv-bom marks the files of --csv, which is missing: add --csv DIR\n",
    )


def test_parquet_without_pyarrow_says_what_to_install(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_files, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'torch-gradflow\[parquet\]'"):
        parquet_files.render(named("a"))
    output = saved.with_name("layers.parquet")
    code, said = invoke("report", saved, "--output", output)
    assert code == 2 and "pyarrow" in said and not output.exists()


def test_the_command_line_marks_the_tables(saved: Path) -> None:
    folder = saved.with_name("tables")
    assert invoke("report", saved, "--csv", folder, "--csv-bom")[0] == 0
    assert (folder / "layers.csv").read_bytes().startswith(b"\xef\xbb\xbforder,")


WRITER = """
import sys
from gradflow.atomic_files import write_folder
texts = [letter * 3_000_000 + "end" for letter in "ab"]
print("ready", flush=True)
while True:
    for text in texts:
        write_folder(sys.argv[1], {"layers.csv": text, "trace.json": text})
"""


def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    seen = set()
    for attempt in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(0.02 + 0.013 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=30)
        for name in ("layers.csv", "trace.json"):
            if (tmp_path / name).exists():
                text = (tmp_path / name).read_text(encoding="utf-8")
                assert len(text) == 3_000_003 and text in (text[0] * 3_000_000 + "end",)
                seen.add(text[0])
    assert seen, "no write finished before its writer was killed"


def test_json_spells_any_name(tmp_path: Path) -> None:
    for name in AWKWARD_NAMES:
        named(name).to_json(tmp_path / "report.json")
        plain = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert plain["layers"][0]["name"] == name


def test_a_check_writes_no_parquet(tmp_path: Path) -> None:
    code, said = invoke("check", "no_such_model.py", "--output", tmp_path / "a.parquet")
    assert code == 2 and "--csv DIR" in said and "no_such_model" not in said
