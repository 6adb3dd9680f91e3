"""How a severity looks. ANSI names only: the terminal's own theme, light or dark, decides the shade."""

from __future__ import annotations

from gradflow.findings import Severity

MARKS = {Severity.ERROR: "✗", Severity.WARNING: "▲", Severity.INFO: "•", None: "✓"}
COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.INFO: "cyan", None: "green"}
HEADING = "bold"
LABEL = "cyan"
