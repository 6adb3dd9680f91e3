"""Renew the screen in README.md by running the real command at 80 columns: `make readme`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ("gradflow", "inspect", "sample_models/deep_sigmoid_mlp.py")
OPEN, CLOSE = "<!-- screen -->", "<!-- /screen -->"


def screen() -> str:
    """Return what the command prints to a pipe 80 columns wide. Raises CalledProcessError when it fails."""
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-m", *COMMAND]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").split("\n"))


def with_screen(readme: str, text: str) -> str:
    """Return the README with the block between the two markers replaced."""
    before, opened, rest = readme.partition(OPEN)
    _, closed, after = rest.partition(CLOSE)
    if not opened or not closed:
        raise SystemExit(f"README.md needs the markers {OPEN} and {CLOSE} around the screen")
    return f"{before}{OPEN}\n```console\n$ {' '.join(COMMAND)}\n{text}\n```\n{CLOSE}{after}"


def main() -> None:
    """Rewrite README.md in place."""
    path = ROOT / "README.md"
    path.write_text(with_screen(path.read_text(encoding="utf-8"), screen()), encoding="utf-8")


if __name__ == "__main__":
    main()
