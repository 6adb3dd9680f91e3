"""Whoever writes may be killed at any moment: what is there is the old file or the new one, never half of one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gradflow.atomic_files import write_folder, write_text
from gradflow.errors import TraceFileError

KILLS = 12
SIZE = 400_000

BASELINE = """
from gradflow.baseline import KnownFinding, save
from gradflow.findings import Severity
def write(version):
    known = [KnownFinding(target=str(version), rule="GF101", slug="s", severity=Severity.ERROR, location=f"a.{i}",
                          type="Linear") for i in range(2000)]
    save(known, place / "file")
"""
FOLDER = f"""
from gradflow.atomic_files import write_folder
def write(version):
    write_folder(place, {{name: f"{{version}}\\n" * {SIZE // 4} for name in ("layers.csv", "findings.csv")}})
"""
TORN = f"""
def write(version):
    with (place / "file").open("w") as file:
        for _ in range({SIZE // 4}):
            file.write(f"{{version}}\\n")
"""
LOOP = """
import sys
from pathlib import Path
place = Path(sys.argv[1])
{writer}
write(0)
print("ready", flush=True)
while True:
    for version in (1, 0):
        write(version)
"""


def versions_after_kills(writer: str, place: Path, kills: int) -> set[frozenset[str]]:
    """Let a process write two versions in turn, kill it at random moments, and say what the files then held.

    A file is told by the number of its lines and the set of them, each up to its first comma.
    """
    draw = random.Random(0)
    seen = set()
    for _ in range(kills):
        command = [sys.executable, "-c", LOOP.format(writer=writer), str(place)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(draw.uniform(0.005, 0.05))
            process.send_signal(signal.SIGKILL)
        for file in place.glob("[!.]*"):
            lines = file.read_text(encoding="utf-8").split("\n")
            seen.add(frozenset([f"{len(lines)} lines", *(line.split(",")[0] for line in lines)]))
    return seen


def test_a_baseline_is_whole_after_a_kill(tmp_path: Path) -> None:
    seen = versions_after_kills(BASELINE, tmp_path, KILLS)
    head, tail = '{"schema": 1', "]}"
    allowed = {frozenset(["2003 lines", head, tail, "", f'{{"target": "{v}"']) for v in (0, 1)}
    assert seen <= allowed and seen


def test_each_file_of_a_folder_is_whole_after_a_kill(tmp_path: Path) -> None:
    seen = versions_after_kills(FOLDER, tmp_path, KILLS)
    assert seen <= {frozenset([f"{SIZE // 4 + 1} lines", "", version]) for version in "01"} and seen


def test_a_torn_file_would_be_seen(tmp_path: Path) -> None:
    seen = versions_after_kills(TORN, tmp_path, KILLS)
    assert not seen <= {frozenset([f"{SIZE // 4 + 1} lines", "", version]) for version in "01"}


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, {"a": "old a", "b": "old b"})

    def full(path: Path, *args: Any, **options: Any) -> Any:
        if path.name.startswith(".b"):
            raise OSError(28, "No space left on device")
        return original(path, *args, **options)

    original = Path.open
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(TraceFileError, match="No space left"):
        write_folder(tmp_path, {"a": "new a", "b": "new b"})
    monkeypatch.undo()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old a", "b": "old b"}


def test_a_file_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_text(link, "new")
    assert (link.is_symlink(), real.read_text(), real.stat().st_mode & 0o777) == (True, "new", 0o640)
