"""Renew the screens in README.md by running the real commands at 80 columns: `make readme`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCREENS = {
    "screen": ("gradflow", "inspect", "sample_models/deep_sigmoid_mlp.py"),
    "anatomy": ("gradflow", "anatomy", "sample_models/small_gpt.py", "--ablate"),
}
"""The command by the marker that its screen stands behind: ``<!-- screen -->``."""


def screen(command: tuple[str, ...]) -> str:
    """Return what a command prints to a pipe 80 columns wide. Raises CalledProcessError when it fails."""
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    words = [sys.executable, "-m", *command]
    done = subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").split("\n"))


def with_screen(readme: str, marker: str, command: tuple[str, ...], text: str) -> str:
    """Return the README with the block between the two markers replaced."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, opened, rest = readme.partition(start)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise SystemExit(f"README.md needs the markers {start} and {end} around the screen")
    return f"{before}{start}\n```console\n$ {' '.join(command)}\n{text}\n```\n{end}{after}"


def main() -> None:
    """Rewrite README.md in place."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    for marker, command in SCREENS.items():
        text = with_screen(text, marker, command, screen(command))
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
