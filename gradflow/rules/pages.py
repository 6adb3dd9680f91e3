"""A rule -> its page, in Markdown: what ``gradflow explain`` shows and ``docs/rules`` holds.

``python -m gradflow.rules.pages docs/rules`` writes the pages again; a test compares them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gradflow.rules import RULES
from gradflow.rules.rule import Rule, Threshold

WHEN = {
    "initialisation": "At initialisation only.",
    "trained": "After training only (--checkpoint, --trained).",
    "both": "At initialisation and after training.",
}
"""How a page says a rule's phase."""


def render_page(rule: Rule) -> str:
    """Return the page of one rule as Markdown, ending in a newline."""
    sections = (
        f"# {rule.code} {rule.slug}",
        rule.summary,
        "## What it means",
        rule.meaning,
        "## Formula",
        f"```text\n{rule.formula}\n```",
        "## Thresholds",
        _thresholds(rule),
        "## Why it hurts",
        rule.why,
        "## What to try",
        rule.hint,
        "## Not reported",
        _bullets(rule.exemptions),
        "## When",
        WHEN[rule.phase],
        "## A failing example",
        f"```python\n{rule.failing_example}```",
        "## Its healthy twin",
        f"```python\n{rule.healthy_example}```",
        "## Sources",
        _bullets(rule.sources),
    )
    return "\n\n".join(sections) + "\n"


def render_index() -> str:
    """Return the page that lists all rules."""
    rows = "\n".join(f"| [{rule.code}]({rule.code}.md) | {rule.slug} | {rule.summary} |" for rule in RULES)
    return f"# Rules\n\n| Rule | Name | What it says |\n|---|---|---|\n{rows}\n"


def pages() -> dict[str, str]:
    """Return every page by its file name."""
    return {"index.md": render_index()} | {f"{rule.code}.md": render_page(rule) for rule in RULES}


def main(directory: str) -> None:
    """Write every page into a folder."""
    for name, text in pages().items():
        Path(directory, name).write_text(text, encoding="utf-8")


def _thresholds(rule: Rule) -> str:
    rows = "\n".join(
        f"| {t.severity} | {t.name} {t.value:g} | {_setting(rule, t)} | {t.source} |" for t in rule.thresholds
    )
    return f"| Severity | Limit | Setting | Source |\n|---|---|---|---|\n{rows}"


def _setting(rule: Rule, threshold: Threshold) -> str:
    return f"`{rule.code}.{threshold.key}.{threshold.severity}`" if threshold.key else ""


def _bullets(lines: tuple[str, ...]) -> str:
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/rules")
