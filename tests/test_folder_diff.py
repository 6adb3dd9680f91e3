"""``gradflow diff``: rows of two folders aligned by name, then by position, what moved most first."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from typer.testing import CliRunner

from gradflow.cli import app
from gradflow.errors import TraceFileError
from gradflow.findings import Location, Severity
from gradflow.folder_diff import FolderDiff, diff_folders, ratio
from gradflow.reporters import diff_screen, diff_texts
from gradflow.reporters.screen import Screen
from gradflow.row_alignment import AlignedBy, RowIdentity, align
from gradflow.table_folder import TABLES, read_folder
from gradflow.trace_file import Row, finding_rows, layer_rows, parameter_rows, residual_rows
from gradflow.trace_model import Coverage
from tests.screens import SCREENS, make_finding, make_report
from tests.test_ci_formats import AWKWARD_NAMES
from tests.traces import make_layer, make_parameter, make_residual, make_trace

NAME, POSITION, ONLY_A, ONLY_B = AlignedBy


def identities(text: str) -> list[RowIdentity]:
    """ "a:L b:R": names with the make of each."""
    pairs = [word.split(":") for word in text.split()]
    return [RowIdentity(name=(name,), make=make) for name, make in pairs]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("x:L y:R", "x:L y:R", [(0, 0, NAME), (1, 1, NAME)]),
        ("x:L y:R", "y:R x:L", [(1, 0, NAME), (0, 1, NAME)]),
        ("x:L y:R", "m.x:L m.y:R", [(0, 0, POSITION), (1, 1, POSITION)]),
        ("x:L y:R", "x:L y:T", [(0, 0, NAME), (1, 1, NAME)]),
        ("x:L", "z:R", [(0, 0, POSITION)]),
        ("x:L y:L", "x:L new:L y:L", [(0, 0, NAME), (None, 1, ONLY_B), (1, 2, NAME)]),
        ("x:L old:R y:L", "x:L y:L", [(0, 0, NAME), (1, None, ONLY_A), (2, 1, NAME)]),
        ("p:L q:R r:L", "u:R", [(0, None, ONLY_A), (1, 0, POSITION), (2, None, ONLY_A)]),
        ("p:L x:L", "x:L q:L", [(0, None, ONLY_A), (1, 0, NAME), (None, 1, ONLY_B)]),
        ("x:L x:L", "x:L x:L x:L", [(0, 0, NAME), (1, 1, NAME), (None, 2, ONLY_B)]),
        ("", "x:L", [(None, 0, ONLY_B)]),
    ],
)
def test_rows_are_aligned_by_name_then_by_position(a: str, b: str, expected: list[object]) -> None:
    assert [(pair.a, pair.b, pair.by) for pair in align(identities(a), identities(b))] == expected


def test_rows_of_another_make_stay_apart_where_that_is_asked_for() -> None:
    assert {pair.by for pair in align(identities("x:L"), identities("z:R"), same_make=True)} == {
        ONLY_A,
        ONLY_B,
    }
    assert [pair.by for pair in align(identities("x:L"), identities("z:L"), same_make=True)] == [POSITION]


rows = st.lists(
    st.builds(
        lambda name, make: RowIdentity(name=(name,), make=make),
        st.sampled_from("abcdefgh"),
        st.sampled_from("LR"),
    ),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(a=rows, b=rows)
def test_every_row_stands_once_and_namesakes_stand_together(
    a: list[RowIdentity], b: list[RowIdentity]
) -> None:
    pairs = align(a, b)
    assert sorted(pair.a for pair in pairs if pair.a is not None) == list(range(len(a)))
    assert sorted(pair.b for pair in pairs if pair.b is not None) == list(range(len(b)))
    named = [pair for pair in pairs if pair.by is NAME]
    assert all(a[pair.a or 0].name == b[pair.b or 0].name for pair in named)
    names_a, names_b = [row.name for row in a], [row.name for row in b]
    common = sum(min(names_a.count(name), names_b.count(name)) for name in set(names_a))
    assert len(named) == common


def test_a_long_renamed_model_is_aligned_at_once() -> None:
    a = [RowIdentity(name=(f"a.{at}",), make="LR"[at % 2]) for at in range(20_000)]
    b = [RowIdentity(name=(f"b.{at}",), make="LR"[at % 2]) for at in range(19_999)]
    pairs = align(a, b)
    assert sum(pair.by is POSITION for pair in pairs) == 19_999


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (2.0, 1.0, 0.5),
        (0.0, 0.0, 1.0),
        (0.0, 1.0, math.inf),
        (0.0, -1.0, -math.inf),
        (1.0, 0.0, 0.0),
        (math.inf, math.inf, 1.0),
        (math.nan, math.nan, 1.0),
        (None, 1.0, None),
        (1.0, None, None),
        (5e-324, 1e308, math.inf),
    ],
)
def test_a_ratio_is_after_by_before(a: float | None, b: float | None, expected: float | None) -> None:
    assert ratio(a, b) == expected


def test_a_ratio_of_what_broke_is_not_a_number() -> None:
    for a, b in ((1.0, math.nan), (math.nan, 1.0), (0.0, math.nan)):
        found = ratio(a, b)
        assert found is not None and math.isnan(found)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Four layers before; after: one unchanged, one renamed and twice as loud, one cut off, one left out."""
    before = [
        make_layer("stem", 0),
        make_layer("mid", 1, type="ReLU"),
        make_layer("cut", 2),
        make_layer("gone", 3, type="Dropout"),
    ]
    after = [
        make_layer("stem", 0),
        make_layer("middle", 1, type="ReLU", gradient_norm=2.0),
        make_layer("cut", 2, coverage=Coverage.NO_GRAD, gradient_norm=None),
        make_layer("head", 3, gradient_norm=0.5),
        make_layer("tail", 4, type="Softmax"),
    ]
    old = make_finding(location=Location(first="mid"))
    kept = make_finding(
        rule="GF303", slug="non-finite-activation", location=Location(first="stem"), value=2.0
    )
    new = replace(kept, severity=Severity.WARNING, value=4.0)
    make_report(make_trace(layers=before, parameters=[make_parameter("stem.weight")]), old, kept).to_csv(
        tmp_path / "a"
    )
    make_report(
        make_trace(
            layers=after,
            parameters=[make_parameter("stem.weight", norm=40.0)],
            residuals=[make_residual("stem")],
        ),
        new,
    ).to_csv(tmp_path / "b", byte_order_mark=True)
    return tmp_path / "a", tmp_path / "b"


def compared(folders: tuple[Path, Path]) -> FolderDiff:
    return diff_folders(read_folder(folders[0]), read_folder(folders[1]))


def test_a_number_that_crosses_zero_by_chance_is_not_what_moved(tmp_path: Path) -> None:
    for folder, cosine, rho in (("a", 0.002, 0.5), ("b", -0.004, 0.6)):
        site = make_residual("block", cosine=cosine, gradient_cosine=cosine, rho=rho)
        make_report(make_trace(residuals=[site])).to_csv(tmp_path / folder)
    row = compared((tmp_path / "a", tmp_path / "b")).tables[1].rows[0]
    assert row.label_a == "block[0]"
    assert row.moved is not None and row.moved.column == "rho"


def test_what_moved_most_comes_first(folders: tuple[Path, Path]) -> None:
    layers, residuals, parameters, findings = compared(folders).tables
    shown = [(row.label_a, row.label_b, row.by, row.factor) for row in layers.rows]
    assert shown[:2] == [("cut", "cut", NAME, math.inf), ("mid", "middle", POSITION, 2.0)]
    assert {(row.label_a, row.label_b) for row in layers.rows[2:-1]} == {
        ("gone", ""),
        ("", "head"),
        ("", "tail"),
    }
    assert shown[-1] == ("stem", "stem", NAME, 1.0)
    assert [row.by for row in residuals.rows] == [ONLY_B]
    moved = parameters.rows[0].moved
    assert moved is not None and (moved.column, moved.ratio) == ("norm", 10.0)
    assert [(row.label_a[:5], row.label_b[:5], row.changed) for row in findings.rows] == [
        ("GF303", "GF303", (("severity", "error", "warning"),)),
        ("GF101", "", ()),
    ]


def test_a_folder_beside_itself_has_not_moved(folders: tuple[Path, Path]) -> None:
    same = diff_folders(read_folder(folders[1]), read_folder(folders[1]))
    for table in same.tables:
        assert all(row.by is NAME and row.factor == 1.0 for row in table.rows)
    assert "moved most  " not in diff_screen.render(same, Screen())


def invoke(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_screen_says_it_in_a_line_a_row(folders: tuple[Path, Path]) -> None:
    code, stdout, stderr = invoke("diff", *folders)
    assert (code, stderr) == (0, "")
    lines = [" ".join(line.split()) for line in stdout.splitlines()]
    assert "Layers 6 rows: 2 by name, 1 by position, 1 only in a, 2 only in b; 2 moved" in lines
    assert "cut coverage measured no grad" in " ".join(lines)
    assert "mid → middle gradient_norm 1 2 ×2" in " ".join(lines)
    assert "only in a gone" in lines and "only in b head, tail" in lines


def test_csv_has_a_ratio_beside_every_number(folders: tuple[Path, Path]) -> None:
    for name, columns in TABLES.items():
        code, stdout, _ = invoke("diff", *folders, "--format", "csv", "--table", name)
        table = list(csv.DictReader(io.StringIO(stdout)))
        assert code == 0 and table
        for column in (column.name for column in columns if column.kind == "number"):
            assert {f"{column}_a", f"{column}_b", f"{column}_ratio"} <= set(table[0])
    layers = list(csv.DictReader(io.StringIO(invoke("diff", *folders, "--format", "csv")[1])))
    assert (layers[0]["row_b"], layers[0]["moved"], layers[0]["factor"]) == ("cut", "coverage", "Infinity")
    assert (layers[1]["gradient_norm_a"], layers[1]["gradient_norm_b"], layers[1]["gradient_norm_ratio"]) == (
        "1.0",
        "2.0",
        "2.0",
    )
    assert layers[2]["factor"] == ""


def test_json_holds_the_rows_of_every_csv(folders: tuple[Path, Path]) -> None:
    plain = json.loads(invoke("diff", *folders, "--format", "json")[1], parse_constant=pytest.fail)
    assert list(plain) == ["schema", "a", "b", *TABLES]
    diff = compared(folders)
    for table in diff.tables:
        assert [list(row) for row in plain[table.name]] == [
            [column.name for column in diff_texts.columns(table.name)] for _ in table.rows
        ]
    assert plain["layers"][0]["factor"] == "Infinity"


def test_markdown_has_a_table_a_section(folders: tuple[Path, Path]) -> None:
    code, stdout, _ = invoke("diff", *folders, "--format", "markdown")
    assert code == 0
    assert [line for line in stdout.splitlines() if line.startswith("### ")] == [
        "### Layers",
        "### Residuals",
        "### Parameters",
        "### Findings",
    ]
    assert "| mid → middle | gradient\\_norm | 1 | 2 | ×2 |" in stdout


@pytest.mark.parametrize("width", [60, 80, 140])
def test_no_line_is_wider_than_the_screen_and_no_name_is_cut(tmp_path: Path, width: int) -> None:
    written = [name for name in AWKWARD_NAMES if "\ud800" not in name]
    for folder, norm in (("a", 1.0), ("b", 1e-9)):
        layers = [make_layer(name, at, gradient_norm=norm, type=name) for at, name in enumerate(written)]
        findings = [make_finding(location=Location(first=name), value=norm) for name in written]
        make_report(make_trace(layers=layers), *findings).to_csv(tmp_path / folder)
    diff = diff_folders(read_folder(tmp_path / "a"), read_folder(tmp_path / "b"))
    text = diff_screen.render(diff, Screen(width=width, show_all=True))
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    assert text.count("x") > 2 * 300, "the long name stands whole, among the layers and the findings"
    assert "…" not in text
    assert ("signal b/a" in text) is (width == 140)


def test_many_rows_are_shown_in_part_unless_asked_for(tmp_path: Path) -> None:
    for folder, norm in (("a", 1.0), ("b", 3.0)):
        layers = [make_layer(f"l{at}", at, gradient_norm=norm) for at in range(50)]
        make_report(make_trace(layers=layers)).to_csv(tmp_path / folder)
    arguments = ("diff", tmp_path / "a", tmp_path / "b")
    assert "… 30 more rows moved: --all" in invoke(*arguments)[1]
    assert "more" not in invoke(*arguments, "--all")[1]
    assert "30 more moved" in invoke(*arguments, "--format", "markdown")[1]


@pytest.mark.parametrize("name", SCREENS)
def test_every_screen_can_be_compared_with_another(tmp_path: Path, name: str) -> None:
    SCREENS[name]().to_csv(tmp_path / "a")
    SCREENS["healthy"]().to_csv(tmp_path / "b")
    for form in ("table", "csv", "json", "markdown"):
        code, stdout, stderr = invoke("diff", tmp_path / "a", tmp_path / "b", "--format", form)
        assert (code, stderr) == (0, "") and stdout.endswith("\n")


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    report = SCREENS["residual_sites"]()
    report.to_csv(tmp_path)
    read = read_folder(tmp_path).tables
    for name, rows_of in (
        ("layers", layer_rows),
        ("residuals", residual_rows),
        ("parameters", parameter_rows),
    ):
        # repr, for a NaN is not equal to itself; no name here has an escape.
        assert repr(list(read[name])) == repr([_read_back(row) for row in rows_of(report.trace)])
    assert repr(list(read["findings"])) == repr([_read_back(row) for row in finding_rows(report.findings)])


def _read_back(row: Row) -> Row:
    """Text that is not there is empty."""
    kinds = {column.name: column.kind for columns in TABLES.values() for column in columns}
    return {name: "" if cell is None and kinds[name] == "text" else cell for name, cell in row.items()}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds none of layers.csv"),
        ("", "does not start with the names of its columns"),
        ("order;name\n0;a\n", "does not start with the names of its columns"),
        ("order,name\n0\n", "line 2: 1 cells under 2 columns"),
        ("order,name\n0,a\nx,b\n", "line 3: order is 'x', not a number"),
        (b"order,name\n0,\xff\n", "cannot read"),
        ('order,name\n0,"a\n', "cannot read"),
    ],
)
def test_a_damaged_folder_is_one_sentence(tmp_path: Path, content: str | bytes | None, said: str) -> None:
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "layers.csv").write_bytes(data)
    with pytest.raises(TraceFileError, match=said.replace("(", r"\(")):
        read_folder(tmp_path)
    code, stdout, stderr = invoke("diff", tmp_path, tmp_path)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "sarif"], "--format takes table, csv, json, markdown"),
        (["--table", "layer"], "--table takes layers, residuals, parameters, findings"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(
    folders: tuple[Path, Path], arguments: list[str], said: str
) -> None:
    code, stdout, stderr = invoke("diff", *folders, *arguments)
    assert (code, stdout) == (2, "") and said in stderr
    assert "no such folder" in invoke("diff", folders[0], folders[0] / "no")[2]


def test_an_older_folder_lacks_columns_and_tables(folders: tuple[Path, Path]) -> None:
    for path in folders[0].iterdir():
        if path.stem != "layers":
            path.unlink()
    path = folders[0] / "layers.csv"
    cells = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    kept = cells[0].index("signal")
    path.write_text("".join(",".join(row[:kept]) + "\n" for row in cells), encoding="utf-8")
    layers = compared(folders).tables[0]
    assert all(
        change.a is None for row in layers.rows for change in row.changes if change.column == "gradient_norm"
    )


def test_the_output_goes_to_a_file(folders: tuple[Path, Path], tmp_path: Path) -> None:
    code, stdout, _ = invoke("diff", *folders, "--format", "csv", "--output", tmp_path / "moved.csv")
    assert (code, stdout) == (0, "")
    assert (tmp_path / "moved.csv").read_text(encoding="utf-8").startswith("row_a,row_b,aligned_by")


def test_it_loads_nothing_slow(folders: tuple[Path, Path]) -> None:
    code = (
        "import sys, gradflow.cli\n"
        f"sys.argv = ['gradflow', 'diff', {str(folders[0])!r}, {str(folders[1])!r}]\n"
        "try:\n    gradflow.cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('slow:', sorted({'torch', 'pandas', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "slow: []" in done.stderr


def test_the_page_says_what_the_csv_holds() -> None:
    page = (Path(__file__).parents[1] / "docs" / "csv.md").read_text(encoding="utf-8")
    section = page.split("## Two folders side by side\n")[1]
    named = [
        name for line in section.splitlines() if line.startswith("| `") for name in line.split("`")[1::2]
    ]
    columns = [column.name for column in diff_texts.columns("layers")]
    first = ["row_a", "row_b", "aligned_by", "moved", "factor", "type_a", "type_b"]
    assert columns[: len(first)] == first
    assert {*first, "gradient_norm_a", "gradient_norm_b", "gradient_norm_ratio"} <= set(named) & set(columns)
