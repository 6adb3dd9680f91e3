"""A trace on disk: exact, versioned, whole or absent."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow import trace_file
from gradflow.atomic_files import check_folder, check_place, write_folder, write_text
from gradflow.errors import TraceFileError
from gradflow.trace_model import GraphCut
from tests.screens import SCREENS
from tests.traces import make_layer, make_parameter, make_trace


@pytest.mark.parametrize("name", SCREENS)
def test_a_trace_reads_back_as_it_was(tmp_path: Path, name: str) -> None:
    trace = SCREENS[name]().trace
    trace_file.save(trace, tmp_path / "trace.json")
    # repr, for a NaN is not equal to itself.
    assert repr(trace_file.load(tmp_path / "trace.json")) == repr(trace)


@given(st.floats(allow_nan=True, allow_infinity=True), st.text())
def test_any_float_and_any_name_reads_back(number: float, name: str) -> None:
    cut = GraphCut(op="detach", module=name, where="", source="")
    trace = make_trace(
        layers=[make_layer(name, gradient_norm=number)],
        parameters=[make_parameter("w", norm=number, in_optimizer=None, aliases=(name,), cut=cut)],
    )
    assert repr(trace_file.loads(trace_file.dumps(trace))) == repr(trace)


def test_not_measured_and_not_a_number_stay_apart() -> None:
    trace = make_trace(layers=[make_layer("a", gradient_norm=None), make_layer("b", gradient_norm=math.nan)])
    plain = json.loads(trace_file.dumps(trace))
    assert [layer["gradient_norm"] for layer in plain["layers"]] == [None, "NaN"]


def test_a_later_field_is_left_out_and_an_earlier_absence_takes_its_default() -> None:
    plain = json.loads(trace_file.dumps(make_trace()))
    plain["colour"] = "blue"
    del plain["layers"][0]["note"]
    assert trace_file.loads(json.dumps(plain)) == make_trace()


def saved(**changes: object) -> str:
    return json.dumps(json.loads(trace_file.dumps(make_trace())) | changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "not a gradflow trace"),
        ("{}", "not a gradflow trace"),
        (saved(schema=99), "schema version 99"),
        (saved(findings=[]), "is a report, not a trace"),
        (saved(layers=[{"order": 0}]), "damaged"),
        (saved(layers=3), "damaged"),
        (saved(run=None), "damaged"),
        (saved(trunk={"kind": 4}), "damaged"),
    ],
)
def test_what_is_not_a_trace_is_refused_in_one_sentence(text: str, said: str) -> None:
    with pytest.raises(TraceFileError, match=said) as error:
        trace_file.loads(text, name="x.json")
    assert str(error.value).startswith("x.json")
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match="No such file"):
        trace_file.load(tmp_path / "no.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceFileError, match="not UTF-8"):
        trace_file.load(tmp_path / "binary")


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the second file: the first must not have moved in, and nothing is left over."""
    (tmp_path / "a.csv").write_text("old", encoding="utf-8")
    write = Path.write_bytes

    def full_at_b(path: Path, content: bytes) -> int:
        if "b.csv" in path.name:
            write(path, b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_at_b)
    with pytest.raises(TraceFileError, match=r"b\.csv: No space left"):
        write_folder(tmp_path, {"a.csv": "new", "b.csv": "new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.csv": "old"}


def test_an_interrupt_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_found_before_anything_moves(tmp_path: Path) -> None:
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(TraceFileError, match="it is a folder"):
        write_folder(tmp_path, {"a.csv": "new", "b.csv": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["b.csv"]


def test_places_that_cannot_work_are_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(TraceFileError, match="no folder"):
        check_place(tmp_path / "no" / "report.json")
    with pytest.raises(TraceFileError, match="it is a folder"):
        check_place(tmp_path)
    with pytest.raises(TraceFileError, match="is a file"):
        check_folder(tmp_path / "file" / "deeper")
    check_folder(tmp_path / "new" / "deeper")
    check_place(tmp_path / "file")


def test_a_link_is_followed_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text(encoding="utf-8") == "text"
    write_text("/dev/null", "text")
    assert not Path("/dev/null").is_file()


def test_rows_have_one_shape_word_for_each_kind_of_tensor() -> None:
    assert trace_file.shape_text((8, 3), "float32") == "8x3"
    assert trace_file.shape_text((), "float32") == "scalar"
    assert trace_file.shape_text((), "") == ""
